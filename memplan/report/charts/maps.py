"""Which micro-batches and lengths fit: a panel for each way of checkpointing, a cell for each pair.

A cell has its bytes, a symbol and a colour; the plan's has a frame.  On a page the same is a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.patches import Rectangle

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing
from memplan.report.sweep import LEGEND, SYMBOL_BY_VERDICT
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes

    Document = dict[str, Any]

CELL_WIDTH, CELL_HEIGHT, EDGE, GAP, HEADING, FOOT = 54, 26, 48, 10, 30, 46
"""Pixels: of a cell; left and right of the cells, above and below them."""
LEAST_COLUMNS = 5
"""Cells whose width a panel has at the least, so that its words have room."""


def map_of_sizes(maps: Sequence[Mapping[str, Any]], plan: Mapping[str, Any] | None, palette: Palette = SCREEN) -> Chart:
    """The maps, two beside each other.

    Args:
        maps: At least one, as `memplan.report.beside.maps_document` has them.
        plan: The setup whose cell gets a frame; None: no cell does.
        palette: Its colours.
    """
    columns = min(2, len(maps))
    lines = -(-len(maps) // columns)
    panel = HEADING + CELL_HEIGHT * len(maps[0]["micro_batch_sizes"]) + FOOT
    across = EDGE + CELL_WIDTH * max(len(maps[0]["seq_lens"]), LEAST_COLUMNS) + GAP
    width, height = across * columns, panel * lines + 24
    with drawing():
        figure = canvas(width, height)
        figure.text(0.5, 6 / height, legend_of(maps, plan), ha="center", fontsize=9, color=palette.ink)
        for number, one in enumerate(maps):
            left = across * (number % columns) + EDGE
            bottom = height - panel * (number // columns + 1) + FOOT
            size = (CELL_WIDTH * len(one["seq_lens"]) / width, (panel - HEADING - FOOT) / height)
            axes = figure.add_axes((left / width, bottom / height, *size))
            _panel(axes, one, plan, palette)
        return Chart("map", "Micro-batches and lengths that fit", said_of(maps), figure)


def _panel(axes: Axes, one: Mapping[str, Any], plan: Mapping[str, Any] | None, palette: Palette) -> None:
    batches, lengths = one["micro_batch_sizes"], one["seq_lens"]
    colours = {"fits": palette.fits, "tight": palette.tight, "oom": palette.oom, None: palette.paper}
    for row, column, point in cells(one):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colours[point["verdict"]], edgecolor=palette.paper))
        axes.text(column + 0.5, row + 0.5, cell_text(point), ha="center", va="center", fontsize=8.5, color=palette.ink)
        if is_plan(one, row, column, plan):
            frame = Rectangle((column, row), 1, 1, fill=False, edgecolor=palette.ink, linewidth=2)
            axes.add_patch(frame).set(clip_on=False, zorder=3)
    axes.set(xlim=(0, len(lengths)), ylim=(len(batches), 0))
    axes.set_xticks([n + 0.5 for n in range(len(lengths))], [f"{length:,}" for length in lengths])
    axes.set_yticks([n + 0.5 for n in range(len(batches))], [f"{batch:,}" for batch in batches])
    axes.tick_params(length=0, labelsize=8.5, labelcolor=palette.ink)
    axes.set_frame_on(False)
    axes.set_title(f"checkpointing {one['activation_checkpointing']}", fontsize=10, color=palette.ink)
    axes.set_xlabel("tokens per sequence", fontsize=9, color=palette.ink)
    axes.set_ylabel("micro-batch", fontsize=9, color=palette.ink)


def cells(one: Mapping[str, Any]) -> Iterator[tuple[int, int, Document]]:
    """(position of the micro-batch, of the length, point) of every cell."""
    num = len(one["seq_lens"])
    for position, point in enumerate(one["points"]):
        yield *divmod(position, num), point


def is_plan(one: Mapping[str, Any], row: int, column: int, plan: Mapping[str, Any] | None) -> bool:
    """Whether this is the plan's own cell."""
    if plan is None:
        return False
    here = (one["activation_checkpointing"], one["micro_batch_sizes"][row], one["seq_lens"][column])
    return here == tuple(plan[key] for key in ("activation_checkpointing", "micro_batch_size", "seq_len"))


def cell_text(point: Mapping[str, Any]) -> str:
    """``12.3 +``: GiB with three digits, and the symbol of the verdict."""
    number = point["peak_process_bytes"] / GIB
    return f"{number:,.{1 if number < 100 else 0}f}{SYMBOL_BY_VERDICT[point['verdict']]}"


def legend_of(maps: Sequence[Mapping[str, Any]], plan: Mapping[str, Any] | None) -> str:
    """What is in the cells."""
    verdicts = {point["verdict"] for one in maps for point in one["points"]}
    text = "GiB of the process" if verdicts == {None} else f"GiB of the process    {LEGEND}"
    return text if plan is None else f"{text}    frame: here"


def said_of(maps: Sequence[Mapping[str, Any]]) -> str:
    """How many cells of each panel fit; without a card, between which bytes they lie."""
    points = [point for one in maps for point in one["points"]]
    if any(point["verdict"] is None for point in points):
        numbers = [point["peak_process_bytes"] for point in points]
        return f"From {format_bytes(min(numbers))} to {format_bytes(max(numbers))}."
    counts = []
    for one in maps:
        num = sum(point["verdict"] == "fits" for point in one["points"])
        counts.append(f"{num} of {len(one['points'])} with checkpointing {one['activation_checkpointing']}")
    return f"Sizes that fit: {', '.join(counts)}."
