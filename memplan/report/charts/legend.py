"""What the areas of a chart are: the kinds of memory with their fillings, in lines that fit the width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from memplan.report.charts.drawing import DOTS_PER_INCH, Chart, drawing
from memplan.report.charts.plans import look_of
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    from memplan.report.charts.drawing import Palette

COLUMNS = 5
LINE_HEIGHT = 18


def legend_height(num: int) -> int:
    """Pixels that a legend of so many entries takes."""
    return LINE_HEIGHT * -(-num // COLUMNS) + 4


def areas(kinds: Sequence[str], palette: Palette) -> list[Artist]:
    """An entry for each kind of memory."""
    return [Patch(label=kind.replace("_", " "), linewidth=0.5, **look_of(kind, palette)) for kind in kinds]


def usable(num_bytes: int, palette: Palette) -> Artist:
    """The entry of the line up to which the card has memory."""
    label = f"usable: {format_bytes(num_bytes)}"
    return Line2D([], [], color=palette.ink, linewidth=1.5, dashes=(3, 2), label=label)


def add_legend(figure: Figure, entries: Sequence[Artist], palette: Palette) -> None:
    """At the top of the figure, column by column."""
    figure.legend(
        handles=list(entries),
        loc="upper center",
        ncols=COLUMNS,
        frameon=False,
        fontsize=9,
        labelcolor=palette.ink,
        borderpad=0,
        columnspacing=1.2,
        handlelength=1.6,
        handletextpad=0.5,
    )


def titled(chart: Chart, subject: str, palette: Palette) -> Chart:
    """The chart with its title and what it is about on top, for which the figure becomes higher."""
    figure = chart.figure
    width, height = figure.get_size_inches()
    higher = height + 2 * LINE_HEIGHT / DOTS_PER_INCH
    figure.set_size_inches(width, higher)
    for axes in figure.axes:
        left, bottom, across, up = axes.get_position().bounds
        axes.set_position((left, bottom * height / higher, across, up * height / higher))
    for legend in figure.legends:
        legend.set_bbox_to_anchor((0, 0, 1, height / higher), transform=figure.transFigure)
    with drawing():
        style: Any = {"color": palette.ink, "va": "top", "parse_math": False}
        figure.text(0.01, 1 - 3 / DOTS_PER_INCH / higher, chart.title, fontsize=11, weight="bold", **style)
        figure.text(0.01, 1 - LINE_HEIGHT / DOTS_PER_INCH / higher, subject, fontsize=9, **style)
    return chart


def above(chart: Chart, entries: Sequence[Artist], palette: Palette) -> Chart:
    """The chart with a legend on top of it, for which the figure becomes higher."""
    figure = chart.figure
    width, height = figure.get_size_inches()
    higher = height + (legend_height(len(entries)) + 6) / DOTS_PER_INCH
    figure.set_size_inches(width, higher)
    for axes in figure.axes:
        left, bottom, across, up = axes.get_position().bounds
        axes.set_position((left, bottom * height / higher, across, up * height / higher))
    with drawing():
        add_legend(figure, entries, palette)
    return chart
