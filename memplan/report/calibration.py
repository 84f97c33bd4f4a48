"""What a card has taught, as plain data and as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from memplan.calibration.bounds import bound, least_scores
from memplan.report.ansi import Line
from memplan.report.document import envelope
from memplan.report.layout import plural
from memplan.report.text import paragraph, paragraphs, table, title
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Document = dict[str, Any]

CONFIDENCES = (0.5, 0.9, 0.95, 0.99)
"""Whose bounds are shown."""
NO_BOUNDS = "none: the driver did not say what the processes took"


def calibrations_document(records: Sequence[Document], paths: Sequence[str | None]) -> Document:
    """Some calibrations, as the records that are written, and where they were written to."""
    found = []
    for record, path in zip(records, paths, strict=True):
        scores = record["scores"]
        all_scores = [*scores, *(math.inf for _ in range(record["num_exceeded"]))]
        bounds = [{"asked": each, **bound(all_scores, each)._asdict()} for each in CONFIDENCES] if scores else []
        found.append({**record, "num_scored": len(scores), "bounds": bounds, "path": path})
    return {**envelope("calibrations"), "calibrations": found}


def render_calibrations(document: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a document of calibrations."""
    if quiet:
        return [Line(f"{one['gpu']} {one['path'] or ''}".rstrip()) for one in document["calibrations"]]
    return [line for one in document["calibrations"] for line in _one(one)]


def _one(one: Document) -> Iterator[Line]:
    yield from title(card_words(one))
    yield from paragraphs(learnt_facts(one))
    yield from table([("", "learnt"), *coefficient_rows(one)])
    yield from _bounds(one)
    if one["path"]:
        yield from paragraph("written", one["path"])


def card_words(one: Mapping[str, Any]) -> str:
    """The card that was measured."""
    return f"{one['card_name']} ({one['gpu']})"


def learnt_facts(one: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What it was learnt from, as labels and texts."""
    yield "stack", ", ".join(f"{name} {value}" for name, value in one["versions"].items())
    num = one["num_fitted"] + one["num_scored"]
    yield (
        "records",
        f"{num}, of {one['first'][:10]} to {one['last'][:10]}: {one['num_fitted']} give the coefficients, "
        f"{one['num_scored'] + one['num_exceeded']} the bounds",
    )
    if one["num_exceeded"]:
        yield "", f"{one['num_exceeded']} of these ran out of memory where the prediction says that they fit"


def coefficient_rows(one: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is learnt, and its value."""
    for key, name in (("context_bytes", "beside the allocator"), ("workspace_bytes", "cuBLAS workspaces")):
        yield name, "not measured" if one[key] is None else format_bytes(one[key])
    for key, name in (("flops_fraction", "of peak FLOP/s"), ("bandwidth_fraction", "of peak bandwidth")):
        most = ", the most that is looked for" if one[key] == 1 else ""
        yield name, "not measured" if one[key] is None else f"{100 * one[key]:.1f} %{most}"
    yield "an operator takes", "not measured" if one["launch_s"] is None else format_seconds(one["launch_s"])
    for regime in one["regimes"]:
        yield (
            f"reserved, memory {regime['name']} ({plural(regime['num'], 'record')})",
            f"{regime['reserved_over_allocated']:.3f} x allocated, {regime['reserved_over_predicted']:.3f} x predicted",
        )


def _bounds(one: Mapping[str, Any]) -> Iterator[Line]:
    if not one["bounds"]:
        yield from paragraph("bounds", NO_BOUNDS)
        return
    yield from table([("confidence", "bound above the prediction", ""), *bound_rows(one)], left=(2,))


def bound_rows(one: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Confidence, bound, and what it would take where measurements do not vouch for it."""
    for each in one["bounds"]:
        least = "" if each["is_attained"] else f"{int(1000 * each['confidence']) / 1000:g} at most"
        note = least and f"{least}; it takes {least_scores(each['asked'])} scores"
        yield f"{each['asked']:g}", f"{100 * each['ratio']:+.2f} %", note
