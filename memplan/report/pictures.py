"""Answers as pictures: what `plan.plot_timeline()` and its like draw, and what a notebook shows of an answer.

Pictures are those of the report page, in the colours of a screen.  What a picture needs beside the answer is worked out
by the estimator that the answer was made by.
"""

from __future__ import annotations

from hashlib import sha256
from html import escape
from typing import TYPE_CHECKING, Any

from memplan.estimation.estimate import Estimate
from memplan.estimation.growth import growth
from memplan.estimation.profile import profile_of
from memplan.estimation.sweep import Sweep, spread
from memplan.planner.frontier import frontier
from memplan.planner.maps import maps
from memplan.planner.plan import Plan
from memplan.planner.schedule import schedule
from memplan.report.beside import frontier_document, growth_document, maps_document, schedule_document
from memplan.report.charts.drawing import DOTS_PER_INCH, Chart, svg_of
from memplan.report.charts.lengths import spread as spread_of_lengths
from memplan.report.charts.maps import map_of_sizes
from memplan.report.charts.named import CHARTS, OF_PLAN, breakdown, chart_of, parts_of, timeline
from memplan.report.document import plan_document, row_document, setup_document
from memplan.report.layout import plural
from memplan.report.lengths import lengths_document, percent
from memplan.report.study import profile_document
from memplan.report.text import equation
from memplan.sequences.survey import Survey
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memplan.estimation.estimate import Estimator
    from memplan.specs.training import Setup

    Document = dict[str, Any]

MOST_COLUMNS, MOST_LINES = 10, 16
"""Lengths and micro-batches of a sweep that are drawn."""

PAPER = "background:#fff;color:#1a1d21;padding:.5em;max-width:44em;font-family:sans-serif"


def chart(answer: Any, name: str) -> Chart:
    """The chart of this name of a plan, an estimate, a sweep or lengths.

    Raises:
        MemplanError: there is none, and why.
    """
    if isinstance(answer, Sweep):
        return map_of_sizes([thinned(maps_document([answer])[0])], None)
    if isinstance(answer, Survey):
        return spread_of_lengths(lengths_document(answer))
    if isinstance(answer, Estimate):
        return _of_estimate(answer, name)
    assert isinstance(answer, Plan)
    document = {
        "plan": plan_document(answer),
        "ledger": _ledger(answer.estimate),
        "measured": [],
        "schedule": schedule_document(schedule(answer.estimate.setup)),
    }
    needed, _ = CHARTS[name]
    if needed not in {*document, *OF_PLAN}:
        document[needed] = _worked_out(answer, needed, answer.estimate.behind.estimator(name))
    return chart_of(document, name)


def _of_estimate(estimate: Estimate, name: str) -> Chart:
    usable = None if estimate.gpu is None else estimate.gpu.usable_bytes
    if name == "timeline":
        return timeline(profile_document(profile_of(estimate.behind.estimator(name), estimate.setup)), usable)
    return breakdown(_ledger(estimate), usable, None if usable is None else estimate.upper_bound_bytes)


def _ledger(estimate: Estimate) -> list[Document]:
    return [row_document(row) for row in estimate.ledger]


def _worked_out(plan: Plan, needed: str, estimator: Estimator) -> Any:
    """What else of the report document a chart draws."""
    setup: Setup = plan.estimate.setup
    if needed == "profile":
        return profile_document(profile_of(estimator, setup))
    if needed == "maps":
        return maps_document(maps(estimator, plan.goal, setup))
    if needed == "growth":
        return growth_document(growth(estimator, setup))
    return frontier_document(frontier(estimator, plan.goal, setup))


def thinned(one: Document) -> Document:
    """A map of no more cells than can be read, spread over all of it."""
    batches, lengths = one["micro_batch_sizes"], one["seq_lens"]
    rows, columns = spread(len(batches), MOST_LINES), spread(len(lengths), MOST_COLUMNS)
    return {
        **one,
        "micro_batch_sizes": [batches[row] for row in rows],
        "seq_lens": [lengths[column] for column in columns],
        "points": [one["points"][row * len(lengths) + column] for row in rows for column in columns],
    }


