"""The charts of a plan: what the memory is made of, and what would change it.

Each takes plain data (`memplan.report.document`).  Kinds of memory have a colour and a hatch each, and every chart says
its conclusion in words.  Left out: the numbers themselves, which a page has in tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing, plain_axes
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Document = dict[str, Any]

REST = "the rest"
"""Kinds that are small, together."""
SMALL = 0.01
"""Share of a peak below which a kind is small."""

HATCHES = {
    "parameter": (0, ""),
    "gradient": (1, "///"),
    "optimizer_state": (2, "\\\\\\"),
    "activation": (3, "xx"),
    "loss": (7, "++"),
    "temporary": (4, "---"),
    "allocator": (5, "||"),
    "context": (6, "-\\"),
    "workspace": (6, "///"),
    REST: (5, ""),
}
"""Kind of memory -> which of the shades its area has, and which hatch; others look as temporary ones do."""

STROKES_BY_HATCH = {
    "/": "M0 12L12 0M-3 3L3 -3M9 15L15 9",
    "\\": "M0 0L12 12M-3 9L3 15M9 -3L15 3",
    "x": "M0 12L12 0M0 0L12 12",
    "+": "M6 0V12M0 6H12",
    "-": "M0 3H12M0 6H12M0 9H12",
    "|": "M3 0V12M6 0V12M9 0V12",
}
"""A character of a hatch -> its lines in a square of 12 x 12."""

MOST_LEVERS = 10
WIDTH = 640


def look_of(kind: str, palette: Palette) -> Document:
    """How the area of a kind of memory is filled."""
    shade, hatch = HATCHES.get(kind, HATCHES["temporary"])
    return {"facecolor": palette.shades[shade], "hatch": hatch, "edgecolor": palette.paper}


def swatch_of(kind: str) -> tuple[str, str]:
    """How a legend shows a kind of memory: the shade in the stylesheet, and the lines in a square of 12 x 12."""
    shade, hatch = HATCHES.get(kind, HATCHES["temporary"])
    return f"var(--shade-{shade + 1})", "".join(STROKES_BY_HATCH[one] for one in dict.fromkeys(hatch))


def in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds in the order of the hatches, in which they are stacked; others come last, as they came."""
    return sorted(kinds, key=lambda kind: [*HATCHES, kind].index(kind))


def legend_of(kinds: Iterable[str]) -> list[str]:
    """The kinds that look different, in the order in which they are drawn; others look as temporary ones do."""
    there = set(kinds)
    return [kind for kind in HATCHES if kind in there or (kind == "temporary" and there - HATCHES.keys())]


def breakdown(
    parts: Sequence[tuple[str, int]], usable_bytes: int | None, bound_bytes: int | None, palette: Palette = SCREEN
) -> Chart:
    """One bar of the kinds of memory at the peak, in GiB, against what the card has to use.

    Args:
        parts: (kind, bytes), which add up to the peak of the process.
        usable_bytes: Of the card; None without one.
        bound_bytes: The upper bound that has to fit; None where there is none.
        palette: Its colours.
    """
    peak = sum(num for _, num in parts)
    most = max(peak, usable_bytes or 0, bound_bytes or 0) / GIB
    with drawing():
        figure = canvas(WIDTH, 92)
        axes = figure.add_axes((0.02, 0.36, 0.96, 0.42))
        start = 0.0
        for kind, num in parts:
            axes.barh(0, num / GIB, left=start, linewidth=0.8, **look_of(kind, palette))
            start += num / GIB
        if bound_bytes is not None and bound_bytes > peak:
            axes.barh(
                0,
                (bound_bytes - peak) / GIB,
                left=start,
                fill=False,
                edgecolor=palette.ink,
                hatch="//",
                linewidth=0.6,
                height=0.5,
            )
        if usable_bytes is not None:
            axes.axvline(usable_bytes / GIB, color=palette.paper, linewidth=4)  # seen on bars of any colour
            axes.axvline(usable_bytes / GIB, color=palette.ink, linewidth=1.5, dashes=(4, 3))
        axes.set(xlim=(0, most * 1.02 or 1.0), ylim=(-0.5, 0.5))
        axes.set_yticks([])
        axes.set_xlabel("GiB", fontsize=10, color=palette.ink)
        plain_axes(axes, palette)
        axes.spines["left"].set_visible(False)
        return Chart("breakdown", "What the memory is made of at the peak", _said(parts, peak, usable_bytes), figure)


def named(kind: str) -> str:
    """A kind of memory in words."""
    return kind.replace("_", " ")


def _said(parts: Sequence[tuple[str, int]], peak: int, usable_bytes: int | None) -> str:
    listed = ", ".join(f"{named(kind)} {format_bytes(num)}" for kind, num in parts)
    against = "" if usable_bytes is None else f" of {format_bytes(usable_bytes)} usable"
    return f"{format_bytes(peak)}{against}: {listed}."


def levers(found: Sequence[Mapping[str, Any]], palette: Palette = SCREEN) -> Chart:
    """What single changes free (to the left) or take (to the right), the largest first."""
    shown = sorted(found, key=lambda lever: -abs(lever["delta_bytes"]))[:MOST_LEVERS]
    height = 26 * len(shown) + 46
    with drawing():
        figure = canvas(WIDTH, height)
        axes = figure.add_axes((0.4, 38 / height, 0.57, 1 - 46 / height))
        for number, lever in enumerate(shown):
            look = look_of("parameter" if lever["same_update"] else "gradient", palette)
            axes.barh(number, lever["delta_bytes"] / GIB, height=0.7, **look)
        axes.axvline(0, color=palette.ink, linewidth=1)
        axes.set_yticks(range(len(shown)), [lever["flag"] for lever in shown])
        axes.set(ylim=(len(shown) - 0.5, -0.5))
        axes.set_xlabel("GiB of tensors at the peak", fontsize=10, color=palette.ink)
        plain_axes(axes, palette)
        best = shown[0]
        said = f"{best['flag']} changes the peak most, by {format_bytes(abs(best['delta_bytes']))}."
        return Chart("levers", "Single changes to the plan", said, figure)
