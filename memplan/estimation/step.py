"""What is allocated when, over one optimizer step?

A step is a sequence of parts; a part is a segment of allocation events that runs once for each of some layers.  The
peak is the highest point over all parts, never a sum of components:

    micro-step 1: forward, loss, backward (gradients are born)      K - 1 more: the same with gradients resident
    then: gradient clip, optimizer step, gradients released

The first step differs from every later one: optimizer states do not exist before its end.
"""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from memplan.architectures.architecture import record
from memplan.memory.events import Event, Extent, Row, Segment, Sizes, maximum
from memplan.memory.lifetimes import PieceLifetimes
from memplan.memory.model_states import ModelStates, Tensors
from memplan.operators.sizes import num_bytes
from memplan.operators.tape import Numerics
from memplan.specs.training import OPTIMIZERS, PRECISIONS, checkpointed_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memplan.architectures.architecture import Architecture, Recording
    from memplan.specs.training import Setup

FORWARD = "forward"
LOSS = "loss"
BACKWARD = "backward"
CLIP = "gradient clip"
OPTIMIZER = "optimizer step"
INSTANTS = (FORWARD, LOSS, BACKWARD, CLIP, OPTIMIZER)
"""The instants of a step at which memory can be at its highest, in order."""

STEM = -1
HEAD = -2
"""Places in `Part.places` that are no layers."""


class Part(NamedTuple):
    """A segment run once for each of `places`."""

    instant: str
    segment: Segment
    places: tuple[int, ...]
    """The layers it runs for, by number, or `STEM` or `HEAD`; one entry a run."""


class Peaks(NamedTuple):
    """Allocated bytes at the instants of one step (ints, or arrays over a grid)."""

    by_instant: dict[str, Any]
    kept_activation_bytes: Any
    kept_activation_bytes_per_layer: Any

    @property
    def peak(self) -> Any:
        """The highest of all instants."""
        highest: Any = 0
        for value in self.by_instant.values():
            highest = maximum(highest, value)
        return highest


