"""A plan as one page: the answer first; every chart has its numbers in a table.

Left out: what the document does not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.export.torch_loop import torch_loop
from memplan.export.trainer_code import trainer_code
from memplan.planner.feed import PADDED
from memplan.report import accuracy
from memplan.report.charts import plans as charts
from memplan.report.charts.accuracy import errors_of
from memplan.report.charts.drawing import PAGE, Chart
from memplan.report.charts.lengths import spread
from memplan.report.charts.named import parts_of, phases_of
from memplan.report.charts.timeline import timeline
from memplan.report.feed_words import COLUMNS, candidate_rows, data_facts, risk_facts, way_facts, way_rows
from memplan.report.long_accumulation import shorter_rows, why_words
from memplan.report.pages.beside import beside_values
from memplan.report.pages.lengths import histogram_table
from memplan.report.pages.page import render
from memplan.report.pages.tables import grouped
from memplan.report.plan import equation_of, is_timed, kept_words, margin_words, roomier, time_words, trainer_line
from memplan.report.text import calibration_words, choices, exactly, signed, signed_seconds, split_of, vouched
from memplan.report.what_if import controls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Document = dict[str, Any]

FILTERS: dict[str, Callable[..., Any]] = {
    "signed": signed,
    "signed_seconds": signed_seconds,
    "exactly": exactly,
    "split": split_of,
    "percent": accuracy.percent,
}

MOST_LIVE = 12
"""Rows of the table of what is alive at the peak."""


def render_plan_page(document: Mapping[str, Any]) -> str:
    """The page of a report document (`memplan.report.study.study_document`)."""
    plan = document["plan"]
    shown = plan["best"] or plan["nearest"]
    parts = parts_of(document["ledger"])
    usable = plan["gpu"]["usable_bytes"]
    live = sorted((row for row in document["ledger"] if row["bytes_at_peak"]), key=lambda row: -row["bytes_at_peak"])
    errors, marks = errors_of(document["accuracy"]) if document["accuracy"] else (None, [])
    return render(
        "plan.html.jinja",
        document=document,
        filters=FILTERS,
        plan=plan,
        shown=shown,
        command=document["command"],
        equation=equation_of(plan, shown["setup"]),
        data=data_values(plan.get("data"), plan["best"]),
        choices=choices(shown["setup"]),
        warning=why_words(plan),
        shorter=shorter_rows(plan) if why_words(plan) else [],
        kept=kept_words(shown["setup"]["activation_checkpointing"]),
        margins=margin_words(plan, shown),
        time=time_words(plan, shown),
        is_timed=is_timed(plan, shown),
        trust=" ".join(_trust(plan)),
        trainer=trainer_code(plan) or trainer_line(plan),
        program=_program(plan),
        runners=roomier(plan),
        parts=parts,
        breakdown=charts.breakdown(parts, usable, shown["upper_bound_bytes"], PAGE) if parts else None,
        profile=document["profile"],
        timeline=timeline_of(document["profile"], usable, document["measured"]),
        live=live[:MOST_LIVE],
        num_others=len(live) - MOST_LIVE,
        other_bytes=sum(row["bytes_at_peak"] for row in live[MOST_LIVE:]),
        errors=errors,
        marks=marks,
        words=accuracy,
        levers=charts.levers(plan["levers"], PAGE) if plan["levers"] else None,
        **beside_values(document),
        script="plan/what_if.js" if document["what_if"] else "",
        what_if=None if document["what_if"] is None else controls(document["what_if"]),
    )


def _program(plan: Mapping[str, Any]) -> tuple[str, str]:
    """The plan as a loop of plain PyTorch, or why there is none."""
    try:
        return torch_loop(plan), ""
    except MemplanError as fault:
        return "", fault.cause


def data_values(data: Document | None, best: Document | None) -> Document | None:
    """What the page says about the data of a plan; None without any."""
    if data is None:
        return None
    return {
        "facts": grouped(data_facts(data)),
        "chart": spread(data, PAGE, chosen=data["length"]["max_len"]),
        "bins": histogram_table(data),
        "candidates": candidate_rows(data),
        "chosen": f"{data['length']['max_len']:,}",
        "rows": way_rows(data),
        "ways": list(way_facts(data)) if any(way["fits"] for way in data["ways"]) else [],
        "columns": COLUMNS,
        "risks": grouped([*risk_facts(data, best), *_around(data, best)]),
    }


def _around(data: Document, best: Document | None) -> Iterator[tuple[str, str]]:
    """What the rest of the page leaves out of the data."""
    if best is not None and data["worst"]["has_mask"] and not best["setup"]["padding"] and data["way"] == PADDED:
        yield (
            "around it",
            "A row alone in its micro-batch has no padding. The map, the growth and the sliders below are without it, "
            "and so without its mask, for larger micro-batches too; the frontier has it.",
        )


def timeline_of(
    profile: Mapping[str, Any] | None, usable_bytes: int | None, measured: Sequence[Document] = ()
) -> Chart | None:
    """The chart of a profile document; None without one."""
    if profile is None:
        return None
    return timeline(profile, usable_bytes, phases_of(measured), PAGE)


def _trust(plan: Mapping[str, Any]) -> list[str]:
    """How far the answer can be trusted, in sentences."""
    said = vouched(plan["confidence"])
    found = f"{calibration_words(plan['calibration'])}."
    return [found[0].upper() + found[1:], *([f"{said}."] if said else [])]
