"""The charts of a plan: what the memory is made of, how a step goes through it, and what would change it.

Each takes documents (`memplan.report.document`) and gives SVG for the inside of a page.  Colours are coded twice: kinds
of memory have a hatch each, and every chart says its conclusion in words.

Left out: the numbers themselves, which the page has in tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from memplan.report.drawing import FAINT, INK, PAPER, Shade, drawing, plain_axes, svg_of
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = dict[str, Any]

SHADES = {
    "parameter": Shade("#0a0021", ""),
    "gradient": Shade("#0a0022", "////"),
    "optimizer_state": Shade("#0a0023", "\\\\\\\\"),
    "activation": Shade("#0a0024", "...."),
    "loss": Shade("#0a0028", "++++"),
    "temporary": Shade("#0a0025", "xxxx"),
    "allocator": Shade("#0a0026", "----"),
    "context": Shade("#0a0027", "||||"),
}
"""Kind of memory -> how its area looks; others look as temporary ones do."""

MOST_LEVERS = 10
LEAST_ROOM = 0.1
"""Share of the width that the name of a part takes."""
WIDTH = 640


def shade_of(kind: str) -> Shade:
    """How a kind of memory looks."""
    return SHADES.get(kind, SHADES["temporary"])


def breakdown(parts: Sequence[tuple[str, int]], usable_bytes: int | None, bound_bytes: int | None) -> str:
    """One bar of the kinds of memory at the peak, in GiB, against what the card has to use.

    Args:
        parts: (kind, bytes), which add up to the peak of the process.
        usable_bytes: Of the card; None without one.
        bound_bytes: The upper bound that has to fit; None where there is none.
    """
    peak = sum(num for _, num in parts)
    most = max(peak, usable_bytes or 0, bound_bytes or 0) / GIB
    with drawing():
        figure = Figure(figsize=(WIDTH / 72, 92 / 72), dpi=72)
        axes = figure.add_axes((0.02, 0.36, 0.96, 0.42))
        start = 0.0
        for kind, num in parts:
            shade = shade_of(kind)
            axes.barh(0, num / GIB, left=start, color=shade.colour, edgecolor=PAPER, hatch=shade.hatch, linewidth=0.8)
            start += num / GIB
        if bound_bytes is not None and bound_bytes > peak:
            axes.barh(
                0,
                (bound_bytes - peak) / GIB,
                left=start,
                fill=False,
                edgecolor=INK,
                hatch="//",
                linewidth=0.6,
                height=0.5,
            )
        if usable_bytes is not None:
            axes.axvline(usable_bytes / GIB, color=INK, linewidth=1.5, dashes=(4, 3))
        axes.set(xlim=(0, most * 1.02 or 1.0), ylim=(-0.5, 0.5))
        axes.set_yticks([])
        axes.set_xlabel("GiB", fontsize=10, color=INK)
        plain_axes(axes)
        axes.spines["left"].set_visible(False)
        return svg_of(figure, "b", "What the memory is made of at the peak", _said(parts, peak, usable_bytes))


def _said(parts: Sequence[tuple[str, int]], peak: int, usable_bytes: int | None) -> str:
    listed = ", ".join(f"{kind.replace('_', ' ')} {format_bytes(num)}" for kind, num in parts)
    against = "" if usable_bytes is None else f" of {format_bytes(usable_bytes)} usable"
    return f"{format_bytes(peak)}{against}: {listed}."


def step(points: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, Any]], usable_bytes: int | None) -> str:
    """Allocated bytes by kind over a run, stacked, in the order of events.

    Args:
        points: For each place in the order of events the bytes of every kind (`bytes`).
        marks: Where parts of the run begin: `at` (a place) and `name`.
        usable_bytes: Of the card; None without one.
    """
    there = {kind for point in points for kind, num in point["bytes"].items() if num}
    kinds = [*(kind for kind in SHADES if kind in there), *sorted(there - SHADES.keys())]
    totals = [sum(point["bytes"].values()) for point in points]
    peak = max(totals)
    with drawing():
        figure = Figure(figsize=(WIDTH / 72, 260 / 72), dpi=72)
        axes = figure.add_axes((0.08, 0.13, 0.9, 0.78))
        places = [point["at"] for point in points]
        drawn = axes.stackplot(
            places,
            [[point["bytes"].get(kind, 0) / GIB for point in points] for kind in kinds],
            colors=[shade_of(kind).colour for kind in kinds],
            edgecolor=PAPER,
            linewidth=0.4,
            step="post",
        )
        for kind, area in zip(kinds, drawn, strict=True):
            area.set_hatch(shade_of(kind).hatch)
        at = places[totals.index(peak)]
        axes.plot([at], [peak / GIB], marker="v", color=INK, markersize=7, clip_on=False)
        if usable_bytes is not None and usable_bytes < 2.5 * peak:
            axes.axhline(usable_bytes / GIB, color=INK, linewidth=1.2, dashes=(4, 3))
        top = max(peak, usable_bytes if usable_bytes is not None and usable_bytes < 2.5 * peak else 0)
        axes.set(xlim=(places[0], places[-1]), ylim=(0, 1.08 * top / GIB))
        for mark in marks:
            axes.axvline(mark["at"], color=FAINT, linewidth=0.7)
        named = _apart(marks, places[0], places[-1])
        axes.set_xticks([mark["at"] for mark in named], [mark["name"] for mark in named], ha="left")
        axes.set_ylabel("GiB", fontsize=10, color=INK)
        plain_axes(axes)
        said = f"The highest point, {format_bytes(peak)} of tensors, comes in the {_part_at(marks, at)}."
        return svg_of(figure, "t", "Tensors over the first two steps", said)


def _apart(marks: Sequence[Mapping[str, Any]], first: int, last: int) -> list[Mapping[str, Any]]:
    """The marks whose names have room until the next one begins, or until the end."""
    ends = [*(mark["at"] for mark in marks[1:]), last]
    room = [end - mark["at"] for mark, end in zip(marks, ends, strict=True)]
    return [mark for mark, space in zip(marks, room, strict=True) if space > LEAST_ROOM * (last - first)]


def _part_at(marks: Sequence[Mapping[str, Any]], at: int) -> str:
    names = [mark["name"] for mark in marks if mark["at"] <= at]
    return names[-1] if names else "run"


def levers(found: Sequence[Mapping[str, Any]]) -> str:
    """What single changes free (to the left) or take (to the right), the largest first."""
    shown = sorted(found, key=lambda lever: -abs(lever["delta_bytes"]))[:MOST_LEVERS]
    height = 26 * len(shown) + 46
    with drawing():
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        axes = figure.add_axes((0.4, 38 / height, 0.57, 1 - 46 / height))
        for number, lever in enumerate(shown):
            shade = SHADES["parameter" if lever["same_update"] else "gradient"]
            axes.barh(
                number, lever["delta_bytes"] / GIB, color=shade.colour, hatch=shade.hatch, edgecolor=PAPER, height=0.7
            )
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(shown)), [lever["flag"] for lever in shown])
        axes.set(ylim=(len(shown) - 0.5, -0.5))
        axes.set_xlabel("GiB of tensors at the peak", fontsize=10, color=INK)
        plain_axes(axes)
        best = shown[0]
        said = f"{best['flag']} changes the peak most, by {format_bytes(abs(best['delta_bytes']))}."
        return svg_of(figure, "l", "Single changes to the plan", said)
