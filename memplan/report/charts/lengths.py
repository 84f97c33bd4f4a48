"""How lengths are spread: bars of the histogram, the cumulative curve, and where candidates for the maximum stand.

Bars are of one width, the last one too where it holds whatever is longer than the others: there the axis is another
one, and hatched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing, plain_axes
from memplan.report.charts.legend import legend_height
from memplan.report.charts.plans import WIDTH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Document = dict[str, Any]

AXES_HEIGHT, FOOT, LINE = 220, 42, 15
"""Pixels: of the bars, of what stands below them, of a line of names above them."""
NAME_WIDTH = 62
"""Pixels that the name of a candidate takes; nearer ones stand on lines of their own."""
LINES = 6
"""Of names, at most; what finds no room on them is a line without a name, and stands in the table."""

CANDIDATE: dict[str, Any] = {"linewidth": 1.2, "dashes": (3, 2)}
CHOSEN: dict[str, Any] = {"linewidth": 2.2}

MOST_SAID = 9
"""Candidates whose shares are said in words; of more, some."""


def spread(document: Mapping[str, Any], palette: Palette = SCREEN, *, chosen: int | None = None) -> Chart:
    """The chart of a document of `memplan.report.lengths`, or of the data of a plan.

    Args:
        document: Histogram, cumulative curve, candidates and quantiles.
        palette: What it is drawn for.
        chosen: The candidate that a plan cuts at.
    """
    bins, candidates = document["histogram"], [one["max_len"] for one in document["candidates"]]
    places = [_place(one, bins) for one in candidates]
    across = 0.82 * WIDTH / len(bins)
    lines = _lines([place * across for place in places])
    names = LINE * (max(line for line in lines if line is not None) + 1) + 6
    height = AXES_HEIGHT + FOOT + names + legend_height(3)
    with drawing():
        figure = canvas(WIDTH, height)
        box = (0.09, FOOT / height, 0.82, AXES_HEIGHT / height)
        axes = figure.add_axes(box)
        _bars(axes, bins, palette)
        _curve(figure.add_axes(box), document, palette)
        for line, place, one in zip(lines, places, candidates, strict=True):
            axes.axvline(place, color=palette.ink, zorder=3, clip_on=False, **(CHOSEN if one == chosen else CANDIDATE))
            if line is None:
                continue
            beyond = " →" if one > bins[-1]["to"] else ""
            y = 1 + (5 + line * LINE) / AXES_HEIGHT
            where: Any = {"transform": axes.get_xaxis_transform(), "ha": "center", "parse_math": False}
            where |= {"fontweight": "bold"} if one == chosen else {}
            axes.text(place, y, f"{one:,}{beyond}", fontsize=9, color=palette.ink, **where)
        _legend(figure, palette, is_chosen=chosen is not None)
        return Chart("lengths", "How long the records are", said_of(document, chosen=chosen), figure)


def _bars(axes: Axes, bins: Sequence[Mapping[str, Any]], palette: Palette) -> None:
    last = is_wider(bins)
    nums = [one["num"] for one in bins]
    look: Any = {"color": palette.shades[4], "edgecolor": palette.paper, "linewidth": 0}
    drawn = axes.bar(np.arange(len(bins)) + 0.5, nums, 0.92, **look)
    if last:
        drawn[-1].set(hatch="///", linewidth=0.5)
    edges = [bins[0]["over"], *(one["to"] for one in bins)]
    step = 1 if len(bins) <= 8 else 2
    shown = [n for n in range(len(edges)) if n % step == 0 and not (last and n == len(edges) - 2)] + [len(edges) - 1]
    axes.set_xticks(sorted(set(shown)), [f"{edges[n]:,}" for n in sorted(set(shown))])
    axes.set(xlim=(0, len(bins)), ylim=(0, 1.05 * max(nums)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    wider = f"; the last bar: above {bins[-1]['over']:,}" if last else ""
    axes.set_xlabel(f"tokens of a record{wider}", fontsize=10, color=palette.ink)
    axes.set_ylabel("records", fontsize=10, color=palette.ink)
    plain_axes(axes, palette)


def _curve(axes: Axes, document: Mapping[str, Any], palette: Palette) -> None:
    bins = document["histogram"]
    share_by_tokens = {0: 0.0} | {one["num_tokens"]: one["share"] for one in document["cumulative"]}
    share_by_tokens |= {one["to"]: one["share"] for one in bins}
    points = sorted(one for one in share_by_tokens.items() if one[0] <= bins[-1]["to"])
    places, shares = [_place(num, bins) for num, _ in points], [100 * share for _, share in points]
    axes.plot(places, shares, color=palette.cpu, linewidth=2)
    axes.set(xlim=(0, len(bins)), ylim=(0, 105))
    axes.set_xticks([])
    axes.yaxis.set_ticks_position("right")
    axes.yaxis.set_label_position("right")
    axes.set_yticks(range(0, 101, 25), [f"{share} %" for share in range(0, 101, 25)])
    axes.set_ylabel("records up to here", fontsize=10, color=palette.ink)
    plain_axes(axes, palette)
    axes.spines["right"].set(visible=True)


def _place(num_tokens: int, bins: Sequence[Mapping[str, Any]]) -> float:
    """Where on the axis, in bins: each takes 1; what is beyond the longest stands at the right edge."""
    edges = [bins[0]["over"], *(one["to"] for one in bins)]
    return float(np.interp(num_tokens, edges, range(len(edges))))


def is_wider(bins: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last bin is wider than the others."""
    return len(bins) > 1 and bins[-1]["to"] - bins[-1]["over"] > bins[0]["to"] - bins[0]["over"]


def _lines(places: Sequence[float]) -> list[int | None]:
    """On which line each name stands, from below: the first that is free there; None: on none.

    Args:
        places: In pixels, ascending.
    """
    ends = [float("-inf")] * LINES
    found: list[int | None] = []
    for place in places:
        line = next((n for n, end in enumerate(ends) if place - end >= NAME_WIDTH), None)
        if line is not None:
            ends[line] = place
        found.append(line)
    return found


def _legend(figure: Figure, palette: Palette, *, is_chosen: bool) -> None:
    plan = [Line2D([], [], color=palette.ink, label="the plan's maximum", **CHOSEN)] if is_chosen else []
    others = "others" if is_chosen else "candidates for the maximum"
    entries = [
        Patch(label="records", facecolor=palette.shades[4]),
        Line2D([], [], color=palette.cpu, linewidth=2, label="share up to here"),
        *plan,
        Line2D([], [], color=palette.ink, label=others, **CANDIDATE),
    ]
    figure.legend(
        handles=entries,
        loc="upper center",
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        labelcolor=palette.ink,
        borderpad=0,
    )


def said_of(document: Mapping[str, Any], *, chosen: int | None = None) -> str:
    """The middle, the longest, and what each candidate leaves whole."""
    by_share = {one["share"]: one["num_tokens"] for one in document["quantiles"]}
    share = {one["num_tokens"]: one["share"] for one in document["cumulative"]}
    candidates = [one["max_len"] for one in document["candidates"]]
    places = np.unique(np.linspace(0, len(candidates) - 1, min(len(candidates), MOST_SAID)).round().astype(int))
    whole = ", ".join(f"{candidates[n]:,}: {100 * share[candidates[n]]:.1f} %" for n in places)
    return (
        f"Half of the records have up to {by_share[0.5]:,} tokens, the longest {by_share[1.0]:,}. "
        f"Share that a maximum leaves whole: {whole}.{'' if chosen is None else f' The plan cuts at {chosen:,}.'}"
    )
