"""Answers that are numbers in rows, as pages of headings, sentences and tables: `memplan gpus`, `probe` and the like.

Rows are those of the text (`memplan.report`).  Left out: charts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report import calibration, catalogue, difference, probe
from memplan.report.layout import plural
from memplan.report.pages.page import render
from memplan.report.text import choices, equation, model_facts
from memplan.specs.measurement import DONE
from memplan.specs.values import NamedTuple
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from memplan.report.charts.drawing import Chart

    Document = dict[str, Any]

NO_NAME = "\N{NO-BREAK SPACE}"
FOLDED_FROM = 15
"""Rows of a table that is a second look at something, from which on it is folded."""


class Table(NamedTuple):
    """Rows under the names of their columns."""

    label: str
    """What it is a table of, for those who do not see it."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[int] = ()
    """Positions of columns that hold words; the first does, all others hold numbers."""
    folded: str = ""
    """What is to be unfolded to see it; empty: nothing."""


class Section(NamedTuple):
    """Something under a heading."""

    heading: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    """Drawn above the tables, which have their numbers."""


class Page(NamedTuple):
    """What stands on a page of tables."""

    title: str
    verdict: Sequence[str]
    """The answer in a sentence or two."""
    state: str = ""
    """fits, not or unknown, where it is an answer of that kind."""
    facts: Sequence[tuple[str, str]] = ()
    """What it is about."""
    sections: Sequence[Section] = ()


def render_tables_page(document: Mapping[str, Any], page: Page) -> str:
    """The page; `document` is embedded."""
    return render("tables.html.jinja", document=document, page=page, facts=grouped(page.facts))


