"""Formula against trace, as text: the numbers side by side, then every tensor that only one of the two keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.ansi import Line
from memplan.report.layout import plural
from memplan.report.text import choices, equation, model_lines, paragraph, table, title
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Document = dict[str, Any]

MOST_SIZES = 20
"""Sizes that are listed; all are in the JSON."""
KEPT_EQUALLY = "What the forward pass keeps is equal, tensor by tensor"
KEPT_BY_ONE = "Kept by only one of the two: sizes of which they do not keep equally many"


def render_difference(document: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a trace-diff document; `quiet`: the numbers alone."""
    numbers = [
        *_numbers("Formula against trace (bytes)", document["totals"]),
        *_numbers("The highest point of each part of a step (allocated bytes)", document["instants"]),
    ]
    if quiet:
        return numbers[1:]
    setup = document["setup"]
    return [
        *model_lines(document["model"]),
        *paragraph("setup", f"{choices(setup)}, checkpointing {setup['activation_checkpointing']}"),
        *paragraph("length", plural(setup["seq_len"], "token")),
        *paragraph("", equation(setup)),
        *numbers,
        *_kept(document["kept"]),
    ]


def _numbers(heading: str, numbers: Sequence[Document]) -> Iterator[Line]:
    yield from title(heading)
    yield from table([("", "formula", "trace", "difference"), *number_rows(numbers)])


def number_rows(numbers: Sequence[Document]) -> list[tuple[str, ...]]:
    """Number, formula, trace, difference."""
    return [
        (
            one["name"].removesuffix("_bytes").replace("num_", "number of ").replace("_", " "),
            f"{one['formula']:,}",
            f"{one['trace']:,}",
            "equal" if one["formula"] == one["trace"] else f"{one['percent']:+.3f} %",
        )
        for one in numbers
    ]


def _kept(kept: Sequence[Document]) -> Iterator[Line]:
    if not kept:
        yield from title(KEPT_EQUALLY, "good")
        return
    yield from title(KEPT_BY_ONE)
    for one in kept[:MOST_SIZES]:
        numbers = f"formula {one['num_in_formula']:,}, trace {one['num_in_trace']:,}"
        yield Line(f"  {format_bytes(one['bytes'])} ({one['bytes']:,} bytes): {numbers}", "title")
        rows = [
            (row["witness"], f"{row['count']:,}", row["module"] or "(the model)", row["tensor"], row["dtype"])
            for row in one["rows"]
        ]
        yield from (Line(f"  {line.text}") for line in table(rows, left=(0, 2, 3, 4), shrink=2, faint_header=False))
    if len(kept) > MOST_SIZES:
        yield Line(f"  and {len(kept) - MOST_SIZES} more sizes: --json")
