"""How the axes of a sweep are read: numbers, lists and ranges.

8                one
1,2,4            some
1..64            all from 1 to 64
1..64x2          1, 2, 4 and so on up to 64
512..4096+512    512, 1024, 1536 and so on up to 4096
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING

from memplan.cli.values import quoted
from memplan.errors import UsageError
from memplan.specs.training import LARGEST_COUNT

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_NUMBERS = 100_000
"""Of one axis."""

SPELLINGS = "Say for example 8, 1,2,4, 1..64, 1..64x2 (doubling) or 512..4096+512 (in steps)."


def read_axis(text: str, flag: str) -> tuple[int, ...]:
    """The numbers that a text stands for, ascending.

    Raises:
        UsageError: it stands for none, for one of them twice, or for too many.
    """
    ranges = [_read_part(part, text, flag) for part in text.split(",")]
    if sum(map(len, ranges)) > MOST_NUMBERS:
        raise UsageError(
            f"{flag} {quoted(text)} are {sum(map(len, ranges)):,} numbers.", f"Name {MOST_NUMBERS:,} at most."
        )
    numbers = sorted(chain.from_iterable(ranges))
    twice = next((one for one, other in pairwise(numbers) if one == other), None)
    if twice is not None:
        raise UsageError(f"{flag} {quoted(text)} names {twice:,} more than once.", "Name each number once.")
    return tuple(numbers)


def _read_part(part: str, text: str, flag: str) -> Sequence[int]:
    """A number or a range."""
    first, is_range, rest = part.partition("..")
    if not is_range:
        return (_number(part, text, flag),)
    last, by, step = rest.partition("x") if "x" in rest else rest.partition("+")
    start, stop = _number(first, text, flag), _number(last, text, flag)
    if start > stop:
        raise UsageError(
            f"{flag} {quoted(part)} runs backwards.", f"Put the smaller number first: {stop}..{start}{by}{step}."
        )
    if not by:
        return range(start, stop + 1)
    number = _number(step, text, flag)
    return range(start, stop + 1, number) if by == "+" else _powers(start, stop, number, flag, part)


def _powers(start: int, stop: int, factor: int, flag: str, part: str) -> list[int]:
    if factor == 1:
        raise UsageError(f"{flag} {quoted(part)} does not grow.", f"The factor is 2 or more: {start}..{stop}x2.")
    found = [start]
    while found[-1] * factor <= stop:
        found.append(found[-1] * factor)
    return found


def _number(number: str, text: str, flag: str) -> int:
    """A whole number from 1 on, without a sign; a fault says how an axis is written."""
    plain = number.strip()
    digits = plain.replace("_", "")
    said = f"{flag} is {quoted(text)}" if plain == text.strip() else f"{flag} is {quoted(text)}, with {quoted(plain)}"
    if not plain:
        raise UsageError(f"{flag} is {quoted(text)}, where a number is missing.", SPELLINGS)
    if not (digits.isascii() and digits.isdigit()):
        raise UsageError(f"{said}, no whole number.", SPELLINGS)
    if len(digits) > len(str(LARGEST_COUNT)) or not 1 <= int(digits) <= LARGEST_COUNT:
        raise UsageError(f"{said}.", f"Numbers are from 1 to {LARGEST_COUNT:,}.")
    return int(digits)
