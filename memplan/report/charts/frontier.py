"""What memory buys in time: everything that reaches the batch, and the line of what no other beats in both.

Filled: on the line.  Hollow: dominated.  A cross: it does not fit with the margin.  The diamond is the page's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing, plain_axes
from memplan.report.charts.legend import add_legend, usable
from memplan.report.charts.plans import WIDTH
from memplan.units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = dict[str, Any]

HEIGHT = 300
FAR_BEYOND = 1.6
"""Times what the card has."""


def frontier(found: Sequence[Mapping[str, Any]], usable_bytes: int, palette: Palette = SCREEN) -> Chart:
    """Memory against the time of a step.

    Args:
        found: At least one, as `memplan.report.beside.frontier_document` has them.
        usable_bytes: Of the card.
        palette: Its colours.
    """
    with drawing():
        figure = canvas(WIDTH, HEIGHT)
        axes = figure.add_axes((0.1, 0.15, 0.86, 0.74))
        points = [one for one in found if one["peak_process_bytes"] <= highest_drawn(found, usable_bytes)]
        line = sorted((one["step_time_s"], one["peak_process_bytes"] / GIB) for one in points if one["is_undominated"])
        axes.plot(*zip(*line, strict=True), color=palette.gpu, linewidth=1.2, drawstyle="steps-post", zorder=2)
        for label, look in looks(palette).items():
            some = [one for one in points if label_of(one) == label]
            axes.plot(
                [one["step_time_s"] for one in some],
                [one["peak_process_bytes"] / GIB for one in some],
                linestyle="none",
                zorder=5 if label == PLAN else 3,
                **look,
            )
        axes.axhline(usable_bytes / GIB, color=palette.ink, linewidth=1.5, dashes=(4, 3))
        most = max(usable_bytes, *(one["peak_process_bytes"] for one in points)) / GIB
        axes.set(ylim=(0, 1.06 * most))
        axes.margins(x=0.06)
        axes.set_xlabel("seconds per step, at least", fontsize=10, color=palette.ink)
        axes.set_ylabel("GiB", fontsize=10, color=palette.ink)
        plain_axes(axes, palette)
        present = {label_of(one) for one in points}
        entries = [
            Line2D([], [], linestyle="none", label=label, **look)
            for label, look in looks(palette).items()
            if label in present
        ]
        add_legend(figure, [*entries, usable(usable_bytes, palette)], palette)
        return Chart("frontier", "Memory against step time", said_of(found, usable_bytes), figure)


def highest_drawn(points: Sequence[Mapping[str, Any]], usable_bytes: int) -> float:
    """Bytes above which nothing is drawn: far beyond the card; the smallest and the plan are drawn in any case."""
    nearest = min(one["peak_process_bytes"] for one in points)
    own = [one["peak_process_bytes"] for one in points if one["is_plan"]]
    return float(max(FAR_BEYOND * usable_bytes, FAR_BEYOND * nearest, *own))


PLAN, BEST, DOMINATED, TOO_LARGE = "here", "not dominated", "dominated", "does not fit with the margin"


def looks(palette: Palette) -> dict[str, Document]:
    """What is said of a point, and how it is drawn."""
    size = {"markersize": 7}
    return {
        PLAN: {"marker": "D", "color": palette.good, "markeredgecolor": palette.ink, "markersize": 10},
        BEST: {"marker": "o", "color": palette.gpu, **size},
        DOMINATED: {"marker": "o", "markerfacecolor": "none", "markeredgecolor": palette.gpu, **size},
        TOO_LARGE: {"marker": "x", "color": palette.bad, "markeredgewidth": 1.6, **size},
    }


def label_of(point: Mapping[str, Any]) -> str:
    """What is said of it."""
    if point["is_plan"]:
        return PLAN
    if not point["fits"]:
        return TOO_LARGE
    return BEST if point["is_undominated"] else DOMINATED


def said_of(points: Sequence[Mapping[str, Any]], usable_bytes: int) -> str:
    """The ends of the line as far as the card goes, where the plan is, and how many are not drawn."""
    text = f"{len(points)} configurations that reach the batch"
    fitting = [one for one in points if one["fits"]]
    if fitting:
        fast = min(fitting, key=lambda one: one["step_time_s"])
        small = min(fitting, key=lambda one: one["peak_process_bytes"])
        text += f", {len(fitting)} of them fit at the least that the allocator holds"
        text += f": the fastest takes {_both(fast)}, the smallest {_both(small)}"
    own = next((one for one in points if one["is_plan"]), None)
    text += "." if own is None else f"; here {_both(own)}."
    far = sum(one["peak_process_bytes"] > highest_drawn(points, usable_bytes) for one in points)
    return f"{text} {far} that take far more than the card has are not drawn." if far else text


def _both(point: Mapping[str, Any]) -> str:
    return f"{format_bytes(point['peak_process_bytes'])} and {format_seconds(point['step_time_s'])} per step"
