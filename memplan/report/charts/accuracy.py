"""How far are predictions from measurements?  Predicted against measured, and the signed errors, as charts.

Shapes say the same as colours.  Left out: the numbers, which the page has in tables.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from memplan.report import accuracy
from memplan.report.charts.drawing import PAGE, VARIABLES, Chart, canvas, drawing, plain_axes
from memplan.report.layout import plural
from memplan.specs.values import NamedTuple
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from matplotlib.axes import Axes

    Document = dict[str, Any]

BUDGET_PERCENT = (1, 3)
"""The bands around zero: what allocated bytes on a GPU are meant to stay within, at the median and always."""

ERROR_TICKS = (0.3, 1, 3, 10, 30, 100, 300, 1000, 10_000)
"""Percent, on either side of zero."""


class Mark(NamedTuple):
    """How one kind of point looks: shape and colour, or shape and no filling."""

    name: str
    shape: str
    """A marker of matplotlib."""
    colour: str
    is_filled: bool
    path: str
    """The same shape for the legend, in a square of 12 x 12."""

    @property
    def css(self) -> str:
        """Its colour in the stylesheet."""
        return VARIABLES[self.colour]


MARKS = {
    "cuda": Mark("measured on a GPU", "o", PAGE.gpu, True, "M6 2a4 4 0 1 0 .01 0z"),
    "cpu": Mark("measured on a CPU: tensors alone", "s", PAGE.cpu, True, "M2.5 2.5h7v7h-7z"),
    "value": Mark("published by others, on a GPU", "^", PAGE.published, True, "M6 2l4.5 8h-9z"),
    "floor": Mark("published; memplan's number is a lower bound", "v", PAGE.published, False, "M6 10L1.5 2h9z"),
    "ceiling": Mark("published; memplan's number is an upper bound", "^", PAGE.published, False, "M6 2l4.5 8h-9z"),
}
"""Device of a measurement, or comparison of a published number -> its mark."""


class Point(NamedTuple):
    """One number, predicted and measured."""

    kind: str
    """Key of `MARKS`."""
    quantity: str
    measured: float
    predicted: float
    error: float


def points_of(document: Document) -> list[Point]:
    """Everything that can be drawn, own measurements last so that they lie on top."""
    published = [
        Point(one["comparison"], one["quantity"], one["measured"], one["predicted"], one["error"])
        for one in document["published"]["compared"]
    ]
    own = [
        Point(one["device"], one["quantity"], one["measured"], one["predicted"], one["error"])
        for one in document["points"]
    ]
    return published + own


def errors_of(document: Document) -> tuple[Chart | None, list[Mark]]:
    """The signed errors of a document or its summary, and what the marks mean; None without points."""
    points = [one for one in points_of(document) if one.kind not in accuracy.BOUNDS]
    with drawing():
        strip = _strip(points)
    return strip, [mark for kind, mark in MARKS.items() if any(one.kind == kind for one in points)]


def charts_of(points: Sequence[Point]) -> tuple[list[tuple[str, str, Chart]], Chart | None, list[Mark]]:
    """The scatters, the strip and the marks in them, whatever the reader's own settings of matplotlib are."""
    with drawing():
        scatters, strip = list(_scatters(points)), _strip(points)
    return scatters, strip, [mark for kind, mark in MARKS.items() if any(point.kind == kind for point in points)]


def _scatters(points: Sequence[Point]) -> Iterator[tuple[str, str, Chart]]:
    """Name, meaning and chart for each quantity of which there is anything."""
    for quantity in accuracy.QUANTITIES:
        some = [one for one in points if one.quantity == quantity and one.measured > 0 and one.predicted > 0]
        if some:
            name = accuracy.NAME_BY_QUANTITY[quantity].capitalize()
            yield name, accuracy.MEANING_BY_QUANTITY[quantity], _scatter(quantity, some)


