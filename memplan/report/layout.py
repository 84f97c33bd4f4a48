"""Text in 80 columns: wrapped paragraphs, aligned columns, bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 80
"""Columns that a result may take, on any terminal and in any pipe."""

LEAST_CELL = 8
"""Characters that are left of a cell, however wide the others are."""
LEAST_OF_TWO = 20
"""The same where another column can be cut, too."""

FULL, EMPTY = "█", "░"
ASCII = {ord(FULL): "#", ord(EMPTY): "."}
"""One character for one, so that columns stay aligned."""


def wrap(text: str, *, first: str = "", rest: str | None = None, width: int = WIDTH) -> list[str]:
    """`text` in lines of at most `width` columns, the first begun with `first`, the others with `rest`.

    Without `rest` they are indented by as much as `first` is wide.  A word that is wider than a line is cut.
    """
    rest = " " * len(first) if rest is None else rest
    lines, line = [], first
    empty = True
    for word in text.split():
        left = word
        if not empty and len(line) + 1 + len(left) > width:
            lines.append(line)
            line, empty = rest, True
        while len(line) + len(left) + (not empty) > width:
            room = width - len(line)
            lines.append(line + left[:room])
            line, left = rest, left[room:]
        line += left if empty else f" {left}"
        empty = False
    return [*lines, line.rstrip()]


def bar(share: float, cells: int) -> str:
    """A bar of `cells` characters, filled to `share`; something is never shown as nothing, nor less than all as all."""
    filled = round(max(0.0, min(1.0, share)) * cells)
    if 0 < share < 1:
        filled = min(max(filled, 1), cells - 1)
    return FULL * filled + EMPTY * (cells - filled)


def columns(
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    gap: int = 2,
    indent: int = 2,
    shrink: int = 0,
    shrink_too: int | None = None,
    keep_end: bool = False,
) -> list[str]:
    """`rows` in aligned columns, those in `left` to the left and the others to the right.

    Where the whole is too wide, cells of column `shrink` are cut in the middle, or with `keep_end` at their start; so
    are those of `shrink_too` where that would leave too little of them.
    """
    if not rows:
        return []
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    over = indent + sum(widths) + gap * (len(widths) - 1) - WIDTH
    for column, least in ((shrink, LEAST_CELL if shrink_too is None else LEAST_OF_TWO), (shrink_too, LEAST_CELL)):
        if over > 0 and column is not None:
            cut = min(over, max(widths[column] - least, 0))
            widths[column] -= cut
            over -= cut
    lines = []
    for row in rows:
        cells = [
            f"{clip(cell, widths[n], keep_end=keep_end):{'<' if n in left else '>'}{widths[n]}}"
            for n, cell in enumerate(row)
        ]
        lines.append((" " * indent + (" " * gap).join(cells)).rstrip())
    return lines


def clip(text: str, width: int, *, keep_end: bool = False) -> str:
    """`text`, its middle (or with `keep_end` its start) replaced by two points where it is wider than `width`."""
    if len(text) <= width:
        return text
    tail = width - 2 if keep_end else (width - 2) // 2
    return f"{text[: width - 2 - tail]}..{text[len(text) - tail :]}"


def plural(number: int, noun: str) -> str:
    """``1 GPU``, ``2 GPUs``, ``65,536 tokens``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