def grouped(facts: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Labels with all that is said of them; what has no label goes on with the one before."""
    found: list[tuple[str, list[str]]] = []
    for label, text in facts:
        if label or not found:
            found.append((label, [text]))
        elif text:
            found[-1][1].append(text)
    return found


def _listed(label: str, rows: Sequence[Sequence[str]], texts: Sequence[int] = (), folded: str = "") -> Table:
    return Table(label, rows[0], rows[1:], texts, folded)


# -- catalogues --------------------------------------------------------------------------------------------------------


def models_page(document: Document) -> Page:
    """The models that are known."""
    models = document["models"]
    table = _listed("Models", catalogue.model_rows(models), texts=(2, 3))
    return Page(
        "The models that memplan knows",
        [plural(len(models), "model")],
        sections=[
            Section("Models", [catalogue.MODELS_NOTE], [table]),
        ],
    )


def gpus_page(document: Document) -> Page:
    """The cards that are known, and where the numbers come from."""
    gpus = document["gpus"]
    names, *rows = catalogue.gpu_rows(gpus)
    rows = [(row[0], gpu["label"], *row[2:]) for row, gpu in zip(rows, gpus, strict=True)]
    table = Table("GPUs", names, rows, (1,))
    sources = [(gpu["name"], key, str(source)) for gpu in gpus for key, source in gpu["sources"].items()]
    return Page(
        "The GPUs that memplan knows",
        [f"{len(gpus):,} GPUs"],
        sections=[
            Section("GPUs", [catalogue.GPUS_NOTE.replace("Sources: --json. ", "")], [table]),
            Section(
                "Sources",
                [],
                [
                    Table(
                        "Where the numbers come from",
                        ("card", "number", "source"),
                        sources,
                        (1, 2),
                        plural(len(sources), "source"),
                    )
                ],
            ),
        ],
    )


# -- measurements ------------------------------------------------------------------------------------------------------


def calibrations_page(document: Document) -> Page:
    """What some cards have taught."""
    learnt = document["calibrations"]
    said = plural(len(learnt), "card") if learnt else "No card has measurements to learn from"
    return Page("What measurements taught", [said], sections=[_card(one) for one in learnt])


def _card(one: Document) -> Section:
    facts = [*calibration.learnt_facts(one), *([("written to", one["path"])] if one["path"] else [])]
    tables = [Table("Learnt", ("", "learnt"), list(calibration.coefficient_rows(one)))]
    if one["bounds"]:
        rows = list(calibration.bound_rows(one))
        tables.append(Table("Bounds", ("confidence", "bound above the prediction", ""), rows, (2,)))
    sentences = [f"{label}: {text}" if label else text for label, text in facts]
    return Section(
        calibration.card_words(one),
        [*sentences, *([] if one["bounds"] else [f"bounds: {calibration.NO_BOUNDS}"])],
        tables,
    )


def probe_page(document: Document) -> Page:
    """One configuration, measured."""
    headline, message = probe.outcome_words(document)
    sections = []
    rows, notes = probe.measured_rows(document), list(probe.measured_notes(document))
    if rows or notes:
        columns = ("peak", "measured", "formula", "error")
        sections.append(Section("Bytes in steady state", notes, [Table("Peaks", columns, rows)] if rows else []))
    steps = document["steps"]
    if steps:
        retries = probe.retry_words(steps)
        table = _listed("The highest point of each phase", probe.phase_rows(steps))
        sections.append(Section("The highest point of each phase (allocated)", [retries] if retries else [], [table]))
    if document["unmodelled"]:
        sections.append(Section("Not modelled", [f"{one['what']}: {one['why']}" for one in document["unmodelled"]]))
    if document["ledger"]:
        sections.append(Section("What was measured, row by row", [], [_measured_ledger(document["ledger"])]))
    return Page(
        f"{document['model']['name']}, measured",
        [headline, message],
        "fits" if document["outcome"] == DONE else "not",
        list(probe.probed_facts(document)),
        sections,
    )


def _measured_ledger(ledger: Sequence[Document]) -> Table:
    rows = [(row["tensor"], row["kind"].replace("_", " "), format_bytes(row["bytes"]), row["source"]) for row in ledger]
    return Table("What was measured", ("what", "kind", "bytes", "source"), rows, (1, 3))


def probes_page(document: Document) -> Page:
    """Many configurations, measured."""
    card = document["card"]
    facts = [
        ("device", probe.device_words(card, None)),
        ("", probe.stack_of(document["versions"], card["driver"])),
        ("records", document["records"] or "nothing was recorded"),
    ]
    tables = [
        _survivors(document["largest"]),
        _tested(document["decisions"]),
        Table("Trials", TRIAL_COLUMNS, [(one["words"], probe.result_words(one)) for one in document["trials"]], (1,)),
        _reasons("Without an answer", document["failed"]),
        _reasons("Not asked", document["not_asked"]),
    ]
    sections = [Section(table.label, [], [table]) for table in tables if table.rows]
    return Page("Measured, trial by trial", [probe.count_words(document)], "", facts, sections)


TRIAL_COLUMNS = ("trial", "allocated as measured, error of the formula, time of a step")


def _survivors(largest: Sequence[Document]) -> Table:
    rows = [
        (
            one["trial"],
            probe.largest_words(one["micro_batch_size"], one["complete"]),
            _written(one["predicted"]),
            ", ".join(f"{batch} {'fits' if ok else 'does not'}" for batch, ok in one["tried"]),
        )
        for one in largest
    ]
    columns = ("trial", "measured", "by the formula, without headroom", "tried")
    return Table("The largest micro-batch that survives", columns, rows, (3,))


def _tested(decisions: Sequence[Document]) -> Table:
    rows = [(one["trial"], probe.tested_words(one["plan"]), probe.tested_words(one["larger"])) for one in decisions]
    return Table("Plans put to the test", ("trial", "the plan", "the next larger"), rows, (1, 2))


def _reasons(heading: str, trials: Sequence[Document]) -> Table:
    return Table(heading, ("trial", "reason"), [(one["trial"], one["reason"]) for one in trials], (1,))


def _written(value: object) -> str:
    return "-" if value is None else str(value)


# -- formula against trace ---------------------------------------------------------------------------------------------


def difference_page(document: Document) -> Page:
    """Formula against trace."""
    setup, kept = document["setup"], document["kept"]
    numbers = [*document["totals"], *document["instants"]]
    equal = sum(one["formula"] == one["trace"] for one in numbers)
    columns = ("", "formula", "trace", "difference")
    sections = [
        Section("Bytes", [], [Table("Totals", columns, difference.number_rows(document["totals"]))]),
        Section(
            "The highest point of each part of a step (allocated bytes)",
            [],
            [Table("Parts of a step", columns, difference.number_rows(document["instants"]))],
        ),
        Section(
            "What the forward pass keeps", [difference.KEPT_BY_ONE if kept else difference.KEPT_EQUALLY], _kept(kept)
        ),
    ]
    facts = [
        *model_facts(document["model"]),
        ("setup", f"{choices(setup)}, checkpointing {setup['activation_checkpointing']}"),
        ("length", plural(setup["seq_len"], "token")),
        ("batch", equation(setup)),
    ]
    said = f"Formula and trace agree in {equal} of {plural(len(numbers), 'number')}"
    return Page(
        f"{document['model']['name']}, formula against trace", [said], "unknown" if kept else "fits", facts, sections
    )


def _kept(kept: Sequence[Document]) -> list[Table]:
    if not kept:
        return []
    rows = [
        (
            format_bytes(one["bytes"]),
            f"{one['num_in_formula']:,}",
            f"{one['num_in_trace']:,}",
            row["witness"],
            f"{row['count']:,}",
            row["module"] or "(the model)",
            row["tensor"],
            row["dtype"] or "",
        )
        for one in kept
        for row in one["rows"]
    ]
    columns = ("size", "in the formula", "in the trace", "witness", "count", "module", "tensor", "dtype")
    folded = plural(len(rows), "row") if len(rows) > FOLDED_FROM else ""
    return [Table("Kept by only one of the two", columns, rows, (3, 5, 6, 7), folded)]


# -- what several have -------------------------------------------------------------------------------------------------


def ledger_table(ledger: Sequence[Mapping[str, Any]]) -> Table:
    """All rows of a ledger, the largest at the peak first, folded where they are many."""
    ranked = sorted(ledger, key=lambda row: (-row["bytes_at_peak"], -row["bytes"]))
    rows = [
        (
            row["module"] or NO_NAME,
            row["tensor"],
            row["kind"].replace("_", " "),
            f"{row['count']:,}",
            "" if row["shape"] is None else " x ".join(map(str, row["shape"])),
            row["dtype"] or "",
            format_bytes(row["bytes"]),
            format_bytes(row["bytes_at_peak"]),
            row["formula"],
            row["source"],
        )
        for row in ranked
    ]
    columns = ("module", "tensor", "kind", "count", "shape", "dtype", "bytes", "at the peak", "formula", "source")
    folded = f"all {plural(len(rows), 'row')}" if len(rows) > FOLDED_FROM else ""
    return Table("Every tensor that is counted", columns, rows, (1, 2, 4, 5, 8, 9), folded)
