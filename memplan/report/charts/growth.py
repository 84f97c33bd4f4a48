"""How memory grows with the length and with the micro-batch: its kinds at the peak, stacked, around the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing, plain_axes
from memplan.report.charts.legend import add_legend, areas, legend_height, usable
from memplan.report.charts.plans import REST, SMALL, WIDTH, in_order, look_of
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = dict[str, Any]

AXES_HEIGHT, FOOT = 190, 42
"""Pixels: of the areas, and of what stands below them."""


def by_length(growth: Mapping[str, Any], usable_bytes: int | None, palette: Palette = SCREEN) -> Chart:
    """Against the length; `growth` as `memplan.report.beside.growth_document` has it."""
    named = ("length", "Memory at the peak against the length", "tokens per sequence")
    return _growth(growth["by_length"], growth["seq_len"], named, usable_bytes, palette)


def by_micro_batch(growth: Mapping[str, Any], usable_bytes: int | None, palette: Palette = SCREEN) -> Chart:
    """Against the micro-batch."""
    named = ("micro-batch", "Memory at the peak against the micro-batch", "micro-batch")
    return _growth(growth["by_micro_batch"], growth["micro_batch_size"], named, usable_bytes, palette)


def kinds_of(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Kinds that are more than small at one of the points, in the order in which they are stacked."""
    found: dict[str, None] = {}
    for point in points:
        whole = sum(point["bytes_by_kind"].values())
        found |= dict.fromkeys(kind for kind, num in point["bytes_by_kind"].items() if num >= SMALL * whole)
    return in_order(found)


def bytes_of(point: Mapping[str, Any], kinds: Sequence[str]) -> list[int]:
    """Bytes of the kinds, then those of all others."""
    by_kind = point["bytes_by_kind"]
    shown = [by_kind.get(kind, 0) for kind in kinds]
    return [*shown, sum(by_kind.values()) - sum(shown)]


def _growth(
    points: Sequence[Mapping[str, Any]],
    own: int,
    named: tuple[str, str, str],
    usable_bytes: int | None,
    palette: Palette,
) -> Chart:
    name, title, axis = named
    kinds = kinds_of(points)
    rows = [bytes_of(point, kinds) for point in points]
    sizes = [point["size"] for point in points]
    stacked = [*kinds, REST] if any(row[-1] for row in rows) else kinds
    marker: Any = {"marker": "v", "color": palette.ink, "markersize": 8}
    entries = [*areas(stacked, palette), Line2D([], [], linestyle="none", label="here", **marker)]
    entries += [] if usable_bytes is None else [usable(usable_bytes, palette)]
    height = AXES_HEIGHT + FOOT + legend_height(len(entries)) + 6
    with drawing():
        figure = canvas(WIDTH, height)
        axes = figure.add_axes((0.09, FOOT / height, 0.88, AXES_HEIGHT / height))
        drawn = axes.stackplot(sizes, [[row[n] / GIB for row in rows] for n in range(len(stacked))], linewidth=0.4)
        for kind, area in zip(stacked, drawn, strict=True):
            area.set(**look_of(kind, palette))
        at = sum(rows[sizes.index(own)]) / GIB
        axes.vlines(own, 0, at, color=palette.ink, linewidth=1.2)
        axes.plot([own], [at], clip_on=False, zorder=4, **marker)
        if usable_bytes is not None:
            axes.axhline(usable_bytes / GIB, color=palette.ink, linewidth=1.5, dashes=(4, 3))
        most = max(sum(row) for row in rows)
        axes.set(xlim=(sizes[0], sizes[-1]), ylim=(0, 1.08 * max(most, usable_bytes or 0) / GIB))
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xlabel(axis, fontsize=10, color=palette.ink)
        axes.set_ylabel("GiB", fontsize=10, color=palette.ink)
        plain_axes(axes, palette)
        add_legend(figure, entries, palette)
        return Chart(name, title, said_of(points, own, axis, usable_bytes), figure)


def said_of(points: Sequence[Mapping[str, Any]], own: int, axis: str, usable_bytes: int | None) -> str:
    """From where to where it goes, and up to which point it is within the card."""
    whole = {point["size"]: sum(point["bytes_by_kind"].values()) for point in points}
    first, last = min(whole), max(whole)
    text = (
        f"From {format_bytes(whole[first])} at {axis} {first:,} to {format_bytes(whole[last])} at {last:,}; "
        f"{format_bytes(whole[own])} at {own:,} here."
    )
    if usable_bytes is None:
        return text
    within = [size for size, num in whole.items() if num <= usable_bytes]
    usable = f"the {format_bytes(usable_bytes)} of the card"
    return f"{text} {f'Up to {max(within):,} it is within' if within else 'Nowhere is it within'} {usable}."
