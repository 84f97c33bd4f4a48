"""A sweep as one page: what fits as a map, the largest micro-batch of each length, every point.

Left out: what the document does not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.estimation.sweep import spread
from memplan.report import sweep as text
from memplan.report.layout import plural
from memplan.report.pages.page import render
from memplan.report.pages.tables import Table, grouped
from memplan.report.text import gib

if TYPE_CHECKING:
    Document = dict[str, Any]

MOST_BATCHES = 40
MOST_LENGTHS = 16
"""Rows and columns of the map; further ones are in the JSON."""
MOST_POINTS = 600
"""Points that are listed with all their bytes."""


def render_sweep_page(document: Document) -> str:
    """The page of a sweep document."""
    lengths = spread(len(document["seq_lens"]), MOST_LENGTHS)
    batches = shown_batches(document, lengths)
    verdict, said = _verdict(document)
    return render(
        "sweep.html.jinja",
        document=document,
        filters={"gib": gib},
        name=document["model"]["name"],
        verdict=verdict,
        said=said,
        facts=grouped(text.swept_facts(document)),
        basis=list(text.basis_facts(document)),
        batches=batches,
        lengths=lengths,
        is_thinned=(len(batches), len(lengths)) != (len(document["micro_batch_sizes"]), len(document["seq_lens"])),
        largest=_largest(document),
        points=_points(document),
    )


def shown_batches(document: Document, lengths: list[int]) -> list[int]:
    """Positions of the micro-batches of the map: all, or where they are many those that the text would show."""
    if len(document["micro_batch_sizes"]) <= MOST_BATCHES:
        return list(range(len(document["micro_batch_sizes"])))
    return text.shown_batches(document, lengths)


def _verdict(document: Document) -> tuple[str, list[str]]:
    """The answer in a sentence, and what else there is to say."""
    if document["gpu"] is None:
        return "How much memory each micro-batch and length takes", [
            "No GPU was named, so nothing is said about fitting."
        ]
    if not document["fits"]:
        headline, facts = text.nothing_words(document)
        return headline, [f"{label}: {words}" for label, words in facts]
    num = sum(point["verdict"] == "fits" for point in document["points"])
    return f"{num:,} of {plural(len(document['points']), 'point')} fit", []


def _largest(document: Document) -> Table | None:
    if not document["fits"]:
        return None
    rows = text.largest_rows(document, range(len(document["seq_lens"])))
    return Table("The largest micro-batch that fits", rows[0], rows[1:])


def _points(document: Document) -> Table | None:
    """Every point with its bytes; None where they are too many for a page."""
    points = document["points"]
    if len(points) > MOST_POINTS:
        return None
    names = list(points[0])
    rows = [tuple(_cell(point[name]) for name in names) for point in points]
    texts = [n for n, name in enumerate(names) if any(isinstance(point[name], str) for point in points)]
    columns = [name.replace("_", " ") for name in names]
    return Table("Every point", columns, rows, texts, plural(len(rows), "row"))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
