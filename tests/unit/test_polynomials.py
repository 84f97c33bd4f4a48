"""Polynomials in micro-batch and length, from values at a few sizes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import MemplanError
from memplan.memory.polynomials import Fitter, Polynomial, monomials

POINTS = [(2, 16), (3, 16), (2, 24), (3, 24), (2, 40), (3, 40), (4, 32), (5, 56)]


@given(coefficients=st.lists(st.integers(-(10**6), 10**6), min_size=6, max_size=6))
def test_any_such_polynomial_is_found_from_six_sizes(coefficients: list[int]) -> None:
    """Exactly, and its value at sizes far away is exact, too, on ints and on arrays."""
    coefficients = [*coefficients, 0]
    values = [sum(c * m for c, m in zip(coefficients, monomials(*p), strict=True)) for p in POINTS]
    found = Fitter(POINTS).fit(values)
    assert found == Polynomial(tuple(map(Fraction, coefficients)))
    far = (64, 8192)
    expected = sum(c * m for c, m in zip(coefficients, monomials(*far), strict=True))
    assert found.value(*far) == expected
    assert found.value(np.array([64]), np.array([8192]))[0] == expected


@given(coefficients=st.lists(st.integers(-(10**6), 10**6), min_size=7, max_size=7))
def test_a_third_micro_batch_tells_the_square(coefficients: list[int]) -> None:
    """GIVEN a loss that compares all examples WHEN a third micro-batch is traced THEN b^2 is found, and held to."""
    points = [*POINTS[:6], (4, 16), (5, 56)]
    values = [sum(c * m for c, m in zip(coefficients, monomials(*p), strict=True)) for p in points]
    assert Fitter(points).fit(values) == Polynomial(tuple(map(Fraction, coefficients)))
    assert Fitter(points).fit([*values[:-1], values[-1] + 1]) is None


def test_what_is_no_such_polynomial_is_not_fitted() -> None:
    """Quadratic in the micro-batch, or rounded up to a multiple of 32: the held-out sizes disagree."""
    fitter = Fitter(POINTS)
    assert fitter.fit([b * b * s for b, s in POINTS]) is None
    assert fitter.fit([-(-s // 32) * 32 for _, s in POINTS]) is None


def test_halves_are_exact() -> None:
    """The polynomial b (s^2 + s) / 2 is whole at every size."""
    found = Fitter(POINTS).fit([b * (s * s + s) // 2 for b, s in POINTS])
    assert found is not None
    assert found.value(3, 101) == 3 * (101 * 101 + 101) // 2
    assert found.formula() == "1/2*b*s + 1/2*b*s^2"


@pytest.mark.parametrize("points", [POINTS[:5], [(2, 16)] * 6])
def test_points_that_determine_nothing(points: list[tuple[int, int]]) -> None:
    """Too few, or all the same."""
    with pytest.raises(MemplanError):
        Fitter(points)