class Recordings:
    """The recordings of one architecture, each made once: a plan looks at many setups of the same model."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._recordings: dict[tuple[Any, ...], Recording] = {}
        self._programs: dict[tuple[Any, ...], StepProgram] = {}

    def recording(self, precision: str, attention: str, exceeded: frozenset[int]) -> Recording:
        """The tapes under these dtypes, this attention and these exceeded windows."""
        key = (precision, attention, exceeded)
        if key not in self._recordings:
            numerics = Numerics(*PRECISIONS[precision])
            self._recordings[key] = record(self.architecture, numerics, attention=attention, exceeded=exceeded)
        return self._recordings[key]

    def program(self, setup: Setup) -> StepProgram:
        """The step of `setup`; its micro-batch, accumulation and length are left open."""
        exceeded = frozenset(w for w in self.architecture.windows if setup.seq_len > w)
        recording = self.recording(setup.precision, setup.attention, exceeded)
        optimizer = OPTIMIZERS[setup.optimizer]
        key = (id(recording), optimizer, setup.activation_checkpointing, setup.data_parallel_size)
        if key not in self._programs:
            self._programs[key] = StepProgram(
                recording, optimizer, setup.activation_checkpointing, setup.data_parallel_size
            )
        return self._programs[key]


class StepProgram:
    """Everything that happens to memory in a step, for any micro-batch and length.

    Laid out once for a recording and the choices that change what is kept; evaluated for as many sizes as wanted.
    """

    def __init__(
        self, recording: Recording, optimizer: str, activation_checkpointing: str, data_parallel_size: int
    ) -> None:
        self.recording = recording
        self.data_parallel_size = data_parallel_size
        self.states = ModelStates(tuple(recording.parameter_groups()), recording.numerics.parameters, optimizer)
        self.modes = checkpointed_layers(activation_checkpointing, len(recording.order))
        self._layers: dict[tuple[int, str, bool], PieceLifetimes] = {}
        self._keys = []
        before = PieceLifetimes(recording.stem)
        for kind, mode in zip(recording.order, self.modes, strict=True):
            key = (kind, mode, not before.keeps_output())
            if key not in self._layers:
                self._layers[key] = PieceLifetimes(recording.kinds[kind], checkpointing=mode, owns_hidden=key[2])
            self._keys.append(key)
            before = self._layers[key]
        self.head = PieceLifetimes(recording.head, owns_hidden=not before.keeps_output())
        lasting = frozenset(name for x in (*self._layers.values(), self.head) for name in x.kept_shared())
        self.stem = PieceLifetimes(recording.stem, lasting=lasting)

    def layer(self, number: int) -> PieceLifetimes:
        """The lifetimes of one layer."""
        return self._layers[self._keys[number]]

    # -- the parts of a step -----------------------------------------------------------------------------------------

    @cached_property
    def forward(self) -> tuple[Part, ...]:
        """Ids to loss; autocast's cache goes at its end."""
        exits = {key: x.autocast_exit() for key, x in self._layers.items()}
        return (
            Part(FORWARD, self.stem.forward(), (STEM,)),
            *self._in_layers(FORWARD, {key: x.forward() for key, x in self._layers.items()}),
            Part(FORWARD, self._release_shared(kept=False), (STEM,)),
            Part(LOSS, self.head.forward(), (HEAD,)),
            Part(LOSS, self.stem.autocast_exit(), (STEM,)),
            *self._in_layers(LOSS, exits),
            Part(LOSS, self.head.autocast_exit(), (HEAD,)),
        )

    @cached_property
    def backward(self) -> tuple[Part, ...]:
        """Loss to gradients, in the first micro-step: gradients of parameters are born and stay."""
        return self._backward(fresh=True)

    @cached_property
    def backward_again(self) -> tuple[Part, ...]:
        """The same in later micro-steps: gradients are added to those that are there."""
        return self._backward(fresh=False)

    def _backward(self, *, fresh: bool) -> tuple[Part, ...]:
        in_head = {p.name for p in self.recording.head.tape.parameters}
        tied = frozenset(in_head & {p.name for p in self.recording.stem.tape.parameters})
        of_layers = {key: x.backward(fresh=fresh) for key, x in self._layers.items()}
        return (
            Part(LOSS, self.head.backward(waiting=tied, fresh=fresh), (HEAD,)),
            *self._in_layers(BACKWARD, of_layers, reverse=True),
            Part(BACKWARD, self._release_shared(kept=True), (STEM,)),
            Part(BACKWARD, self.stem.backward(joined=tied, fresh=fresh), (STEM,)),
        )

    def _in_layers(
        self, instant: str, segments: dict[tuple[int, str, bool], Segment], *, reverse: bool = False
    ) -> Iterator[Part]:
        numbered = list(enumerate(self._keys))
        if reverse:
            numbered.reverse()
        for key, run in groupby(numbered, key=lambda pair: pair[1]):
            yield Part(instant, segments[key], tuple(number for number, _ in run))

    def _release_shared(self, *, kept: bool) -> Segment:
        """What all layers share goes after the last layer, or after their backward where some layer keeps it."""
        stem = self.recording.stem
        by_stem = self.stem.keepers()
        events = []
        done = {stem.output.storage}
        for name, x in stem.shared.items():
            storage = stem.tape.storages[x.storage]
            goes_now = (name in self.stem.lasting) == kept and x.storage not in by_stem
            if goes_now and storage.role == "activation" and x.storage not in done:
                done.add(x.storage)
                events.append(Event(("", x.storage), storage.size, -1, self.stem.row(storage)))
        return Segment("shared tensors released", tuple(events))

    # -- what is there all the time ----------------------------------------------------------------------------------

    @cached_property
    def buffers(self) -> Tensors:
        """Tensors of the model that are not trained."""
        return Tensors(
            tuple(
                (Row(b.name, "buffer", "buffer", b.shape, b.dtype), num_bytes(b.shape, b.dtype), 1)
                for b in self.recording.architecture.buffers
            )
        )

    def inputs(self, accumulation: int) -> Tensors:
        """Ids and labels of all micro-batches of a step: the Trainer fetches them before the first forward pass."""
        seen = {s.name: s for piece in self.recording.pieces() for s in piece.tape.storages if s.role == "input"}
        rows = []
        for s in seen.values():
            times = accumulation if s.shape else min(1, accumulation)
            rows.append((Row("inputs", s.name, "input", s.shape, s.dtype), s.size, times))
        return Tensors(tuple(rows))

    @cached_property
    def parameters(self) -> Tensors:
        """The parameters."""
        return self.states.parameters()

    @cached_property
    def _buckets(self) -> Tensors:
        return self.states.gradient_buckets(self.data_parallel_size)

    def resident(self, accumulation: int, *, with_states: bool) -> tuple[Tensors, ...]:
        """What is allocated during the whole step."""
        states = (self.optimizer_states,) if with_states else ()
        return (self.parameters, self.buffers, self._buckets, self.inputs(accumulation), *states)

    @cached_property
    def optimizer_states(self) -> Tensors:
        """What the optimizer remembers between steps."""
        return self.states.optimizer_states()

    @cached_property
    def gradients(self) -> Tensors:
        """One gradient for each trained parameter."""
        return self.states.gradients()

    @cached_property
    def end_temporaries(self) -> tuple[Tensors, Tensors]:
        """What the gradient clip and the optimizer step need for a moment."""
        return self.states.clip_temporaries(), self.states.step_temporaries()

    # -- evaluation --------------------------------------------------------------------------------------------------

    def peaks(self, sizes: Sizes, accumulation: int, *, first_step: bool = False) -> Peaks:
        """Allocated bytes at every instant of a step: the first one, or any later one."""
        gradients = self.gradients.total(sizes)
        base: Any = sum(x.total(sizes) for x in self.resident(accumulation, with_states=not first_step))
        peaks: dict[str, Any] = dict.fromkeys(INSTANTS, 0)
        extents: dict[int, Extent] = {}

        def climb(parts: Sequence[Part], start: Any) -> Any:
            live = start
            for part in parts:
                one = extents.get(id(part.segment))
                if one is None:
                    one = extents[id(part.segment)] = part.segment.extent(sizes)
                whole = one.repeated(len(part.places))
                peaks[part.instant] = maximum(peaks[part.instant], live + whole.peak)
                live = live + whole.net
            return live

        after_forward = climb(self.forward, base)
        climb(self.backward, after_forward)
        if accumulation > 1:
            climb(self.backward_again, climb(self.forward, base + gradients))
        states = self.optimizer_states.total(sizes) if first_step else 0
        clip, step = self.end_temporaries
        peaks[CLIP] = base + gradients + clip.total(sizes)
        peaks[OPTIMIZER] = base + gradients + states + step.total(sizes)
        kept_by_layer = self.layer(len(self.modes) // 2).forward().extent(sizes).net
        return Peaks(peaks, after_forward - base, kept_by_layer)
