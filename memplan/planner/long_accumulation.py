"""Is the accumulation of a plan longer than usual, and what would shorten it?

A micro-step costs more than its products: its kernels are launched, its data is fetched, and its gradients are added to
those before it.  In bf16 and fp16 every addition rounds.  The error of K terms that are added one after the other is at
most

    g = (K - 1) u / (1 - (K - 1) u)    of the sum of their sizes,    u = 2^-8 in bf16, 2^-11 in fp16

(Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2); errors that cancel each other stay far
below.

What shortens it: another checkpointing, a lever that leaves the update as it is, or more GPUs, each with the smallest
micro-batch that needs no more than the usual steps.  Like levers they are not replayed through the allocator.  Not
looked for: two levers together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.specs.training import PRECISIONS, divisors
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memplan.planner.goal import Goal
    from memplan.planner.plan import Candidate, Lever
    from memplan.planner.search import Search
    from memplan.specs.training import Setup

USUAL_STEPS = 16
"""Accumulation steps up to which nothing is said."""

ROUNDING = {"fp32": None, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Unit roundoff of a sum in each dtype; None: too small to speak of."""


FASTER = 0.99
"""Share of the time that a micro-batch of this size takes by itself, up to which a lever is named beside it."""


class Shorter(NamedTuple):
    """A change with which fewer accumulation steps should fit, and which leaves the update as it is."""

    options: str
    candidate: Candidate
    """The fastest with it."""


class LongAccumulation(NamedTuple):
    """A plan that accumulates for longer than usual."""

    steps: int
    dtype: str
    """In which gradients are added up."""
    rounding: float | None
    """Largest error of a sum of gradients, as a share of the sum of the sizes of its terms; None: fp32, or no bound."""
    ways: tuple[Shorter, ...]


def long_accumulation(
    look: Search, best: Candidate, levers: Sequence[Lever], refused: Sequence[Candidate]
) -> LongAccumulation | None:
    """What there is to say about the accumulation of a plan; None where it is not unusual.

    Args:
        look: The search that found it.
        best: The plan.
        levers: What else could be chosen.
        refused: What does not fit, some of it only as replayed.
    """
    setup = best.setup
    steps = setup.gradient_accumulation_steps
    if steps <= USUAL_STEPS:
        return None
    dtype = _dtype_of_gradients(setup)
    is_cheap = look.estimator.prices_levers  # traces of other micro-batches would take longer than the plan itself
    ways = (*_larger_batches(look, best, levers, refused), *_more_gpus(look, best)) if is_cheap else ()
    return LongAccumulation(steps, dtype, largest_error(steps, dtype), ways)


def largest_error(steps: int, dtype: str) -> float | None:
    """Of a sum of so many gradients, by the sum of their sizes; None where it is tiny, or nothing bounds it."""
    unit = ROUNDING[dtype]
    share = 0.0 if unit is None else (steps - 1) * unit
    return share / (1 - share) if 0 < share < 1 else None


def _dtype_of_gradients(setup: Setup) -> str:
    """That of the trained parameters."""
    narrow = setup.lora is None or setup.lora.dtype == "base"
    return PRECISIONS[setup.precision][0] if narrow else "fp32"


def _larger_batches(
    look: Search, best: Candidate, levers: Sequence[Lever], refused: Sequence[Candidate]
) -> Iterator[Shorter]:
    """The smallest micro-batch that needs no more than the usual steps: as it is, and with levers that are faster."""
    free = replace(look.goal, micro_batch_size=None, gradient_accumulation_steps=None)
    splits = [(micro, steps) for micro, steps in free.splits() if steps <= USUAL_STEPS]
    if not splits:
        return
    split = min(splits)
    mode: dict[str, Any] = {"activation_checkpointing": best.setup.activation_checkpointing}
    plain = _fastest(look, free, split, without=[one.setup for one in refused])
    if plain is not None:
        yield Shorter(f"--micro-batch {split[0]}", plain)
    for flag, changes in _that_free(best.setup, levers):
        found = _fastest(look, replace(free, setup=replace(free.setup, **mode, **changes)), split)
        if found is not None and (plain is None or found.step_time.total_s < FASTER * plain.step_time.total_s):
            yield Shorter(f"{flag} --micro-batch {split[0]}", found)


def _that_free(setup: Setup, levers: Sequence[Lever]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Levers that free something and leave the update and the batch as they are; checkpointing is free as it is."""
    for lever in levers:
        other = lever.candidate.setup
        changes = {name: value for name, value in vars(other).items() if value != getattr(setup, name)}
        is_split = {"micro_batch_size", "activation_checkpointing"} & changes.keys()
        if lever.same_update and lever.delta_bytes < 0 and not is_split:
            yield lever.flag, changes


def _more_gpus(look: Search, best: Candidate) -> Iterator[Shorter]:
    """The fewest GPUs that share the steps evenly and need no more than the usual ones, nor less than half of them."""
    micro, steps = best.setup.micro_batch_size, best.setup.gradient_accumulation_steps
    left = max(n for n in divisors(steps) if n <= USUAL_STEPS)
    if 2 * left <= USUAL_STEPS:  # so few divisors: so many GPUs are no answer
        return
    ranks = best.setup.data_parallel_size * steps // left
    among = replace(look.goal.setup, data_parallel_size=ranks)
    goal = replace(look.goal, setup=among, micro_batch_size=None, gradient_accumulation_steps=None)
    found = _fastest(look, goal, (micro, left))
    if found is not None:
        yield Shorter(f"--gpus {ranks}", found)


def _fastest(look: Search, goal: Goal, split: tuple[int, int], without: Sequence[Setup] = ()) -> Candidate | None:
    """With this micro-batch and accumulation; None where none fits, or can be had."""
    try:
        look.estimator.check(goal.setup)
        found = [look.candidate(goal.at(*split, mode)) for mode in goal.modes()]
    except MemplanError:
        return None
    fitting = [one for one in found if one.fits and one.setup not in without]
    return min(fitting, key=lambda one: one.step_time.total_s, default=None)
