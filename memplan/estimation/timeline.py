"""Every allocation and release of a run, one after the other, each block under a name of its own.

This is the step program unrolled: layer by layer, micro-step by micro-step, step by step.  Its highest point is the
closed-form peak (a law that the tests hold), and it is what an allocator can be fed with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from memplan.estimation.step import CLIP, HEAD, OPTIMIZER, STEM

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memplan.estimation.step import Part, StepProgram
    from memplan.memory.events import Event, Row, Sizes
    from memplan.memory.model_states import Tensors

LOAD = "load"
"""Before the first step: the model moves to the device."""


class Moment(NamedTuple):
    """One allocation (+1) or release (-1)."""

    instant: str
    key: tuple[Any, ...]
    """Names the block for the whole run."""
    num_bytes: int
    """Allocated bytes of the block."""
    sign: int
    row: Row


def timeline(
    program: StepProgram, sizes: Sizes, accumulation: int, num_steps: int = 2, *, most_micro_steps: int | None = None
) -> Iterator[Moment]:
    """All moments of a run of `num_steps` optimizer steps, the loading of the model first.

    `most_micro_steps`: where a step has more, the others, which are like the last one, are left out; their inputs wait.
    """
    drawn = accumulation if most_micro_steps is None else min(accumulation, most_micro_steps)
    return _Run(program, sizes, accumulation, drawn).moments(num_steps)


class _Run:
    def __init__(self, program: StepProgram, sizes: Sizes, accumulation: int, drawn: int) -> None:
        self.program = program
        self.sizes = sizes
        self.accumulation = accumulation
        self.drawn = drawn
        self.micro_step = 0
        self.gradient_keys: dict[tuple[Any, ...], Moment] = {}
        self.hidden_gradient: tuple[Any, ...] = ()

    def moments(self, num_steps: int) -> Iterator[Moment]:
        program = self.program
        for tensors in program.resident(0, with_states=program.states.from_start):
            yield from self._take(LOAD, "resident", tensors)
        for step in range(num_steps):
            inputs = program.inputs(self.accumulation)
            yield from self._take("forward", ("inputs", step), inputs)
            for micro in range(self.drawn):
                self.micro_step += 1
                yield from self._parts(program.forward)
                yield from self._parts(program.backward if micro == 0 else program.backward_again)
            clip, temporaries = program.end_temporaries
            yield from self._take(CLIP, ("clip", step), clip)
            yield from self._give_back(CLIP, ("clip", step), clip)
            if step == 0 and not program.states.from_start:
                yield from self._take(OPTIMIZER, "states", program.optimizer_states)
            yield from self._take(OPTIMIZER, ("step", step), temporaries)
            yield from self._give_back(OPTIMIZER, ("step", step), temporaries)
            for moment in self.gradient_keys.values():
                yield moment._replace(instant=OPTIMIZER, sign=-1)
            self.gradient_keys.clear()
            yield from self._give_back(OPTIMIZER, ("inputs", step), inputs)

    def _take(self, instant: str, name: Any, tensors: Tensors) -> Iterator[Moment]:
        for row, size, times in tensors.rows:
            for n in range(times):
                yield Moment(instant, (name, row.module, row.tensor, row.dtype, n), self.sizes[size], +1, row)

    def _give_back(self, instant: str, name: Any, tensors: Tensors) -> Iterator[Moment]:
        for moment in self._take(instant, name, tensors):
            yield moment._replace(sign=-1)

    def _parts(self, parts: Iterable[Part]) -> Iterator[Moment]:
        for part in parts:
            for place in part.places:
                hands_on = None
                for event in part.segment.events:
                    key = self._key(place, event)
                    if event.key == ("gradient of hidden",):
                        hands_on = key
                    moment = Moment(part.instant, key, self.sizes[event.size], event.sign, event.row)
                    if event.row.kind == "gradient":
                        self._note_gradient(moment)
                    yield moment
                if hands_on is not None:
                    self.hidden_gradient = hands_on

    def _note_gradient(self, moment: Moment) -> None:
        if moment.sign > 0:
            self.gradient_keys[moment.key] = moment
        else:
            self.gradient_keys.pop(moment.key, None)

    def _key(self, place: int, event: Event) -> tuple[Any, ...]:
        if event.key[0] == "hidden":
            tag = event.key[-1] if len(event.key) > 1 else ""
            before = self._before(place, tag)
            return (self.micro_step, before, tag, self._output(before, tag))
        if event.key == ("gradient of output",):
            return self.hidden_gradient
        if event.key[0] == "tied":
            return (self.micro_step, *event.key)
        return (self.micro_step, place, *event.key)

    def _before(self, place: int, tag: str) -> int:
        layers = len(self.program.layout.recording_of(tag).order)
        if place == HEAD:
            return layers - 1 if layers else STEM
        return place - 1 if place > 0 else STEM

    def _output(self, place: int, tag: str) -> int:
        recording = self.program.layout.recording_of(tag)
        piece = recording.stem if place == STEM else recording.kinds[recording.order[place]]
        return piece.output.storage
