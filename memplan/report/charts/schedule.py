"""One optimizer step as a picture: which samples go to which GPU, where gradients add up and meet, what updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.patches import Rectangle

from memplan.report.charts.drawing import SCREEN, Chart, Palette, canvas, drawing
from memplan.report.charts.plans import WIDTH
from memplan.report.layout import plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    Document = dict[str, Any]

LINE, TOP, FOOT, EDGE, LAST = 52, 34, 30, 62, 104
"""Pixels: of a GPU; above and below; for the names of the GPUs; for the update."""
GAP = 0.16
"""Between boxes, in shares of a column."""
MOST_NAMED = 3
"""Samples that are listed one by one."""


def schedule(step: Mapping[str, Any], palette: Palette = SCREEN) -> Chart:
    """The first optimizer step; `step` as `memplan.report.beside.schedule_document` has it."""
    gpus, micro_steps = step["gpus"], step["micro_steps"]
    height = TOP + LINE * (len(gpus) + has_gap(gpus) * 0.5) + FOOT
    with drawing():
        figure = canvas(WIDTH, height)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        column = (WIDTH - EDGE - LAST) / (len(micro_steps) + has_gap(micro_steps) * 0.5)
        lines = _places(gpus, TOP, LINE)
        columns = _places(micro_steps, EDGE, column)
        for gpu, y in lines.items():
            _text(axes, EDGE - 8, y + LINE / 2, f"GPU {gpu}", palette, ha="right")
        for micro, x in columns.items():
            _text(axes, x + column * (1 - GAP) / 2, TOP / 2, f"micro-step {micro + 1}", palette)
        for one in step["shares"]:
            box = (columns[one["micro_step"]], lines[one["gpu"]], column * (1 - GAP), LINE * 0.76)
            _share(axes, box, one, step, palette)
        _between(axes, step, columns, lines, column, palette)
        _update(axes, step, columns, lines, column, palette)
        _text(axes, EDGE, height - FOOT / 2, f"{equation_of(step)}: the samples of one update", palette, ha="left")
        return Chart("schedule", "One optimizer step", said_of(step), figure)


def has_gap(numbers: list[int]) -> bool:
    """Whether some are left out before the last."""
    return len(numbers) > 1 and numbers[-1] != len(numbers) - 1


def _places(numbers: list[int], start: float, step: float) -> dict[int, float]:
    """Where each begins; before the last there may be half a place for an ellipsis."""
    shift = 0.5 * has_gap(numbers)
    return {one: start + step * (n + shift * (n == len(numbers) - 1)) for n, one in enumerate(numbers)}


def samples_text(share: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    """``0, 2, 4``, or ``0, 2 … 30``."""
    every, first, last = step["num_gpus"], share["first"], share["last"]
    if step["micro_batch_size"] <= MOST_NAMED:
        return ", ".join(f"{one:,}" for one in range(first, last + 1, every))
    return f"{first:,}, {first + every:,} … {last:,}"


def equation_of(step: Mapping[str, Any]) -> str:
    """``4 x 8 x 2 GPUs = 64``."""
    return (
        f"{step['micro_batch_size']:,} in a micro-batch x {plural(step['num_micro_steps'], 'micro-step')} x "
        f"{plural(step['num_gpus'], 'GPU')} = {step['global_batch_size']:,}"
    )


def _text(axes: Axes, x: float, y: float, text: str, palette: Palette, ha: str = "center", size: float = 9) -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=palette.ink)


def _share(
    axes: Axes,
    box: tuple[float, float, float, float],
    share: Mapping[str, Any],
    step: Mapping[str, Any],
    palette: Palette,
) -> None:
    x, y, width, height = box
    is_last = share["micro_step"] == step["num_micro_steps"] - 1
    axes.add_patch(
        Rectangle(
            (x, y),
            width,
            height,
            facecolor=palette.band,
            edgecolor=palette.good if is_last and step["num_gpus"] > 1 else palette.gpu,
            linewidth=2 if is_last and step["num_gpus"] > 1 else 1,
        )
    )
    _text(axes, x + width / 2, y + height * 0.34, samples_text(share, step), palette)
    said = "gradients" if share["micro_step"] == 0 else "+ gradients"
    _text(axes, x + width / 2, y + height * 0.72, said, palette, size=9)


def _between(
    axes: Axes,
    step: Mapping[str, Any],
    columns: Mapping[int, float],
    lines: Mapping[int, float],
    column: float,
    palette: Palette,
) -> None:
    """Arrows from micro-step to micro-step, and ellipses where some are left out."""
    for number, x in enumerate(columns.values()):
        if number:
            before = list(columns.values())[number - 1] + column * (1 - GAP)
            for y in lines.values():
                _arrow(axes, (before, y + LINE * 0.38), (x, y + LINE * 0.38), palette)
    if has_gap(step["micro_steps"]):
        left_out = list(columns.values())[-1] - column * (0.25 + GAP / 2)
        _text(axes, left_out, TOP / 2, "…", palette)
    if has_gap(step["gpus"]):
        _text(axes, EDGE - 22, list(lines.values())[-1] - LINE * 0.3, "…", palette)


def _update(
    axes: Axes,
    step: Mapping[str, Any],
    columns: Mapping[int, float],
    lines: Mapping[int, float],
    column: float,
    palette: Palette,
) -> None:
    """What comes after the last micro-step: gradients of all GPUs meet, and the optimizer takes its step."""
    end = list(columns.values())[-1] + column * (1 - GAP)
    x, width = WIDTH - LAST + 14, LAST - 22
    top, bottom = min(lines.values()), max(lines.values()) + LINE * 0.76
    for y in lines.values():
        _arrow(axes, (end, y + LINE * 0.38), (x, y + LINE * 0.38), palette)
    axes.add_patch(Rectangle((x, top), width, bottom - top, facecolor="none", edgecolor=palette.good, linewidth=2))
    middle = (top + bottom) / 2
    if step["num_gpus"] > 1:
        _text(axes, x + width / 2, middle - 9, "all-reduce,", palette)
        _text(axes, x + width / 2, middle + 7, "then update", palette)
    else:
        _text(axes, x + width / 2, middle, "update", palette)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], palette: Palette) -> None:
    axes.annotate(
        "", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": palette.ink, "shrinkA": 1, "shrinkB": 1}
    )


def said_of(step: Mapping[str, Any]) -> str:
    """The schedule in words."""
    text = f"{equation_of(step)}."
    if step["num_micro_steps"] > 1:
        text += f" Gradients add up over {step['num_micro_steps']:,} micro-steps; the optimizer updates after the last."
    else:
        text += " The optimizer updates after the one micro-step."
    if step["num_gpus"] > 1:
        text += " The GPUs average their gradients in the last micro-step alone."
    return text
