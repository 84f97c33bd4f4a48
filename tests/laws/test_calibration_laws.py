"""What a bound promises, whatever the errors are."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.calibration.bounds import bound, confidence_of, least_scores
from memplan.specs.margin import Margin

scores = st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=60)
confidences = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


@given(values=st.lists(st.floats(0.0, 0.5), min_size=2, max_size=60, unique=True), confidence=confidences)
def test_of_exchangeable_runs_at_least_the_asked_share_stays_under_the_bound(values, confidence):
    """Each of n + 1 runs in turn is the new one: exact coverage, without a simulation."""
    covered = 0
    attained = True
    for index, new in enumerate(values):
        found = bound(values[:index] + values[index + 1 :], confidence)
        attained = attained and found.is_attained
        covered += new <= found.ratio
    if attained:
        assert covered >= math.ceil(round(confidence * len(values), 9))
    else:  # the largest score of n: all but the largest run stay under it
        assert covered >= len(values) - 1


@given(values=scores, confidence=confidences)
def test_what_is_said_of_a_bound_is_what_the_scores_vouch_for(values, confidence):
    found = bound(values, confidence)
    assert confidence_of(values, found.ratio) >= found.confidence - 1e-12
    assert found.is_attained == (found.confidence == confidence)
    assert found.ratio >= 0


@given(values=scores)
def test_a_higher_confidence_is_a_wider_bound(values):
    ratios = [bound(values, c).ratio for c in (0.1, 0.5, 0.9, 0.99)]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_least_scores_is_the_least(confidence):
    least = least_scores(confidence)
    assert bound([0.0] * least, confidence).is_attained
    assert least == 1 or not bound([0.0] * (least - 1), confidence).is_attained


def test_least_scores_for_99_percent_is_99():
    assert (least_scores(0.99), least_scores(0.95), least_scores(0.9), least_scores(0.5)) == (99, 19, 9, 1)


def test_coverage_on_new_data():
    """99 scores of a skewed distribution, 2,000 new runs: 95 % of them, less three standard deviations, stay under."""
    rng = random.Random(7)

    def error() -> float:
        return rng.lognormvariate(-4, 1) - 0.01

    shares = []
    for _ in range(50):
        ratio = bound([error() for _ in range(99)], 0.95).ratio
        shares.append(sum(error() <= ratio for _ in range(2000)) / 2000)
    mean = sum(shares) / len(shares)
    assert mean >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 100 / 50)  # of a mean of 50 bounds from 99 scores each


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_confidence_is_between_0_and_1(confidence):
    with pytest.raises(ValueError, match="confidence"):
        bound([0.1], confidence)


def test_without_scores_there_is_no_bound():
    with pytest.raises(ValueError, match="no scores"):
        bound([], 0.9)


@given(
    usable=st.integers(0, 10**12),
    num_bytes=st.integers(0, 10**11),
    ratio=st.floats(0, 2),
    process=st.integers(0, 10**12),
)
def test_a_budget_is_the_most_that_fits(usable, num_bytes, ratio, process):
    """What is within the budget has its upper bound within the usable bytes, and nothing else has."""
    margin = Margin(num_bytes, ratio)
    budget = margin.budget(usable)
    assert margin.upper_bound(budget + 1) > usable
    if process <= budget and margin.upper_bound(0) <= usable:
        assert margin.upper_bound(process) <= usable
    assert margin.upper_bound(process) >= process + num_bytes
