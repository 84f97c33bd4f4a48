"""The charts of a plan: what the memory is made of, how a step goes through it, and what would change it.

Each takes plain data (`memplan.report.document`).  Kinds of memory have a colour and a hatch each, and every chart says
its conclusion in words.  Left out: the numbers themselves, which a page has in tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing, plain_axes
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    Document = dict[str, Any]

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
    "the rest": (5, ""),
}
"""Kind of memory -> which of the shades its area has, and which hatch; others look as temporary ones do."""

MOST_LEVERS = 10
LEAST_ROOM = 0.1
"""Share of the width that the name of a part takes."""
WIDTH = 640
NAMES_IN_A_ROW = 4
"""Kinds in a line of a legend."""


def look_of(kind: str, palette: Palette) -> Document:
    """How the area of a kind of memory is filled."""
    shade, hatch = HATCHES.get(kind, HATCHES["temporary"])
    return {"facecolor": palette.shades[shade], "hatch": hatch, "edgecolor": palette.paper}


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
        rows = -(-len(parts) // NAMES_IN_A_ROW)
        height = 76 + 20 * rows
        figure = canvas(WIDTH, height)
        axes = figure.add_axes((0.02, (36 + 20 * rows) / height, 0.96, 36 / height))
        start = 0.0
        for kind, num in parts:
            axes.barh(0, num / GIB, left=start, linewidth=0.8, label=named(kind), **look_of(kind, palette))
            start += num / GIB
        _legend(figure, palette)
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


def _legend(figure: Figure, palette: Palette) -> None:
    """The kinds below the drawing, beside the way their areas look."""
    figure.legend(
        loc="lower center",
        ncols=NAMES_IN_A_ROW,
        frameon=False,
        fontsize=10,
        labelcolor=palette.ink,
        handlelength=2.2,
        handleheight=1.1,
        borderpad=0,
        borderaxespad=0,
    )


def _said(parts: Sequence[tuple[str, int]], peak: int, usable_bytes: int | None) -> str:
    listed = ", ".join(f"{named(kind)} {format_bytes(num)}" for kind, num in parts)
    against = "" if usable_bytes is None else f" of {format_bytes(usable_bytes)} usable"
    return f"{format_bytes(peak)}{against}: {listed}."


def timeline(
    kinds: Sequence[str],
    points: Sequence[Sequence[int]],
    marks: Sequence[Mapping[str, Any]],
    usable_bytes: int | None,
    palette: Palette = SCREEN,
) -> Chart:
    """Allocated bytes by kind over a run, stacked, in the order of events.

    Args:
        kinds: The kinds of memory.
        points: For each point its place in the order of events, and the bytes of every kind.
        marks: Where parts of the run begin: `at` (a place) and `name`.
        usable_bytes: Of the card; None without one.
        palette: Its colours.
    """
    order = sorted(kinds, key=lambda kind: [*HATCHES, kind].index(kind))
    totals = [sum(point[1:]) for point in points]
    peak = max(totals)
    with drawing():
        figure = canvas(WIDTH, 260)
        axes = figure.add_axes((0.08, 0.13, 0.9, 0.78))
        places = [point[0] for point in points]
        drawn = axes.stackplot(
            places,
            [[point[1 + kinds.index(kind)] / GIB for point in points] for kind in order],
            linewidth=0.4,
            step="post",
        )
        for kind, area in zip(order, drawn, strict=True):
            area.set(**look_of(kind, palette))
        at = places[totals.index(peak)]
        axes.plot([at], [peak / GIB], marker="v", color=palette.ink, markersize=7, clip_on=False)
        if usable_bytes is not None and usable_bytes < 2.5 * peak:
            axes.axhline(usable_bytes / GIB, color=palette.ink, linewidth=1.2, dashes=(4, 3))
        top = max(peak, usable_bytes if usable_bytes is not None and usable_bytes < 2.5 * peak else 0)
        axes.set(xlim=(places[0], places[-1]), ylim=(0, 1.08 * top / GIB))
        for mark in marks:
            axes.axvline(mark["at"], color=palette.faint, linewidth=0.7)
        named = _apart(marks, places[0], places[-1])
        axes.set_xticks([mark["at"] for mark in named], [mark["name"] for mark in named], ha="left")
        axes.set_ylabel("GiB", fontsize=10, color=palette.ink)
        plain_axes(axes, palette)
        said = f"The highest point, {format_bytes(peak)} of tensors, comes in the {_part_at(marks, at)}."
        return Chart("timeline", "Tensors over the first two steps", said, figure)


def _apart(marks: Sequence[Mapping[str, Any]], first: int, last: int) -> list[Mapping[str, Any]]:
    """The marks whose names have room until the next one begins, or until the end."""
    ends = [*(mark["at"] for mark in marks[1:]), last]
    room = [end - mark["at"] for mark, end in zip(marks, ends, strict=True)]
    return [mark for mark, space in zip(marks, room, strict=True) if space > LEAST_ROOM * (last - first)]


def _part_at(marks: Sequence[Mapping[str, Any]], at: int) -> str:
    names = [mark["name"] for mark in marks if mark["at"] <= at]
    return names[-1] if names else "run"


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
