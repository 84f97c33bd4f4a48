"""Laws of the planner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memplan
from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.planner.goal import Goal, Target, divisors, target_from_tokens
from memplan.planner.search import search
from memplan.specs.gpu import GpuSpec
from memplan.specs.training import Setup
from tests.laws.models import CONFIGS, models

if TYPE_CHECKING:
    from memplan.planner.plan import Plan

GPU = GpuSpec(
    name="test",
    label="test card",
    label_bytes=8 * 10**9,
    context_bytes=10**6,
    flops_per_s={"bf16": 1e14, "fp32": 2e13},
    memory_bandwidth_bytes_per_s=1e12,
)
ESTIMATORS = {name: Estimator(read_architecture(config, name), name, GPU) for name, config in CONFIGS.items()}


def plan(model: str, *, target: int, ranks: int, usable: int, precision: str, seq_len: int = 128) -> Plan:
    """A plan on a card of `usable` bytes."""
    goal = Goal(
        setup=Setup(seq_len=seq_len, precision=precision, data_parallel_size=ranks),
        target=Target(target),
        usable_bytes=usable,
        headroom_percent=2.0,
    )
    return search(ESTIMATORS[model], goal, GPU, "test card")


@given(
    model=models,
    each=st.integers(1, 96),
    ranks=st.sampled_from([1, 2, 3]),
    usable=st.integers(20 * 2**20, 400 * 2**20),
    precision=st.sampled_from(["fp32", "bf16", "bf16-mixed"]),
)
def test_plans_reach_the_target_exactly_and_fit(model: str, each: int, ranks: int, usable: int, precision: str) -> None:
    """Micro-batch x accumulation x ranks is the target; plans fit with their headroom, refusals do not."""
    found = plan(model, target=each * ranks, ranks=ranks, usable=usable, precision=precision)
    plans = ([found.best] if found.best else []) + list(found.alternatives)
    for candidate in plans:
        assert candidate.setup.global_batch_size == each * ranks
        assert candidate.memory.peak_process_bytes + found.goal.margin_bytes <= usable
        assert candidate.headroom_bytes == usable - candidate.upper_bound_bytes >= 0
    for rejection in found.rejections:
        assert rejection.candidate.short_by_bytes > 0
        assert rejection.candidate.setup.global_batch_size == each * ranks
    assert bool(plans) != bool(found.nearest)


@given(model=models, each=st.integers(1, 48), usable=st.integers(20 * 2**20, 400 * 2**20))
def test_nothing_that_fits_beats_the_best_plan(model: str, each: int, usable: int) -> None:
    """Searched exhaustively, no configuration that fits is faster than the best plan, and none beats it in both."""
    found = plan(model, target=each, ranks=1, usable=usable, precision="bf16")
    estimator, goal = ESTIMATORS[model], found.goal
    fitting = []
    for mode in goal.modes():
        for micro in divisors(each):
            setup = goal.at(micro, each // micro, mode)
            budget = goal.usable_bytes - goal.margin_bytes
            step_time = estimator.step_time(setup)
            assert step_time is not None
            if estimator.replayed_memory(setup, budget).peak_process_bytes <= budget:
                fitting.append(step_time.total_s)
    assert bool(fitting) == (found.best is not None)
    if found.best is not None:
        assert found.best.step_time.total_s == min(fitting)


@given(model=models, each=st.integers(1, 48), usable=st.integers(20 * 2**20, 400 * 2**20))
def test_ways_out_fit(model: str, each: int, usable: int) -> None:
    """Where nothing fits, what is offered as a way out frees at least what is missing by itself or together."""
    found = plan(model, target=each, ranks=1, usable=usable, precision="fp32")
    if found.best is None:
        assert all(way.candidate.fits for way in found.ways_out)
    else:
        assert found.ways_out == ()


@given(number=st.integers(1, 5000))
def test_divisors_are_all_and_only_the_divisors(number: int) -> None:
    """Ascending, complete, without repeats."""
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@given(tokens=st.integers(1, 10**8), seq_len=st.integers(1, 8192), ranks=st.integers(1, 64))
def test_a_target_in_tokens_becomes_the_nearest_number_of_sequences(tokens: int, seq_len: int, ranks: int) -> None:
    """No other number of sequences that all ranks share is nearer; every rank gets at least one."""
    target = target_from_tokens(tokens, seq_len, ranks)
    assert target.global_batch_size % ranks == 0
    assert target.global_batch_size >= ranks
    distance = abs(target.global_batch_size * seq_len - tokens)
    share = seq_len * ranks
    assert distance <= abs((target.global_batch_size + ranks) * seq_len - tokens)
    if target.global_batch_size > ranks:
        assert distance <= abs(target.global_batch_size * seq_len - share - tokens)


@given(target=st.integers(1, 500), ranks=st.integers(2, 8))
def test_a_batch_that_cannot_be_divided_is_refused_with_the_nearest(target: int, ranks: int) -> None:
    """Never changed silently: the message names the next smaller and the next larger batch that can."""
    if target % ranks == 0:
        return
    with pytest.raises(UsageError) as fault:
        Goal(setup=Setup(data_parallel_size=ranks), target=Target(target), usable_bytes=10**9)
    above = (target // ranks + 1) * ranks
    assert str(above if target >= ranks else ranks) in fault.value.cure


@pytest.mark.parametrize(
    ("options", "micro"),
    [
        ({"gpu": "64GiB", "target_batch": 4, "optimizer": "adamw-fused", "seq_len": 1024}, 4),
        ({"gpu": "54GiB", "target_batch": 4, "optimizer": "adamw-8bit", "seq_len": 1024}, 4),
    ],
)
def test_without_accumulation_a_larger_micro_batch_may_be_the_only_one_that_fits(
    options: dict[str, Any], micro: int
) -> None:
    """Gradients stay resident from the second micro-step on: 15 GiB of them for an 8 B model."""
    found = memplan.suggest("llama-3-8b", **options)
    assert found.best is not None
    assert (found.best.setup.micro_batch_size, found.best.setup.gradient_accumulation_steps) == (micro, 1)
