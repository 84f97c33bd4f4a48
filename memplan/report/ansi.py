"""Colour, where a terminal wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import TextIO

CODE_BY_STYLE = {"": "", "title": "1", "good": "1;32", "bad": "1;31", "faint": "2"}
"""Style of a line -> its SGR parameters (ECMA-48, 8.3.117)."""


class Line(NamedTuple):
    """A line of text and how it is to look."""

    text: str
    style: str = ""
    """Key of `CODE_BY_STYLE`."""


def join(lines: Iterable[Line], *, colour: bool) -> str:
    """The lines as one text that ends with a line feed."""
    return "".join(f"{_painted(line) if colour else line.text}\n" for line in lines)


def _painted(line: Line) -> str:
    code = CODE_BY_STYLE[line.style]
    return f"\x1b[{code}m{line.text}\x1b[0m" if code and line.text else line.text


def wants_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether to colour: https://no-color.org and https://force-color.org, else on a terminal that is not dumb."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return stream.isatty() and environment.get("TERM") != "dumb"
