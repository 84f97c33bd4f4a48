"""Laws that tie the formula's timeline to the allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given

from memplan.allocator.replay import replay
from memplan.estimation import replaying
from memplan.estimation.dimensions import dimensions
from memplan.estimation.timeline import timeline
from memplan.memory.events import Sizes
from memplan.specs.values import replace
from tests.laws.models import RECORDINGS, all_setups, models

if TYPE_CHECKING:
    from memplan.specs.training import Setup


@given(model=models, setup=all_setups)
def test_the_fast_replay_is_the_replay_of_the_timeline(model: str, setup: Setup) -> None:
    """Translated segment by segment, a run makes the very calls of its timeline, and comes to the same peaks."""
    setup = replace(setup, gradient_accumulation_steps=min(setup.gradient_accumulation_steps, 2))
    program = RECORDINGS[model].program(setup)
    sizes = Sizes(dimensions(setup))
    steps = setup.gradient_accumulation_steps
    slow = replay((moment.key, moment.num_bytes, moment.sign) for moment in timeline(program, sizes, steps))
    fast = replaying.replay(program, sizes, steps)
    assert (fast.allocated_bytes, fast.reserved_bytes) == (slow.peak_allocated_bytes, slow.peak_reserved_bytes)
    assert fast.reserved_bytes >= fast.allocated_bytes >= program.peaks(sizes, steps).peak
    assert not fast.runs_out


@given(model=models, setup=all_setups)
def test_a_replay_in_too_little_memory_runs_out(model: str, setup: Setup) -> None:
    """Less than the peak of the tensors cannot do, whatever the allocator gives back; its own peak always does."""
    program = RECORDINGS[model].program(setup)
    sizes = Sizes(dimensions(setup))
    steps = setup.gradient_accumulation_steps
    free = replaying.replay(program, sizes, steps)
    enough = replaying.replay(program, sizes, steps, capacity_bytes=free.reserved_bytes)
    assert not enough.runs_out
    assert enough.num_alloc_retries == 0
    peak = program.peaks(sizes, min(steps, replaying.MOST_MICRO_STEPS)).peak
    little = replaying.replay(program, sizes, steps, capacity_bytes=peak - 1)
    assert little.runs_out
    assert little.reserved_bytes > peak - 1