# -- notebooks ---------------------------------------------------------------------------------------------------------


def fragment(answer: Any) -> str:
    """A short piece of HTML: the verdict, a picture, a table; every text in it is escaped."""
    if isinstance(answer, Sweep):
        return _html(_swept(answer), chart(answer, "map"), ("length", "largest that fits"), _largest(answer))
    if isinstance(answer, Survey):
        return _html(_surveyed(answer), chart(answer, "lengths"), ("maximum", "records that it cuts"), _cut(answer))
    estimate = answer.estimate if isinstance(answer, Plan) else answer
    said = _planned(answer) if isinstance(answer, Plan) else _estimated(answer)
    rows = [(kind.replace("_", " "), format_bytes(num)) for kind, num in parts_of(_ledger(estimate))]
    return _html(said, chart(answer, "breakdown"), ("at the peak", "bytes"), rows)


def _planned(plan: Plan) -> str:
    where = f"{plan.model.name} on {plan.gpu.label}"
    shown = plan.best or plan.nearest
    assert shown is not None
    split = equation(setup_document(shown.setup), plan.model.unit)
    mode = f"checkpointing {shown.setup.activation_checkpointing}"
    if plan.best is None:
        return f"{where}: nothing fits, {format_bytes(shown.short_by_bytes)} are missing at {split}, {mode}"
    memory = f"{format_bytes(shown.memory.peak_process_bytes)} of {format_bytes(plan.gpu.usable_bytes)}"
    time = f"at least {format_seconds(shown.step_time.total_s)} per step"
    return f"{where}: it fits. {split}, {mode}: {memory}, {time}"


def _estimated(estimate: Estimate) -> str:
    process = format_bytes(estimate.memory.peak_process_bytes)
    if estimate.gpu is None:
        return f"{estimate.model.name}: {process} at its peak"
    verdict = "it fits" if estimate.fits else "it does not fit"
    usable = format_bytes(estimate.gpu.usable_bytes)
    return f"{estimate.model.name} on {estimate.gpu.label}: {verdict}, {process} of {usable} at its peak"


def _swept(sweep: Sweep) -> str:
    sizes = plural(len(sweep.grid.seq_len), "size")
    if sweep.gpu is None:
        return f"{sweep.model.name}: {sizes}"
    num = sweep.verdicts().count("fits")
    return f"{sweep.model.name} on {sweep.gpu.label}: {num:,} of {sizes} fit"


def _surveyed(survey: Survey) -> str:
    whole = survey.summary
    return f"{survey.data}: {plural(whole.num_samples, 'record')}, {plural(whole.num_tokens, 'token')}"


def _cut(survey: Survey) -> list[tuple[str, str]]:
    return [(f"{one.most:,}", percent(one.truncation.num_cut, survey.summary.num_samples)) for one in survey.candidates]


def _largest(sweep: Sweep) -> list[tuple[str, str]]:
    shown = [sweep.largest[n] for n in spread(len(sweep.largest), MOST_COLUMNS)]
    return [
        (f"{one.seq_len:,}", "none" if one.micro_batch_size is None else f"{one.micro_batch_size:,}") for one in shown
    ]


def _html(said: str, drawn: Chart, heads: Sequence[str], rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(
        f'<tr><th scope="row" style="text-align:left;font-weight:400">{escape(name)}</th><td>{escape(number)}</td></tr>'
        for name, number in rows
    )
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>" if lines else ""
    unique = sha256(f"{said}{drawn.conclusion}{lines}".encode()).hexdigest()[:10]
    svg = svg_of(drawn._replace(name=f"{drawn.name}-{unique}-"))
    width = DOTS_PER_INCH * drawn.figure.get_size_inches()[0]
    picture = f'<div style="max-width:{width:.0f}px">{svg}</div>'
    return f'<div style="{PAPER}"><p><b>{escape(said)}</b></p>{picture}{table}</div>'