def _scatter(quantity: str, points: Sequence[Point]) -> Chart:
    figure = canvas(300, 280)
    axes = figure.add_axes((0.2, 0.15, 0.77, 0.82))
    low, high = _limits([value for point in points for value in (point.measured, point.predicted)])
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.plot([low, high], [low, high], color=PAGE.ink, linewidth=1, dashes=(4, 3), zorder=1)
    for kind, mark in MARKS.items():
        some = [point for point in points if point.kind == kind]
        _draw(axes, mark, [point.measured for point in some], [point.predicted for point in some])
    ticks = _ticks(quantity, low, high)
    labels = [amount(tick, quantity).replace(".00", "").replace(".0 ", " ") for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.set_xlabel("measured", fontsize=10, color=PAGE.ink)
    axes.set_ylabel("predicted", fontsize=10, color=PAGE.ink)
    plain_axes(axes, PAGE)
    axes.grid(visible=True, color=PAGE.faint, linewidth=0.5)
    name = accuracy.NAME_BY_QUANTITY[quantity]
    return Chart(quantity[0], f"Predicted against measured: {name}", _described(points), figure)


def _described(points: Sequence[Point]) -> str:
    """The conclusion of a drawing, in words."""
    parts = []
    for kind, mark in MARKS.items():
        errors = [point.error for point in points if point.kind == kind]
        if errors:
            worst = f"{accuracy.percent(min(errors))} to {accuracy.percent(max(errors))}"
            parts.append(f"{plural(len(errors), 'point')} {mark.name}, errors from {worst}")
    return f"{'; '.join(parts)}."


def _strip(points: Sequence[Point]) -> Chart | None:
    """Signed errors, a row for each quantity and kind; lower bounds have none."""
    rows = [
        (f"{accuracy.NAME_BY_QUANTITY[quantity]}, {short}", kind, errors)
        for quantity in accuracy.QUANTITIES
        for kind, short in (("cuda", "GPU"), ("cpu", "CPU"), ("value", "published"))
        if (errors := [100 * point.error for point in points if (point.quantity, point.kind) == (quantity, kind)])
    ]
    if not rows:
        return None
    height = 44 * len(rows) + 40
    figure = canvas(330, height)
    axes = figure.add_axes((0.07, 36 / height, 0.86, 1 - 42 / height))
    most = max(3.0, *(abs(error) for _, _, errors in rows for error in errors)) * 1.3
    axes.set_xscale("symlog", linthresh=1, linscale=1)
    axes.set(xlim=(-most, most), ylim=(len(rows) - 0.5, -0.5))
    for width in reversed(BUDGET_PERCENT):
        axes.axvspan(-width, width, color=PAGE.band, linewidth=0, zorder=0)
        for side in (-width, width):
            axes.axvline(side, color=PAGE.ink, linewidth=0.6, dashes=(1, 2) if width == BUDGET_PERCENT[0] else (5, 3))
    axes.axvline(0, color=PAGE.ink, linewidth=1)
    in_row: Document = {"transform": axes.get_yaxis_transform(), "va": "top", "color": PAGE.ink}
    for number, (label, kind, errors) in enumerate(rows):
        axes.text(0.01, number - 0.4, f"{label} ({len(errors):,})", **in_row)
        _draw(axes, MARKS[kind], errors, [number + 0.18 + 0.24 * _jitter(n) for n in range(len(errors))])
        if number:
            axes.axhline(number - 0.5, color=PAGE.faint, linewidth=0.5)
    ticks = _error_ticks(most)
    axes.set_xticks(ticks, [f"{tick:+g} %" if tick else "0" for tick in ticks])
    axes.set_yticks([])
    for x, text in ((0.25, "\u2190 predicted too little"), (0.75, "predicted too much \u2192")):
        axes.text(x, len(rows) - 0.5 + 20 / 44, text, **in_row, ha="center")
    plain_axes(axes, PAGE)
    told = _described([one for one in points if one.kind not in accuracy.BOUNDS])
    return Chart("errors", "Signed errors", told, figure)


def _error_ticks(most: float) -> list[float]:
    """Zero, and on either side as many ticks as can be told apart."""
    inside = [tick for tick in ERROR_TICKS if 1 <= tick <= most]
    inside = inside if len(inside) <= 2 else [1, *inside[2::2]]
    return [*(-tick for tick in reversed(inside)), 0, *inside]


def _jitter(number: int) -> float:
    """-1 to 1, spread evenly over any run of numbers: multiples of the golden ratio, modulo one."""
    return 2 * (number * 0.6180339887498949 % 1) - 1


def _draw(axes: Axes, mark: Mark, x: Sequence[float], y: Sequence[float]) -> None:
    if x:
        axes.plot(
            x,
            y,
            linestyle="none",
            marker=mark.shape,
            markersize=5.5,
            markerfacecolor=mark.colour if mark.is_filled else PAGE.paper,
            markeredgecolor=PAGE.paper if mark.is_filled else mark.colour,
            markeredgewidth=0.5 if mark.is_filled else 1.2,
            clip_on=False,
            zorder=3,
        )


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """Both ends of an axis, with some air, and a factor of 8 apart at least."""
    values = list(values)
    low, high = min(values) / 1.3, max(values) * 1.3
    air = max(1.0, math.sqrt(8 * low / high))
    return low / air, high * air


def _ticks(quantity: str, low: float, high: float) -> list[float]:
    """At most five round numbers from `low` to `high`: powers of two for bytes, 1, 2 and 5 times 10^n for seconds."""
    if quantity == "step_time":
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**ten for ten in tens for digit in (1, 2, 5)]
    else:
        found = [2.0**two for two in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    found = [tick for tick in found if low <= tick <= high]
    return found[:: -(-len(found) // 5)]


def amount(value: float, quantity: str) -> str:
    """Bytes or seconds, in words."""
    return format_seconds(value) if quantity == "step_time" else format_bytes(round(value))
