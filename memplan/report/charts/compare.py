"""What the memory of several plans is made of: bars on one scale, each against what its card has to use.

Takes plain data.  Left out: the numbers themselves, which a page has in tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing, plain_axes
from memplan.report.charts.plans import REST, SMALL, WIDTH, in_order, look_of
from memplan.report.layout import clip
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

BAR_PIXELS, LEGEND_PIXELS, AXIS_PIXELS = 34, 44, 40
LONGEST_NAME = 34
WHOLE = "not split"
"""The kind of a peak that nobody can split: that of a plan from a file without its model."""


def comparison(
    names: Sequence[str],
    parts: Sequence[Mapping[str, int]],
    usable_bytes: Sequence[int],
    palette: Palette = SCREEN,
) -> Chart:
    """A bar of the kinds of memory at the peak for each plan, in GiB, with a mark where its card ends.

    Args:
        names: Of the plans, the first at the top.
        parts: Kind -> bytes, which add up to the peak of the process.
        usable_bytes: Of the card of each.
        palette: Its colours.
    """
    height = BAR_PIXELS * len(names) + LEGEND_PIXELS + AXIS_PIXELS
    parts = _without_small(parts)
    most = max([*usable_bytes, *(sum(part.values()) for part in parts)]) / GIB
    with drawing():
        figure = canvas(WIDTH, height)
        bottom, top = AXIS_PIXELS / height, 1 - LEGEND_PIXELS / height
        axes = figure.add_axes((0.36, bottom, 0.62, top - bottom))
        for kind in _kinds(parts):
            _draw(axes, kind, parts, palette)
        for row, usable in enumerate(usable_bytes):
            axes.plot([usable / GIB] * 2, [row - 0.46, row + 0.46], color=palette.ink, linewidth=2, dashes=(2, 1))
        axes.set(xlim=(0, 1.02 * most or 1.0), ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), [clip(name, LONGEST_NAME) for name in names], parse_math=False)
        axes.set_xlabel("GiB", fontsize=10, color=palette.ink)
        plain_axes(axes, palette)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", ncols=4, frameon=False, fontsize=9, labelcolor=palette.ink, borderpad=0
        )
        return Chart("compare", "What the memory of each plan is made of", _said(names, parts, usable_bytes), figure)


def _without_small(parts: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """The same with the small ones together."""
    large = {kind for part in parts for kind, num in part.items() if num >= SMALL * sum(part.values())}
    rests = [sum(num for kind, num in part.items() if kind not in large) for part in parts]
    return [
        {kind: num for kind, num in [*part.items(), (REST, rest)] if kind in large or (kind == REST and rest)}
        for part, rest in zip(parts, rests, strict=True)
    ]


def _kinds(parts: Sequence[Mapping[str, int]]) -> list[str]:
    """Those that any plan has, in the order of the hatches."""
    found = dict.fromkeys(kind for part in parts for kind in part)
    return in_order(found)


def _draw(axes: Axes, kind: str, parts: Sequence[Mapping[str, int]], palette: Palette) -> None:
    """The part of one kind in all bars; kinds before it in the order of the hatches are to its left."""
    order = _kinds(parts)
    before = order[: order.index(kind)]
    starts = [sum(part.get(one, 0) for one in before) / GIB for part in parts]
    plain = {"facecolor": palette.band, "edgecolor": palette.ink}
    look = plain if kind in {WHOLE, REST} else look_of(kind, palette)
    widths = [part.get(kind, 0) / GIB for part in parts]
    axes.barh(range(len(parts)), widths, left=starts, height=0.62, linewidth=0.8, label=kind.replace("_", " "), **look)


def _said(names: Sequence[str], parts: Sequence[Mapping[str, int]], usable_bytes: Sequence[int]) -> str:
    return " ".join(
        f"{name}: {format_bytes(sum(part.values()))} of {format_bytes(usable)} usable."
        for name, part, usable in zip(names, parts, usable_bytes, strict=True)
    )
