"""What does the caching allocator reserve for a run of this program?

The program's own allocations and releases, in their order, go through the simulated allocator: loading, the first step
(its optimizer states settle between activations) and a second one.  Micro-steps after the second do what the second
did, so that two of them stand for any number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.allocator.replay import new_allocator
from memplan.allocator.rounding import fitting
from memplan.estimation.step import HEAD, STEM
from memplan.memory.lifetimes import WITHOUT_GRAPH
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from memplan.allocator.settings import AllocatorSettings
    from memplan.estimation.step import Part, StepProgram
    from memplan.memory.events import Segment, Sizes
    from memplan.memory.model_states import Tensors

    Call = tuple[int, int, int]

MOST_MICRO_STEPS = 2
"""Micro-steps of a step that are replayed."""

NUM_STEPS = 2
"""Optimizer steps that are replayed: the first, in which states are born, and one in steady state."""

MOST_ALIKE = 4096
"""So many equal tensors have a block each; the ids of further micro-batches share one."""

PLACE_STRIDE = 1 << 20
"""Keys of one layer; no layer has so many tensors."""


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
    capacity_bytes: int | None = None,
    settings: AllocatorSettings | None = None,
) -> Replayed:
    """Run the program on an allocator that may take `capacity_bytes` of the device (None: as much as it wants).

    On a card that is nearly full the allocator gives cached segments back before it runs out, so that a run may fit
    into less than it would take on a larger one.
    """
    allocator = new_allocator(settings, capacity_bytes=capacity_bytes)
    allocate, free = allocator.allocate, allocator.free
    missing = 0
    for key, num_bytes, sign in calls(program, sizes, accumulation):
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


def calls(program: StepProgram, sizes: Sizes, accumulation: int) -> Iterator[Call]:
    """(key, bytes, +1 or -1) of every call of the allocator."""
    return _Calls(program, sizes).run(accumulation)


class _Calls:
    """The unrolling of a program into calls, each segment translated once."""

    def __init__(self, program: StepProgram, sizes: Sizes) -> None:
        self.program = program
        self.sizes = sizes
        self.slots: dict[Any, int] = {}
        self.translated: dict[tuple[int, bool], list[Call]] = {}
        self.next_key = -1
        self.gradients: dict[int, None] = {}
        layers = program.layout.num_places
        self.base_of = {place: place * PLACE_STRIDE for place in range(layers)}
        self.base_of |= {STEM: layers * PLACE_STRIDE, HEAD: (layers + 1) * PLACE_STRIDE}
        self.tied_base = (layers + 2) * PLACE_STRIDE
        self.hidden_gradient = 0

    def run(self, accumulation: int) -> Iterator[Call]:
        program = self.program
        micro_steps = min(accumulation, MOST_MICRO_STEPS)
        for tensors in program.resident(0, with_states=program.states.from_start):
            yield from self._take(tensors)[0]
        for step in range(NUM_STEPS):
            inputs, inputs_back = self._take(program.inputs(accumulation))
            yield from inputs
            for micro in range(micro_steps):
                yield from self._parts(program.forward, again=False)
                there = set(self.gradients)
                yield from self._parts(program.backward_again if micro else program.backward, again=micro > 0)
                if micro and program.compiled:
                    yield from self._added(there)
            clip, temporaries = program.end_temporaries
            yield from self._passing(clip)
            if step == 0 and not program.states.from_start:
                yield from self._take(program.optimizer_states)[0]
            yield from self._passing(temporaries)
            for key in self.gradients:
                yield key, 0, -1
            self.gradients.clear()
            yield from inputs_back

    def _added(self, there: set[int]) -> Iterator[Call]:
        """The gradients of a compiled backward pass go once they are added to those that were `there`."""
        for key in [key for key in self.gradients if key not in there]:
            del self.gradients[key]
            yield key, 0, -1

    def _take(self, tensors: Tensors) -> tuple[list[Call], list[Call]]:
        """Calls that allocate some tensors, and those that free them."""
        taken = []
        for _, size, times in tensors.rows:
            alone = min(times, MOST_ALIKE)
            sizes = [self.sizes[size]] * alone
            if times > alone:
                sizes.append(self.sizes[size] * (times - alone))
            for num_bytes in sizes:
                taken.append((self.next_key, num_bytes, 1))
                self.next_key -= 1
        return taken, [(key, 0, -1) for key, _, _ in taken]

    def _passing(self, tensors: Tensors) -> Iterator[Call]:
        """Allocated, then freed."""
        taken, back = self._take(tensors)
        yield from taken
        yield from back

    def _parts(self, parts: Iterable[Part], *, again: bool) -> Iterator[Call]:
        for part in parts:
            translated = self._translate(part.segment, again=again)
            for place in part.places:
                yield from self._run_segment(translated, place)

    def _run_segment(self, translated: Sequence[Any], place: int) -> Iterator[Call]:
        base = self.base_of[place]
        events, hands_on, gradients = translated
        for kind, slot, num_bytes, sign in events:
            if kind == 0:
                yield base + slot, num_bytes, sign
            elif kind in {1, 4}:
                yield self._hidden(place, WITHOUT_GRAPH if kind == 4 else ""), num_bytes, sign
            elif kind == 2:
                yield self.hidden_gradient, num_bytes, sign
            else:
                yield self.tied_base + slot, num_bytes, sign
        if hands_on is not None:
            self.hidden_gradient = base + hands_on
        for tied, slot, stays in gradients:
            key = (self.tied_base if tied else base) + slot
            if stays:
                self.gradients[key] = None
            else:
                self.gradients.pop(key, None)

    def _hidden(self, place: int, tag: str) -> int:
        recording = self.program.layout.recording_of(tag)
        layers = len(recording.order)
        before = STEM if place == 0 or (place == HEAD and not layers) else layers - 1 if place == HEAD else place - 1
        piece = recording.stem if before == STEM else recording.kinds[recording.order[before]]
        return self.base_of[before] + self._slot((tag, piece.output.storage))

    def _slot(self, key: Any) -> int:
        return self.slots.setdefault(key, len(self.slots))

    def _translate(self, segment: Segment, *, again: bool) -> Any:
        """Events as (kind, slot, bytes, sign); the slot of the gradient handed on; gradients that stay or go."""
        known = self.translated.get((id(segment), again))
        if known is not None:
            return known
        events = []
        hands_on = None
        alive: dict[tuple[bool, int], bool] = {}
        for event in segment.events:
            key = event.key
            tied = key[0] == "tied"
            if key[0] == "hidden":
                kind, slot = (4 if WITHOUT_GRAPH in key else 1), 0
            elif key == ("gradient of output",):
                kind, slot = 2, 0
            else:
                kind, slot = (3 if tied else 0), self._slot((again, *key) if key[0] == "grad" else key)
            if key == ("gradient of hidden",):
                hands_on = slot
            if event.row.kind == "gradient" and kind in {0, 3}:
                alive[tied, slot] = event.sign > 0
            events.append((kind, slot, self.sizes[event.size], event.sign))
        gradients = [(tied, slot, stays) for (tied, slot), stays in alive.items()]
        known = self.translated[id(segment), again] = (events, hands_on, gradients)  # type: ignore[assignment]
        return known
