"""How far are predictions from measurements?  As one page that needs no network, no JavaScript and no other file.

Charts are drawn by `memplan.report.charts.accuracy`; each has its conclusion as a description and its numbers in a
table, and shapes say the same as colours.  The same document gives the same bytes.

Every text from outside is escaped by the template; the charts hold none.  Left out: what the document does not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report import accuracy
from memplan.report.charts.accuracy import amount, charts_of, points_of
from memplan.report.layout import plural
from memplan.report.pages.page import render

if TYPE_CHECKING:
    from collections.abc import Sequence

    Document = dict[str, Any]

OPEN_UP_TO = 60
"""Published comparisons that are unfolded from the start; more are folded, source by source."""


def render_accuracy_page(document: Document) -> str:
    """The page of an accuracy document, UTF-8."""
    scatters, strip, marks = charts_of(points_of(document))
    return render(
        "accuracy.html.jinja",
        document=document,
        filters={
            "percent": accuracy.percent,
            "size": accuracy.size,
            "amount": amount,
            "day": accuracy.day,
            "signed": _signed,
        },
        words=accuracy,
        verdict=[sentence.replace(" %", "\u00a0%") for sentence in accuracy.verdict(document)],
        is_known=accuracy.num_measured(document, "cuda") > 0,
        overall={device: accuracy.overall(document, device) for device in accuracy.DEVICES},
        groups=[(heading, accuracy.grouped(document, group)) for group, heading in accuracy.GROUPS.items()],
        marks=marks,
        scatters=scatters,
        strip=strip,
        sources=_sources(document["published"]["compared"]),
        is_open=len(document["published"]["compared"]) <= OPEN_UP_TO,
    )


def _signed(error: float | None) -> str:
    """How a cell is to look: too little is marked, by more than its sign."""
    return "little" if error is not None and error < 0 else ""


# -- published numbers, source by source -------------------------------------------------------------------------------


def _sources(compared: Sequence[Document]) -> list[Document]:
    """The comparisons of each source, with what is said of several of them said once."""
    by_source: dict[str, list[Document]] = {}
    for one in compared:
        by_source.setdefault(one["source"], []).append(one)
    return [_source(name, rows) for name, rows in by_source.items()]


def _source(name: str, rows: list[Document]) -> Document:
    notes: dict[tuple[str, str], int] = {}
    references: dict[tuple[str, str], int] = {}
    lines = []
    for row in rows:
        note = ("; ".join(row["unknown"]), row["explanation"])
        number = notes.setdefault(note, len(notes) + 1) if any(note) else None
        reference = references.setdefault((row["source_ref"], row["date"]), len(references) + 1)
        lines.append((row, number, reference))
    errors = [row["error"] for row in rows if row["comparison"] == "value"]
    spread = f"{accuracy.percent(min(errors))} to {accuracy.percent(max(errors))}" if errors else "bounds alone"
    return {
        "name": name,
        "summary": f"{plural(len(rows), 'number')}, {spread}",
        "rows": lines,
        "notes": list(notes),
        "references": list(references),
        "has_explained": any(row["explained_error"] is not None for row in rows),
    }
