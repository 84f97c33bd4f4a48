"""The charts of a report document by name: what `memplan report --chart` and the library's `plot_` methods draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError, UsageError, did_you_mean
from memplan.report.charts import frontier, growth, legend, maps, plans, schedule
from memplan.report.charts import lengths as spreads
from memplan.report.charts import timeline as timelines
from memplan.report.charts.drawing import PAGE, SCREEN, Chart, Palette
from memplan.specs.pictured import TRACED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Document = Mapping[str, Any]
    Drawing = Callable[[Document, Palette], Chart]

REASONS = {
    "levers": "there is no single change that memplan prices",
    "data": "it was made without data, --data",
}
"""Part of a plan -> why one has none."""
OF_PLAN = frozenset(REASONS)


def parts_of(ledger: Sequence[Document]) -> list[tuple[str, int]]:
    """(kind, bytes at the peak), the small ones together."""
    by_kind: dict[str, int] = {}
    for row in ledger:
        by_kind[row["kind"]] = by_kind.get(row["kind"], 0) + row["bytes_at_peak"]
    whole = sum(by_kind.values())
    found = [(kind, num) for kind, num in by_kind.items() if num >= plans.SMALL * whole]
    rest = whole - sum(num for _, num in found)
    return [*found, (plans.REST, rest)] if rest else found


def phases_of(measured: Sequence[Document]) -> list[Document]:
    """The phases of all measurements."""
    return [phase for record in measured for phase in record["phases"]]


def shown_of(document: Document) -> Document:
    """The configuration that a report document is about."""
    shown: Document = document["plan"]["best"] or document["plan"]["nearest"]
    return shown


def _usable(document: Document) -> int:
    return int(document["plan"]["gpu"]["usable_bytes"])


def breakdown(
    ledger: Sequence[Document], usable_bytes: int | None, bound_bytes: int | None, palette: Palette = SCREEN
) -> Chart:
    """The breakdown of a ledger; with a legend, which on a page stands beside it."""
    parts = parts_of(ledger)
    bare = plans.breakdown(parts, usable_bytes, bound_bytes, palette)
    return bare if palette is PAGE else _legended(bare, [kind for kind, _ in parts], usable_bytes, palette)


def timeline(
    profile: Document, usable_bytes: int | None, measured: Sequence[Document] = (), palette: Palette = SCREEN
) -> Chart:
    """The timeline of a profile, likewise."""
    bare = timelines.timeline(profile, usable_bytes, measured, palette)
    kinds = [kind for kind in profile["kinds"] if kind in plans.HATCHES]  # others look as temporary ones do
    return bare if palette is PAGE else _legended(bare, kinds, usable_bytes, palette)


def _legended(bare: Chart, kinds: Sequence[str], usable_bytes: int | None, palette: Palette) -> Chart:
    line = [] if usable_bytes is None else [legend.usable(usable_bytes, palette)]
    ordered = plans.in_order(kinds)
    return legend.above(bare, [*legend.areas(ordered, palette), *line], palette)


def _breakdown(document: Document, palette: Palette) -> Chart:
    return breakdown(document["ledger"], _usable(document), shown_of(document)["upper_bound_bytes"], palette)


def _timeline(document: Document, palette: Palette) -> Chart:
    return timeline(document["profile"], _usable(document), phases_of(document["measured"]), palette)


def _map(document: Document, palette: Palette) -> Chart:
    return maps.map_of_sizes(document["maps"], shown_of(document)["setup"], palette)


def _length(document: Document, palette: Palette) -> Chart:
    return growth.by_length(document["growth"], _usable(document), palette)


def _micro_batch(document: Document, palette: Palette) -> Chart:
    return growth.by_micro_batch(document["growth"], _usable(document), palette)


def _frontier(document: Document, palette: Palette) -> Chart:
    return frontier.frontier(document["frontier"], _usable(document), palette)


def _levers(document: Document, palette: Palette) -> Chart:
    return plans.levers(document["plan"]["levers"], palette)


def _schedule(document: Document, palette: Palette) -> Chart:
    return schedule.schedule(document["schedule"], palette)


def _lengths(document: Document, palette: Palette) -> Chart:
    data = document["plan"]["data"]
    return spreads.spread(data, palette, chosen=data["length"]["max_len"])


CHARTS: dict[str, tuple[str, Drawing]] = {
    "breakdown": ("ledger", _breakdown),
    "timeline": ("profile", _timeline),
    "map": ("maps", _map),
    "length": ("growth", _length),
    "micro-batch": ("growth", _micro_batch),
    "frontier": ("frontier", _frontier),
    "levers": ("levers", _levers),
    "schedule": ("schedule", _schedule),
    "lengths": ("data", _lengths),
}
"""Name -> what of the document it draws, and how."""


def check_chart(name: str) -> str:
    """The name, where there is such a chart.

    Raises:
        UsageError: there is none.
    """
    if name not in CHARTS:
        known = f"Known: {', '.join(CHARTS)}."
        raise UsageError(f"There is no chart {name[:40]!r}.", did_you_mean(name, CHARTS, otherwise=known))
    return name


def chart_of(document: Document, name: str, palette: Palette = SCREEN) -> Chart:
    """A chart of a report document.

    Raises:
        UsageError: there is none of this name.
        MemplanError: there is none for this plan, and why.
    """
    needed, draw = CHARTS[check_chart(name)]
    if not _source(document, needed):
        reason = REASONS.get(needed, TRACED)
        raise MemplanError(f"There is no {name} chart of this plan: {reason}.", f"Others: {_others(document)}.")
    return draw(document, palette)


def has_chart(document: Document, name: str) -> bool:
    """Whether there is one for this plan."""
    needed, _ = CHARTS[name]
    return bool(_source(document, needed))


def _source(document: Document, needed: str) -> Any:
    """What of a document a chart draws; nothing where it has none."""
    return (document["plan"] if needed in OF_PLAN else document).get(needed)


def _others(document: Document) -> str:
    return ", ".join(name for name in CHARTS if has_chart(document, name))
