"""What is allocated when, over one optimizer step?

A step is a sequence of parts; a part is a segment of allocation events that runs once for each of some layers.  The
peak is the highest point over all parts, never a sum of components:

    micro-step 1: forward, loss, backward (gradients are born)      K - 1 more: the same with gradients resident
    then: gradient clip, optimizer step, gradients released

The first step differs from every later one: optimizer states do not exist before its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from memplan.architectures.architecture import record
from memplan.memory import model_states
from memplan.memory.events import Event, Extent, Row, Segment, Sizes, maximum
from memplan.memory.lifetimes import PieceLifetimes
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


class Part(NamedTuple):
    """A segment run once for each of `places`."""

    instant: str
    segment: Segment
    places: tuple[str, ...]
    """Module paths of the pieces it runs for; one entry a run."""


@dataclass(frozen=True, kw_only=True)
class StepProgram:
    """Everything that happens to memory in a step, for any micro-batch and length.

    Built once for a model and the choices that change what runs; evaluated for as many sizes as wanted.
    """

    recording: Recording
    optimizer: str
    """The implementation."""
    data_parallel_size: int
    forward: tuple[Part, ...]
    backward: tuple[Part, ...]
    """Of the first micro-step: gradients are born."""
    backward_again: tuple[Part, ...]
    """Of later micro-steps: gradients are added to those that are there."""
    middle_layer: Segment
    """The forward pass of one layer in the middle of the model."""

    @property
    def dtype(self) -> str:
        """Dtype of the parameters."""
        return self.recording.numerics.parameters

    @property
    def parameters(self) -> model_states.Tensors:
        """The parameters."""
        return model_states.parameters(self.recording.parameters(), self.dtype)

    @property
    def gradients(self) -> model_states.Tensors:
        """Their gradients."""
        return model_states.gradients(self.recording.parameters(), self.dtype)

    @property
    def optimizer_states(self) -> model_states.Tensors:
        """The optimizer's states."""
        return model_states.optimizer_states(self.optimizer, self.recording.parameters(), self.dtype)

    @property
    def gradient_buckets(self) -> model_states.Tensors:
        """DDP's flat gradient buckets."""
        return model_states.gradient_buckets(self.recording.parameters(), self.dtype, self.data_parallel_size)

    @property
    def buffers(self) -> model_states.Tensors:
        """Tensors of the model that are not trained."""
        rows = [
            (Row(b.name, "buffer", "buffer", b.shape, b.dtype), num_bytes(b.shape, b.dtype))
            for b in self.recording.architecture.buffers
        ]
        return model_states.Tensors(tuple(rows))

    def inputs(self) -> model_states.Tensors:
        """The inputs of one micro-batch."""
        rows = {
            s.name: (Row("inputs", s.name, "input", s.shape, s.dtype), s.size)
            for piece in self.recording.pieces()
            for s in piece.tape.storages
            if s.role == "input"
        }
        return model_states.Tensors(tuple(rows.values()))

    def clip(self) -> Segment:
        """Temporaries of the gradient clip."""
        return model_states.gradient_clip(self.recording.parameters(), self.dtype)

    def step(self) -> Segment:
        """Temporaries of the optimizer step."""
        return model_states.optimizer_step(self.optimizer, self.recording.parameters(), self.dtype)

    def extent(self, parts: Sequence[Part], sizes: Sizes) -> Extent:
        """Net change and highest point of a run of parts."""
        whole = Extent(0, 0)
        for part in parts:
            whole = whole.then(part.segment.extent(sizes).repeated(len(part.places)))
        return whole


def choose(setup: Setup, architecture: Architecture) -> dict[str, Any]:
    """The choices of `setup` that change what runs, as arguments of `build`."""
    return {
        "precision": setup.precision,
        "attention": setup.attention,
        "activation_checkpointing": setup.activation_checkpointing,
        "optimizer": setup.optimizer,
        "data_parallel_size": setup.data_parallel_size,
        "exceeded": frozenset(w for w in architecture.windows if setup.seq_len > w),
    }


