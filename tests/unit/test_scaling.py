"""Learning rates, warm-up and steps when the batch changes, as the sources have them."""

from __future__ import annotations

import pytest

from memplan.equivalence.scaling import LINEAR, SQUARE_ROOT, UNKNOWN, accumulation_warning, advise, rule_of
from memplan.errors import UsageError
from memplan.specs.training import OPTIMIZERS


def test_goyal_2017() -> None:
    """Section 2.1 and 5.1: a rate of 0.1 at 256 images becomes 0.1 x 32 at 8,192."""
    found = advise(256, 8192, optimizer="sgd-momentum", learning_rate=0.1)
    assert found.rule == LINEAR
    assert found.learning_rate == pytest.approx(3.2)
    assert found.betas is None


def test_malladi_2022() -> None:
    """The square-root rule with k = 4: twice the rate, 1 - beta four times as large."""
    found = advise(32, 128, optimizer="adamw", learning_rate=1e-4, betas=(0.9, 0.999))
    assert found.rule == SQUARE_ROOT
    assert found.learning_rate == pytest.approx(2e-4)
    assert found.betas == pytest.approx((0.6, 0.996))


def test_the_rule_for_adam_ends_where_a_beta_would_be_below_zero() -> None:
    assert advise(32, 320, optimizer="adamw").betas is None


def test_nothing_changes_where_the_batch_does_not() -> None:
    for optimizer in ("sgd", "adamw", "lion"):
        found = advise(32, 32, optimizer=optimizer, learning_rate=1e-4, warmup_steps=7, total_steps=100)
        assert found.is_same
        assert (found.learning_rate, found.warmup_steps, found.total_steps) == (1e-4, 7, 100)


def test_steps_see_the_same_data() -> None:
    found = advise(32, 128, optimizer="adamw", warmup_steps=100, total_steps=1001)
    assert (found.warmup_steps, found.total_steps) == (25, 251)
    smaller = advise(128, 32, optimizer="adamw", warmup_steps=25, total_steps=251)
    assert (smaller.warmup_steps, smaller.total_steps) == (100, 1004)


def test_no_rule_is_made_up() -> None:
    """Of optimizers that no source covers, both factors are given and no rate."""
    found = advise(32, 64, optimizer="lion", learning_rate=1e-4)
    assert (found.rule, found.factor, found.learning_rate) == (UNKNOWN, None, None)
    assert (found.linear_factor, found.square_root_factor) == pytest.approx((2, 2**0.5))


def test_the_rule_of_every_optimizer_that_memplan_knows() -> None:
    by_rule = {rule: {name for name in OPTIMIZERS if rule_of(name) == rule} for rule in (LINEAR, SQUARE_ROOT, UNKNOWN)}
    assert {"sgd", "sgd-momentum"} <= by_rule[LINEAR]
    assert {"adamw", "adamw-fused", "adamw-8bit", "paged-adamw-8bit", "rmsprop"} <= by_rule[SQUARE_ROOT]
    assert {"adafactor", "lion", "muon"} <= by_rule[UNKNOWN]
    assert all("adam" in name or "rmsprop" in name for name in by_rule[SQUARE_ROOT])


def test_batches_have_to_be_above_zero() -> None:
    with pytest.raises(UsageError):
        advise(0, 32, optimizer="sgd")


def test_a_long_accumulation_is_said() -> None:
    assert accumulation_warning(16) is None
    assert "17 micro-steps" in accumulation_warning(17)
