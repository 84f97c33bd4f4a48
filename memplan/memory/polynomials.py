"""From traces at a few small sizes to the bytes at any size, exactly.

A storage of a training step holds a number of bytes that is a polynomial in the micro-batch b and the length s:

    bytes = c0 + c1 b + c2 s + c3 b s + c4 s^2 + c5 b s^2          (linear in b, at most quadratic in s)

Where a loss compares all examples of a micro-batch, c6 b^2 comes to it.

Kernels that work on tiles round the length up to their multiple: such a storage is a polynomial in the rounded length.

Six sizes, two micro-batches by three lengths, determine it, and a third micro-batch the last of these; every further
size has to agree, or the program is not of this form and that is said.  All arithmetic is exact (fractions);
coefficients of real programs come out whole.

Left out: programs that take another path at another size (a window, a mask, a micro-batch of one): they have another
sequence of events, which is found out when sizes are compared.
"""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    Point = tuple[int, int]

NUM_COEFFICIENTS = 7
LINEAR_IN_BATCH = NUM_COEFFICIENTS - 1
"""Coefficients of what has no b^2."""

TILES = (1, 16, 32, 128)
"""Multiples up to which kernels round a length (attention's), the plain one first."""


class Polynomial(NamedTuple):
    """Bytes (or FLOPs) as a function of micro-batch and length."""

    coefficients: tuple[Fraction, ...]
    """Of 1, b, s, b s, s^2, b s^2 and b^2."""
    tile: int = 1
    """Up to whose multiple the length is rounded first."""

    def value(self, b: Any, s: Any) -> Any:
        """At one size (exact int) or at arrays of sizes."""
        s = rounded_up(s, self.tile)
        terms = (1, b, s, b * s, s * s, b * s * s, b * b)
        zero = b * s * 0
        if all(c.denominator == 1 for c in self.coefficients):
            return sum((int(c) * term for c, term in zip(self.coefficients, terms, strict=True) if c), start=zero)
        common = 1
        for c in self.coefficients:
            common = common * c.denominator // _gcd(common, c.denominator)
        whole = sum((int(c * common) * term for c, term in zip(self.coefficients, terms, strict=True) if c), start=zero)
        return whole // common

    def formula(self) -> str:
        """As text: ``512 + 8192*b*s``."""
        s = "s" if self.tile == 1 else f"[s to {self.tile}]"
        names = ("", "b", s, f"b*{s}", f"{s}^2", f"b*{s}^2", "b^2")
        terms = [f"{c}*{name}" if name else str(c) for c, name in zip(self.coefficients, names, strict=True) if c]
        return " + ".join(terms) or "0"


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def rounded_up(s: Any, tile: int) -> Any:
    """`s`, or the next multiple of `tile`."""
    return s if tile == 1 else -(-s // tile) * tile


def monomials(b: int, s: int) -> tuple[int, ...]:
    """1, b, s, b s, s^2, b s^2, b^2."""
    return (1, b, s, b * s, s * s, b * s * s, b * b)


class Fitter:
    """Fits values at fixed points; equal series of values are fitted once."""

    def __init__(self, points: Sequence[Point]) -> None:
        """The first six of `points` have to be two micro-batches by three lengths; the others are held out.

        A seventh of the first's length, with one more held out, stands for the square of the micro-batch.  Where all
        have the same micro-batch, three lengths determine a polynomial in the length alone.

        Raises:
            MemplanError: too few points, or points that determine nothing.
        """
        self.points = tuple(points)
        one_batch = len({b for b, _ in self.points}) == 1
        squares = len(self.points) > NUM_COEFFICIENTS and self.points[LINEAR_IN_BATCH][1] == self.points[0][1]
        self._terms = (0, 2, 4) if one_batch else tuple(range(NUM_COEFFICIENTS if squares else LINEAR_IN_BATCH))
        if len(self.points) < len(self._terms):
            raise MemplanError("A polynomial needs more sizes.", "Trace at two micro-batches and three lengths.")
        self._inverses = {1: self._inverse_of(1)}
        for tile in TILES[1:]:
            with suppress(MemplanError):  # the sizes are in too few tiles
                self._inverses[tile] = self._inverse_of(tile)
        self._known: dict[tuple[int, ...], Polynomial | None] = {}

    def _inverse_of(self, tile: int) -> list[list[Fraction]]:
        first = self.points[: len(self._terms)]
        return _inverse([[monomials(b, rounded_up(s, tile))[i] for i in self._terms] for b, s in first])

    def fit(self, values: Sequence[int]) -> Polynomial | None:
        """The polynomial through `values`, one a point; None where the held-out ones disagree."""
        key = tuple(values)
        if key not in self._known:
            candidates = (self._through(key, tile) for tile in self._inverses)
            self._known[key] = next((found for found in candidates if self._agrees(found, key)), None)
        return self._known[key]

    def _through(self, values: tuple[int, ...], tile: int) -> Polynomial:
        first = values[: len(self._terms)]
        coefficients = [Fraction(0)] * NUM_COEFFICIENTS
        for i, row in zip(self._terms, self._inverses[tile], strict=True):
            coefficients[i] = sum((r * v for r, v in zip(row, first, strict=True)), Fraction(0))
        return Polynomial(tuple(coefficients), tile)

    def _agrees(self, found: Polynomial, values: tuple[int, ...]) -> bool:
        return all(_exact(found, point) == value for point, value in zip(self.points, values, strict=True))


def _exact(polynomial: Polynomial, point: Point) -> Fraction:
    b, s = point
    terms = zip(polynomial.coefficients, monomials(b, rounded_up(s, polynomial.tile)), strict=True)
    return sum((c * m for c, m in terms), Fraction(0))


def _inverse(matrix: Sequence[Sequence[int]]) -> list[list[Fraction]]:
    """By Gauss and Jordan, exactly."""
    size = len(matrix)
    rows = [[Fraction(x) for x in row] + [Fraction(int(i == j)) for j in range(size)] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next((i for i in range(column, size) if rows[i][column]), None)
        if pivot is None:
            raise MemplanError("These sizes determine no polynomial.", "Take two micro-batches by three lengths.")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        lead = rows[column][column]
        rows[column] = [x / lead for x in rows[column]]
        for i in range(size):
            if i != column and rows[i][column]:
                factor = rows[i][column]
                rows[i] = [x - factor * y for x, y in zip(rows[i], rows[column], strict=True)]
    return [row[size:] for row in rows]
