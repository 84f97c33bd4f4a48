"""How memory goes up and down in the first step and in a later one, with the highest point marked and named.

Places are numbers of events, as an allocator sees them.  Left out: seconds.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing, plain_axes
from memplan.report.charts.plans import WIDTH, in_order, look_of
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    Document = Mapping[str, Any]

HEIGHT = 280
LETTER = 6.2
"""Pixels that a letter of the smallest text takes, about."""
FAR = 2.5
"""Times as high as the peak: a capacity beyond this is not drawn, as nothing would be seen of the rest."""
STEPS = ("first step", "every later step")
NEXT = 0.15
"""Share of the width up to which a name stays on the right of its mark."""


def timeline(
    profile: Document, usable_bytes: int | None, measured: Sequence[Document] = (), palette: Palette = SCREEN
) -> Chart:
    """Allocated bytes by kind over two steps, stacked.

    Args:
        profile: Kinds, points, parts and the highest point, as in `memplan.report.study.profile_document`.
        usable_bytes: Of the card; None without one.
        measured: Peaks of phases that were measured: `step`, `instants` (those of the phase), `peak_allocated_bytes`.
        palette: Its colours.
    """
    summit, points = profile["summit"], profile["points"]
    peak = summit["num_bytes"]
    drawn_line = usable_bytes if usable_bytes is not None and usable_bytes < FAR * peak else None
    top = max(peak, drawn_line or 0, *(one["peak_allocated_bytes"] for one in measured)) * 1.12 / GIB
    with drawing():
        figure = canvas(WIDTH, HEIGHT)
        axes = figure.add_axes((0.08, 0.1, 0.9, 0.79))
        axes.set(xlim=(points[0][0], points[-1][0]), ylim=(0, top))
        _areas(axes, profile, palette)
        if drawn_line is not None:
            axes.axhline(drawn_line / GIB, color=palette.ink, linewidth=1.2, dashes=(4, 3))
        _parts(axes, profile["parts"], points[-1][0], palette)
        for one in measured:
            for start, stop in _spans(profile["parts"], one, points[-1][0]):
                axes.hlines(one["peak_allocated_bytes"] / GIB, start, stop, color=palette.bad, linewidth=2)
        _mark_summit(axes, summit, (points[-1][0] - points[0][0]), palette)
        axes.set_ylabel("GiB of tensors", fontsize=10, color=palette.ink)
        plain_axes(axes, palette)
        return Chart("timeline", "Tensors over the first two steps", summit_said(summit), figure)


def summit_said(summit: Document) -> str:
    """The highest point, in a sentence."""
    who = " of ".join(part for part in (summit["tensor"], summit["module"]) if part)
    when = "the first step" if summit["step"] == 0 else STEPS[1]
    high = format_bytes(summit["num_bytes"])
    return f"The highest point of these steps is in the {summit['instant']} of {when}: {high}, when {who} is allocated."


def _areas(axes: Axes, profile: Document, palette: Palette) -> None:
    kinds, points = profile["kinds"], profile["points"]
    order = in_order(kinds)
    heights = [[point[1 + kinds.index(kind)] / GIB for point in points] for kind in order]
    areas = axes.stackplot([point[0] for point in points], heights, linewidth=0, step="post")
    for kind, area in zip(order, areas, strict=True):
        area.set(**look_of(kind, palette))


def _parts(axes: Axes, parts: Sequence[Document], end: int, palette: Palette) -> None:
    """Where the parts begin, named where there is room; above them the steps."""
    starts = [*(part["at"] for part in parts), end]
    pixels = 0.9 * WIDTH / (end - starts[0])
    named = [
        (part["at"], part["name"])
        for part, (start, stop) in zip(parts, pairwise(starts), strict=True)
        if (stop - start) * pixels > LETTER * len(part["name"])
    ]
    for part in parts:
        axes.axvline(part["at"], color=palette.faint, linewidth=0.7)
    axes.set_xticks([at for at, _ in named], [name for _, name in named], ha="left")
    for step, name in enumerate(STEPS):
        at = next((part["at"] for part in parts if part["step"] == step and part["name"] != parts[0]["name"]), None)
        if at is not None:
            place: Any = {"xytext": (4, 2), "textcoords": "offset points", "xycoords": axes.get_xaxis_transform()}
            axes.annotate(name, (at, 1.0), color=palette.ink, fontsize=10, **place)
            axes.axvline(at, ymax=1.08, color=palette.ink, linewidth=1, clip_on=False)


def _spans(parts: Sequence[Document], one: Document, end: int) -> list[tuple[int, int]]:
    """From where to where the parts reach that a measured phase is made of."""
    starts = [*(part["at"] for part in parts), end]
    return [
        (start, stop)
        for part, (start, stop) in zip(parts, pairwise(starts), strict=True)
        if part["step"] == one["step"] and part["name"] in one["instants"]
    ]


def _mark_summit(axes: Axes, summit: Document, width: int, palette: Palette) -> None:
    at, high = summit["at"], summit["num_bytes"] / GIB
    axes.plot([at], [high], marker="v", color=palette.ink, markersize=7, clip_on=False)
    to_the_left = at > (1 - 2 * NEXT) * width
    text = f"{format_bytes(summit['num_bytes'])}, {summit['instant']}"
    axes.annotate(
        text,
        (at, high),
        xytext=(-8 if to_the_left else 8, 6),
        textcoords="offset points",
        ha="right" if to_the_left else "left",
        color=palette.ink,
        fontsize=10,
    )
