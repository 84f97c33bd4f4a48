"""What does the caching allocator reserve for a run of this program?

The program's own allocations and releases, in their order, go through the simulated allocator: loading, the first step
(its optimizer states settle between activations) and a second one, each with the evaluation that follows it where there
is one.  Micro-steps after the second do what the second did, so that two of them stand for any number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.allocator.replay import new_allocator
from memplan.allocator.rounding import fitting
from memplan.estimation.evaluation_replay import evaluation_calls
from memplan.estimation.unrolling import Keys, Unrolling
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.allocator.settings import AllocatorSettings
    from memplan.estimation.evaluation import EvaluationProgram
    from memplan.estimation.step import StepProgram
    from memplan.estimation.unrolling import Call
    from memplan.memory.events import Sizes
    from memplan.memory.model_states import Tensors

MOST_MICRO_STEPS = 2
"""Micro-steps of a step that are replayed."""

NUM_STEPS = 2
"""Optimizer steps that are replayed: the first, in which states are born, and one in steady state."""


class Replayed(NamedTuple):
    """What a replay came to."""

    allocated_bytes: int
    """Peak of whole blocks, unsplit rests of up to 1 MiB included."""
    reserved_bytes: int
    """Peak of the segments that the allocator holds; where it runs out, with what is missing."""
    num_alloc_retries: int
    """How often cached memory had to be given back before a request could be met."""
    runs_out: bool
    """Whether a request could not be met at all."""


def replay(
    program: StepProgram,
    sizes: Sizes,
    accumulation: int,
    *,
    evaluation: EvaluationProgram | None = None,
    capacity_bytes: int | None = None,
    settings: AllocatorSettings | None = None,
) -> Replayed:
    """Run the program on an allocator that may take `capacity_bytes` of the device (None: as much as it wants).

    `evaluation`: what comes after each step.

    On a card that is nearly full the allocator gives cached segments back before it runs out, so that a run may fit
    into less than it would take on a larger one.
    """
    allocator = new_allocator(settings, capacity_bytes=capacity_bytes)
    allocate, free = allocator.allocate, allocator.free
    missing = 0
    for key, num_bytes, sign in calls(program, sizes, accumulation, evaluation):
        if sign <= 0:
            free(key)
        elif not allocate(key, num_bytes):
            missing = fitting(num_bytes, allocator.settings).segment_bytes
            break
    return Replayed(
        allocator.peak_allocated,
        allocator.reserved + missing if missing else allocator.peak_reserved,
        allocator.num_alloc_retries,
        missing > 0,
    )


def calls(
    program: StepProgram, sizes: Sizes, accumulation: int, evaluation: EvaluationProgram | None = None
) -> Iterator[Call]:
    """(key, bytes, +1 or -1) of every call of the allocator."""
    return _Calls(program, sizes, evaluation).run(accumulation)


class _Calls:
    """The unrolling of a program into calls."""

    def __init__(self, program: StepProgram, sizes: Sizes, evaluation: EvaluationProgram | None) -> None:
        self.program = program
        self.sizes = sizes
        self.evaluation = evaluation
        self.keys = Keys()
        self.unrolling = Unrolling(program.layout, sizes)

    def run(self, accumulation: int) -> Iterator[Call]:
        program, unrolling = self.program, self.unrolling
        micro_steps = min(accumulation, MOST_MICRO_STEPS)
        for tensors in program.resident(0, with_states=program.states.from_start):
            yield from self._take(tensors)[0]
        for step in range(NUM_STEPS):
            inputs, inputs_back = self._take(program.inputs(accumulation))
            yield from inputs
            for micro in range(micro_steps):
                yield from unrolling.parts(program.forward)
                there = set(unrolling.gradients)
                yield from unrolling.parts(program.backward_again if micro else program.backward, again=micro > 0)
                if micro and program.compiled:  # those of this pass go once they are added to those that were there
                    yield from unrolling.gradients_released(besides=there)
            clip, temporaries = program.end_temporaries
            yield from self._passing(clip)
            if step == 0 and not program.states.from_start:
                yield from self._take(program.optimizer_states)[0]
            yield from self._passing(temporaries)
            yield from unrolling.gradients_released()
            if self.evaluation is not None:
                yield from evaluation_calls(self.evaluation, self.keys)
            yield from inputs_back

    def _take(self, tensors: Tensors) -> tuple[list[Call], list[Call]]:
        return self.keys.take(tensors, self.sizes)

    def _passing(self, tensors: Tensors) -> Iterator[Call]:
        """Allocated, then freed."""
        taken, back = self._take(tensors)
        yield from taken
        yield from back