def build(
    architecture: Architecture,
    *,
    precision: str,
    attention: str,
    activation_checkpointing: str,
    optimizer: str,
    data_parallel_size: int,
    exceeded: frozenset[int],
) -> StepProgram:
    """Record the model and lay out its step."""
    parameters, autocast = PRECISIONS[precision]
    recording = record(architecture, Numerics(parameters, autocast), attention=attention, exceeded=exceeded)
    modes = checkpointed_layers(activation_checkpointing, len(recording.order))
    layout = _Layout(recording, modes)
    return StepProgram(
        recording=recording,
        optimizer=OPTIMIZERS[optimizer],
        data_parallel_size=data_parallel_size,
        forward=layout.forward(),
        backward=layout.backward(fresh=True),
        backward_again=layout.backward(fresh=False),
        middle_layer=layout.layer(len(modes) // 2).forward(),
    )


class _Layout:
    """Which segment runs where."""

    def __init__(self, recording: Recording, modes: tuple[str, ...]) -> None:
        self.recording = recording
        self.modes = modes
        self.stem = PieceLifetimes(recording.stem)
        self._layers: dict[tuple[int, str, bool], PieceLifetimes] = {}
        self.keys = []
        before = self.stem
        for kind, mode in zip(recording.order, modes, strict=True):
            key = (kind, mode, not before.keeps_output())
            if key not in self._layers:
                self._layers[key] = PieceLifetimes(recording.kinds[kind], checkpointing=mode, owns_hidden=key[2])
            self.keys.append(key)
            before = self._layers[key]
        self.head = PieceLifetimes(recording.head, owns_hidden=not before.keeps_output())
        self.kept_shared = {name for x in (*self._layers.values(), self.head) for name in x.kept_shared()}

    def layer(self, number: int) -> PieceLifetimes:
        """The lifetimes of one layer."""
        return self._layers[self.keys[number]]

    def _layer_parts(
        self, instant: str, segments: dict[tuple[int, str, bool], Segment], *, reverse: bool
    ) -> Iterator[Part]:
        numbered = list(enumerate(self.keys))
        if reverse:
            numbered.reverse()
        prefix = self.recording.architecture.layer_prefix
        for key, run in groupby(numbered, key=lambda pair: pair[1]):
            yield Part(instant, segments[key], tuple(prefix.format(number) for number, _ in run))

    def _release_shared(self, *, kept: bool) -> Segment:
        stem = self.recording.stem
        by_stem = self.stem.keepers()
        events = []
        done = {stem.output.storage}
        for name, x in stem.shared.items():
            storage = stem.tape.storages[x.storage]
            mine = (name in self.kept_shared) == kept and x.storage not in by_stem and storage.role == "activation"
            if mine and x.storage not in done:
                done.add(x.storage)
                kind = "activation" if kept else "temporary"
                row = Row(storage.module, storage.name, kind, storage.shape, storage.dtype, "shared by all layers")
                events.append(Event(("", x.storage), storage.size, -1, row))
        return Segment("shared tensors released", tuple(events))

    def forward(self) -> tuple[Part, ...]:
        """Ids to loss."""
        exits = {key: x.autocast_exit() for key, x in self._layers.items()}
        return (
            Part(FORWARD, self.stem.forward(), ("",)),
            *self._layer_parts(FORWARD, {key: x.forward() for key, x in self._layers.items()}, reverse=False),
            Part(FORWARD, self._release_shared(kept=False), ("",)),
            Part(LOSS, self.head.forward(), (HEAD,)),
            Part(LOSS, self.stem.autocast_exit(), ("",)),
            *self._layer_parts(LOSS, exits, reverse=False),
            Part(LOSS, self.head.autocast_exit(), (HEAD,)),
        )

    def backward(self, *, fresh: bool) -> tuple[Part, ...]:
        """Loss to the gradients of all parameters."""
        in_head = {p.name for p in self.recording.head.tape.parameters}
        tied = frozenset(in_head & {p.name for p in self.recording.stem.tape.parameters})
        return (
            Part(LOSS, self.head.backward(waiting=tied, fresh=fresh), (HEAD,)),
            *self._layer_parts(
                BACKWARD, {key: x.backward(fresh=fresh) for key, x in self._layers.items()}, reverse=True
            ),
            Part(BACKWARD, self._release_shared(kept=True), ("",)),
            Part(BACKWARD, self.stem.backward(joined=tied, fresh=fresh), ("",)),
        )


HEAD = "head"
"""Place name of the head in `Part.places`."""


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


def steady_peaks(program: StepProgram, sizes: Sizes, accumulation: int) -> Peaks:
    """The second and every later step."""
    return _peaks(program, sizes, accumulation, states_before=True)


def first_peaks(program: StepProgram, sizes: Sizes, accumulation: int) -> Peaks:
    """The first step: optimizer states are born in it."""
    return _peaks(program, sizes, accumulation, states_before=False)


def _sum(tensors: model_states.Tensors, sizes: Sizes) -> int:
    return sum(sizes[size] for _, size in tensors.rows)


def _peaks(program: StepProgram, sizes: Sizes, accumulation: int, *, states_before: bool) -> Peaks:
    states = _sum(program.optimizer_states, sizes)
    gradients = _sum(program.gradients, sizes)
    base: Any = _sum(program.parameters, sizes) + _sum(program.buffers, sizes) + _sum(program.gradient_buckets, sizes)
    base = base + _sum(program.inputs(), sizes) * accumulation
    if states_before:
        base = base + states
    peaks: dict[str, Any] = dict.fromkeys(INSTANTS, 0)
    extents: dict[Segment, Extent] = {}

    def climb(parts: Sequence[Part], start: Any) -> Any:
        live = start
        for part in parts:
            one = extents.get(part.segment)
            if one is None:
                one = extents[part.segment] = part.segment.extent(sizes)
            whole = one.repeated(len(part.places))
            peaks[part.instant] = maximum(peaks[part.instant], live + whole.peak)
            live = live + whole.net
        return live

    after_forward = climb(program.forward, base)
    climb(program.backward, after_forward)
    if accumulation > 1:
        climb(program.backward_again, climb(program.forward, base + gradients))
    resident = base + gradients
    peaks[CLIP] = resident + program.clip().extent(sizes).peak
    if not states_before:
        resident = resident + states
    peaks[OPTIMIZER] = resident + program.step().extent(sizes).peak
    return Peaks(peaks, after_forward - base, program.middle_layer.extent(sizes).net)
