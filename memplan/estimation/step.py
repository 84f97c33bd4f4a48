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
from typing import TYPE_CHECKING, Any

from memplan.architectures.architecture import record
from memplan.architectures.heads import SMOOTHED
from memplan.errors import UsageError
from memplan.memory.events import Event, Row, Segment, Sizes, maximum
from memplan.memory.in_backward import updating
from memplan.memory.lifetimes import WITHOUT_GRAPH, PieceLifetimes
from memplan.memory.model_states import ModelStates, Tensors
from memplan.memory.tied import waiting
from memplan.operators.sizes import num_bytes
from memplan.operators.tape import Batch, Numerics
from memplan.specs.training import DISTILLATION, OPTIMIZERS, PRECISIONS, checkpointed_layers
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence, Set

    from memplan.architectures.architecture import Architecture, Piece, Recording
    from memplan.memory.optimizers import InBackward
    from memplan.specs.recipe import Recipe
    from memplan.specs.training import Setup

FORWARD = "forward"
LOSS = "loss"
BACKWARD = "backward"
CLIP = "gradient clip"
OPTIMIZER = "optimizer step"
INSTANTS = (FORWARD, LOSS, BACKWARD, CLIP, OPTIMIZER)
"""The instants of a step at which memory can be at its highest, in order."""
REFERENCE = "reference forward"
TEACHER = "teacher forward"
COMPANIONS = (REFERENCE, TEACHER)
"""One more, of steps in which a frozen model runs beside the trained one, between its forward pass and the loss."""

EVALUATION = "evaluation"
GENERATION = "generation"
"""What comes between two steps."""

STEM = -1
HEAD = -2
"""Places in `Part.places` that are no layers."""


class Part(NamedTuple):
    """A segment run once for each of `places`."""

    instant: str
    segment: Segment
    places: tuple[int, ...]
    """The layers it runs for, by number, or `STEM` or `HEAD`; one entry a run."""
    companion: Companion | None = None
    """Whose layers they are; None: those of the model that is trained."""


class Companion(NamedTuple):
    """A frozen model that runs in every micro-step, without a graph, after the forward pass of the trained one."""

    instant: str
    """When it runs: one of `COMPANIONS`."""
    label: str
    """What its modules are listed under."""
    recording: Recording
    """Made with ``grad=False``."""
    reason: str
    """Why its parameters are there."""
    is_second: bool = True
    """Whether it is a model of its own; else the trained one without its adapters."""
    result: str = ""
    """What of it is held, with all else that it hands out, until the loss is there; empty: nothing."""


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

    @property
    def highest_of_passes(self) -> Any:
        """The highest of forward and backward passes."""
        highest: Any = 0
        for name, value in self.by_instant.items():
            if name not in {CLIP, OPTIMIZER}:
                highest = maximum(highest, value)
        return highest

    @property
    def at_evaluation(self) -> bool:
        """Whether an evaluation needs more than any instant of the step."""
        highest = max(self.by_instant.get(EVALUATION, 0), self.by_instant.get(GENERATION, 0))
        return bool(highest > max(self.by_instant[name] for name in INSTANTS))


class Recordings:
    """The recordings of one architecture, each made once: a plan looks at many setups of the same model."""

    def __init__(self, architecture: Architecture, teacher: Architecture | None = None) -> None:
        """`teacher`: the model that is distilled, read without dropout."""
        self.architecture = architecture
        self.teacher = teacher
        self._recordings: dict[tuple[Any, ...], Recording] = {}
        self._pieces: dict[tuple[Any, ...], PieceLifetimes] = {}
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._programs: dict[tuple[Any, ...], StepProgram] = {}

    def recording(self, setup: Setup, *, evaluation: bool = False) -> Recording:
        """The tapes under the dtypes and the attention of `setup`, in training or in evaluation mode."""
        return self._recorded(setup, setup.recipe, evaluation=evaluation)

    def companion(self, setup: Setup) -> Companion | None:
        """The frozen model that runs beside the one that is trained; None where none does.

        Raises:
            UsageError: a teacher is missing, or has another vocabulary.
        """
        if setup.objective == DISTILLATION:
            return self._teacher(setup)
        if not setup.has_reference:
            return None
        recipe = setup.recipe
        disabled = recipe if recipe.lora is None else recipe._replace(disabled=True)
        recording = self._recorded(setup, disabled, grad=False)
        reason = "its log-probabilities are compared with"
        return Companion(REFERENCE, "reference model", recording, reason, is_second=recipe.lora is None)

    def _teacher(self, setup: Setup) -> Companion:
        if self.teacher is None:
            raise UsageError("Distillation needs a teacher, and none was read.", "Say --teacher MODEL.")
        check_vocabularies(self.architecture.vocab_size, self.teacher.vocab_size, f"{setup.teacher}")
        exceeded = frozenset(w for w in self.teacher.windows if setup.seq_len > w)
        key = ("teacher", setup.teacher_numerics, setup.attention, exceeded, setup.padding)
        if key not in self._recordings:
            self._recordings[key] = record(
                self.teacher,
                Numerics(*setup.teacher_numerics),
                attention=setup.attention,
                exceeded=exceeded,
                batch=Batch(setup.padding),
                objective=setup.objective,
                grad=False,
                evaluation=True,
                caches=True,
            )
        return Companion(TEACHER, "teacher", self._recordings[key], "it is distilled", result="logits of the teacher")

    def _recorded(
        self,
        setup: Setup,
        recipe: Recipe,
        *,
        grad: bool = True,
        evaluation: bool = False,
        leaves: bool = False,
        generated_length: int | None = None,
    ) -> Recording:
        length = generated_length or setup.seq_len
        exceeded = frozenset(w for w in self.architecture.windows if length > w)
        loss = loss_of_evaluation(setup) if evaluation else setup.loss
        loss = SMOOTHED if setup.label_smoothing else loss
        generating = generated_length is not None
        how = (loss, setup.objective, recipe, grad, evaluation, leaves, generating)
        batch = Batch(setup.passes_mask, setup.is_flattened, setup.has_several_in_a_row)
        key = (setup.precision, setup.attention, exceeded, batch, *how)
        if key not in self._recordings:
            numerics = Numerics(*PRECISIONS[setup.precision])
            if generating and setup.lora is not None:  # generate of peft calls the model inside, without autocast
                numerics = numerics._replace(autocast=None)
            self._recordings[key] = record(
                self.architecture,
                numerics,
                attention=setup.attention,
                exceeded=exceeded,
                batch=batch,
                recipe=recipe,
                loss=loss,
                objective=setup.objective,
                grad=grad,
                evaluation=evaluation,
                generating=generating,
                leaves=leaves,
            )
        return self._recordings[key]

    def _reentrant(self, setup: Setup) -> Reentrant:
        """How layers run that are checkpointed with ``use_reentrant=True``.

        Raises:
            UsageError: something else than the hidden states comes into them with a gradient.
        """
        first = self._recorded(setup, setup.recipe, grad=False)
        again = self._recorded(setup, setup.recipe, leaves=True)
        if any(x.requires_grad for x in again.stem.shared.values()):
            raise UsageError(
                f"The layers of {self.architecture.model_type} share tensors that have gradients: with reentrant "
                "checkpointing PyTorch would go through their graph once for each layer, and stops.",
                "Leave --reentrant out.",
            )
        return Reentrant(first, again)

    def evaluation_layout(self, setup: Setup) -> Layout:
        """The forward pass in evaluation mode, where nothing is kept and no layer is checkpointed."""
        return self._without_checkpointing(self.recording(setup, evaluation=True))

    def generation_layout(self, setup: Setup, length: int) -> Layout:
        """The forward pass of a generation after which there are `length` tokens."""
        return self._without_checkpointing(
            self._recorded(setup, setup.recipe, evaluation=True, generated_length=length)
        )

    def _without_checkpointing(self, recording: Recording) -> Layout:
        key = (id(recording), "evaluation")
        if key not in self._layouts:
            self._layouts[key] = Layout(recording, ("none",) * len(recording.order), self._pieces)
        return self._layouts[key]

    def program(self, setup: Setup) -> StepProgram:
        """The step of `setup`; its micro-batch, accumulation and length are left open."""
        recording = self.recording(setup)
        companion = self.companion(setup)
        beside = None if companion is None else id(companion.recording)
        layout_key = (id(recording), setup.activation_checkpointing, setup.offload, setup.reentrant, beside)
        if layout_key not in self._layouts:
            modes = checkpointed_layers(setup.activation_checkpointing, len(recording.order))
            self._layouts[layout_key] = Layout(
                recording,
                modes,
                self._pieces,
                companion=companion,
                offloads=setup.offload == "activations",
                reentrant=self._reentrant(setup) if setup.reentrant else None,
            )
        key = (*layout_key, OPTIMIZERS[setup.optimizer], setup.data_parallel_size, setup.compile)
        if key not in self._programs:
            layout = self._layouts[layout_key]
            self._programs[key] = StepProgram(
                layout, OPTIMIZERS[setup.optimizer], setup.data_parallel_size, compiled=setup.compile
            )
        return self._programs[key]


class Reentrant(NamedTuple):
    """The recordings of a model whose layers are checkpointed with ``use_reentrant=True``."""

    first: Recording
    """Of the forward pass, which has no graph."""
    again: Recording
    """Of the layers as they are computed again, from a detached copy of what came in."""


def loss_of_evaluation(setup: Setup) -> str:
    """The loss of an evaluation: the one of training, but all logits at once where they are kept."""
    kept = setup.evaluation is not None and setup.evaluation.keeps_logits
    return "full" if kept or setup.loss == "full-kept" else setup.loss


class Layout:
    """Which segment of events runs where, for one choice of checkpointing."""

    def __init__(
        self,
        recording: Recording,
        modes: tuple[str, ...],
        known: dict[tuple[Any, ...], PieceLifetimes],
        *,
        companion: Companion | None = None,
        offloads: bool = False,
        reentrant: Reentrant | None = None,
    ) -> None:
        """`known`: lifetimes of pieces that other layouts have worked out, and where those of this one are put.

        `companion`: what runs without a graph while the head pauses.
        `offloads`: what goes into layers that are computed again waits on the host.
        `reentrant`: how layers run whose checkpointing is so.
        """
        self.recording = recording
        self.companion = companion
        self.modes = modes
        self.offloads = offloads
        self.reentrant = reentrant

        def lifetimes(piece: Piece, mode: str, *, owns_hidden: bool, alone: Piece | None = None) -> PieceLifetimes:
            key = (id(piece), mode, owns_hidden, offloads, alone and id(alone))
            if key not in known:
                known[key] = PieceLifetimes(
                    piece, checkpointing=mode, owns_hidden=owns_hidden, offloads=offloads, no_grad=alone
                )
            return known[key]

        before = lifetimes(recording.stem, "none", owns_hidden=True)
        self.layers: list[PieceLifetimes] = []
        self.held_by_model = False
        """Whether the result of the stem lives until the last layer has run, because a variable holds it."""
        all_held = recording.stem.tape.evaluation and recording.stem.tape.all_outputs_held
        for number, (kind, mode) in enumerate(zip(recording.order, modes, strict=True)):
            first = not self.layers
            piece, alone = recording.kinds[kind], None
            if reentrant is not None and mode == "full":
                alone = reentrant.first.kinds[reentrant.first.order[number]]
                piece = reentrant.again.kinds[reentrant.again.order[number]]
            held = before.keeps_output() or (self.holds_embedding and first) or all_held
            layer = lifetimes(piece, mode, owns_hidden=not held, alone=alone)
            if first and recording.stem.tape.holds_output and layer.owns_hidden and not layer.keeps_hidden():
                layer = lifetimes(piece, mode, owns_hidden=False, alone=alone)
                self.held_by_model = True
            before = layer
            self.layers.append(before)
        self.head = lifetimes(recording.head, "none", owns_hidden=not before.keeps_output())
        pieces = {id(x): x for x in (*self.layers, self.head)}
        lasting = frozenset(name for x in pieces.values() for name in x.kept_shared())
        key = (id(recording.stem), lasting)
        self.stem = known.setdefault(key, PieceLifetimes(recording.stem, lasting=lasting))

    @property
    def holds_embedding(self) -> bool:
        """Whether a variable of the model (``inputs_embeds``) is what holds the first hidden states to the last layer.

        In training the first layer keeps them anyway.
        """
        return self.recording.stem.tape.evaluation and bool(self.recording.order)

    @cached_property
    def states(self) -> ModelStates:
        """Parameters and gradients; the optimizer is left open."""
        return _states_of(self.recording)

    @cached_property
    def parameters(self) -> Tensors:
        """The parameters."""
        return self.states.parameters()

    @cached_property
    def gradients(self) -> Tensors:
        """One gradient for each trained parameter."""
        return self.states.gradients()

    @cached_property
    def forward(self) -> tuple[Part, ...]:
        """Ids to loss; autocast's cache goes at its end."""
        run, let_go = ((), ()) if self.companion is None else run_without_graph(self.companion)
        return (
            Part(FORWARD, self.stem.forward, (STEM,)),
            *self._layers_forward(),
            Part(FORWARD, self._release_shared(kept=False), (STEM,)),
            *((Part(FORWARD, self.stem.output_released, (STEM,)),) if self.held_by_model else ()),
            Part(LOSS, self.head.forward, (HEAD,)),
            Part(LOSS, self.stem.autocast_exit, (STEM,)),
            *self._in_layers(LOSS, lambda x: x.autocast_exit),
            Part(LOSS, self.head.autocast_exit, (HEAD,)),
            *run,
            *(() if self.head.after_pause is None else (Part(LOSS, self.head.after_pause, (HEAD,)),)),
            *let_go,
        )

    def _layers_forward(self) -> Iterator[Part]:
        """The layers, one after the other, and what variables of the model hold of them.

        What a layer returns beside its result goes when the next has run.
        """
        if not any(x.tape.in_next for x in self.layers):
            yield from self._in_layers(FORWARD, lambda x: x.forward)
            tape = self.recording.stem.tape
            if tape.evaluation and tape.all_outputs_held:
                for part in self._in_layers(FORWARD, lambda x: x.output_released):
                    yield part._replace(places=tuple(n for n in part.places if n < len(self.layers) - 1))
            return
        for number, layer in enumerate(self.layers):
            yield Part(FORWARD, layer.forward, (number,))
            if number:
                yield Part(FORWARD, self.layers[number - 1].held_into_next, (number - 1,))
        yield Part(FORWARD, self.layers[-1].held_into_next, (len(self.layers) - 1,))

    def recording_of(self, tag: str) -> Recording:
        """The recording behind the events of this tag."""
        return self.companion.recording if tag == WITHOUT_GRAPH and self.companion is not None else self.recording

    @cached_property
    def num_places(self) -> int:
        """Layers of the deepest model that runs."""
        recordings = [self.recording, *(() if self.companion is None else (self.companion.recording,))]
        return max(len(recording.order) for recording in recordings)

    @cached_property
    def companion_model(self) -> Tensors:
        """Parameters and buffers of a companion that is a model of its own; none where it is the same one."""
        companion = self.companion
        if companion is None or not companion.is_second:
            return Tensors(())
        tensors = (_states_of(companion.recording).parameters(), buffers_of(companion.recording.architecture))
        rows = [row for some in tensors for row in some.rows]
        return Tensors(tuple((_of_companion(companion, row), size, times) for row, size, times in rows))

    @cached_property
    def backward(self) -> tuple[Part, ...]:
        """Loss to gradients, in the first micro-step: gradients of parameters are born and stay."""
        return self._backward(lambda pair: pair[0])

    @cached_property
    def backward_again(self) -> tuple[Part, ...]:
        """The same in later micro-steps: gradients are added to those that are there."""
        return self._backward(lambda pair: pair[1])

    def updating(self, how: InBackward) -> tuple[Part, ...]:
        """Loss to updated parameters, where hooks update each as soon as its gradient is there."""
        known: dict[int, Segment] = {}

        def updated(pair: tuple[Segment, Segment]) -> Segment:
            if id(pair) not in known:
                known[id(pair)] = updating(*pair, how)
            return known[id(pair)]

        return self._backward(updated)

    def _backward(self, choose: Callable[[tuple[Segment, Segment]], Segment]) -> tuple[Part, ...]:
        tied = waiting(self.recording.head.tape, self.recording.stem.tape)
        return (
            Part(LOSS, choose(self.head.backward(tied)), (HEAD,)),
            *self._releasing(self._in_layers(BACKWARD, lambda x: choose(x.backward()), reverse=True)),
            Part(BACKWARD, choose(self.stem.backward(tied)), (STEM,)),
            Part(BACKWARD, self.head.loss_released, (HEAD,)),
            *(part for part in self._graph_released() if part.segment.events),
            *((Part(BACKWARD, self._release_shared(kept=True), (STEM,)),) if self.reentrant else ()),
        )

    def _graph_released(self) -> Iterator[Part]:
        """What the nodes of the graph hold goes last."""
        yield Part(BACKWARD, self.head.graph_released, (HEAD,))
        yield from self._in_layers(BACKWARD, lambda x: x.graph_released, reverse=True)
        yield Part(BACKWARD, self.stem.graph_released, (STEM,))

    def _in_layers(
        self, instant: str, segment: Callable[[PieceLifetimes], Segment], *, reverse: bool = False
    ) -> Iterator[Part]:
        numbered = list(enumerate(self.layers))
        if reverse:
            numbered.reverse()
        for _, run in groupby(numbered, key=lambda pair: id(pair[1])):
            places = list(run)
            yield Part(instant, segment(places[0][1]), tuple(number for number, _ in places))

    def _releasing(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The backward of the layers; a shared tensor goes after that of the first layer that keeps it.

        With reentrant checkpointing the functions that run layers again hold on to them, until the graph goes.
        """
        if self.reentrant:
            yield from parts
            return
        first: dict[str, int] = {}
        for number in reversed(range(len(self.modes))):
            first |= dict.fromkeys(self.layers[number].kept_shared(), number)
        early = {number for number in first.values() if number > 0}
        for part in parts:
            start = 0
            for i, number in enumerate(part.places, start=1):
                if number in early:
                    yield part._replace(places=part.places[start:i])
                    names = {name for name, user in first.items() if user == number}
                    yield Part(BACKWARD, self._release_shared(kept=True, only=names), (STEM,))
                    start = i
            if start < len(part.places):
                yield part._replace(places=part.places[start:])
        names = set(self.recording.stem.shared) - {name for name, user in first.items() if user > 0}
        yield Part(BACKWARD, self._release_shared(kept=True, only=names), (STEM,))

    def _release_shared(self, *, kept: bool, only: Set[str] | None = None) -> Segment:
        """What all layers share goes after the last layer, or after their backward where some layer keeps it.

        `only`: of those, the names given.
        """
        stem = self.recording.stem
        events = []
        done = {stem.output.storage}
        if self.holds_embedding and not kept:
            storage = stem.tape.storages[stem.output.storage]
            events.append(Event(("hidden",), storage.size, -1, self.stem.row(storage)))
            for x in stem.tape.in_model:
                events.append(Event(("", x.storage), x.bytes, -1, self.stem.row(stem.tape.storages[x.storage])))
        for name, x in stem.shared.items():
            storage = stem.tape.storages[x.storage]
            goes_now = (name in self.stem.lasting) == kept and x.storage not in self.stem.keepers
            if only is not None and name not in only:
                continue
            if goes_now and storage.role == "activation" and x.storage not in done:
                done.add(x.storage)
                events.append(Event(("", x.storage), storage.size, -1, self.stem.row(storage)))
        return Segment("shared tensors released", tuple(events))


def run_without_graph(companion: Companion) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """A forward pass of a model under ``torch.no_grad()``, and the end of what it hands out: it leaves nothing behind.

    What it hands out goes with its end, or later where the companion has a result.
    """
    recording = companion.recording
    stem = PieceLifetimes(recording.stem)
    kinds = [PieceLifetimes(piece) for piece in recording.kinds]
    head = PieceLifetimes(recording.head, result=companion.result)
    held = recording.stem.tape.holds_output or recording.stem.tape.evaluation  # inputs_embeds
    first = PieceLifetimes(recording.kinds[recording.order[0]], owns_hidden=False) if held else None
    runs = [(kind, tuple(n for n, _ in run)) for kind, run in groupby(enumerate(recording.order), key=lambda p: p[1])]
    layers = [(kinds[kind], places) for kind, places in runs]
    if first is not None:
        layers = [(first, (0,)), (layers[0][0], layers[0][1][1:]), *layers[1:]]
    pieces = [(stem, (STEM,)), *layers, (head, (HEAD,))]

    def part(segment: Segment, places: tuple[int, ...]) -> Part:
        return Part(companion.instant, segment, places, companion)

    def end(instant: str, *kinds: str) -> list[Part]:
        gone = {id(piece): piece.released_without_graph(*kinds) for piece, _ in pieces}
        return [Part(instant, gone[id(piece)], places, companion) for piece, places in pieces if gone[id(piece)].events]

    run = (
        part(stem.without_graph, (STEM,)),
        *(part(segment, places) for segment, places in _layers_without_graph(layers)),
        part(stem.released_without_graph("shared", *(("result",) if held else ())), (STEM,)),
        part(head.without_graph, (HEAD,)),
        *end(companion.instant, "cached"),
    )
    handed_out = part(head.released_without_graph("result"), (HEAD,))
    if not companion.result:
        return (*run, handed_out), ()
    return run, (handed_out._replace(instant=LOSS), *end(LOSS, "handed out"))


def _layers_without_graph(
    layers: Sequence[tuple[PieceLifetimes, tuple[int, ...]]],
) -> Iterator[tuple[Segment, tuple[int, ...]]]:
    """The layers, one after the other; what one returns beside its result goes when the next has run."""
    before: list[tuple[Segment, tuple[int, ...]]] = []
    for piece, places in layers:
        if not piece.tape.in_next:
            yield piece.without_graph, places
            continue
        gone = piece.released_without_graph("returned")
        for place in places:
            yield piece.without_graph, (place,)
            yield from before
            before = [(gone, (place,))]
    yield from before


def _of_companion(companion: Companion, row: Row) -> Row:
    module, tensor = f"{companion.label}: {row.module}", f"{row.tensor}, {companion.label}"
    return row._replace(module=module, tensor=tensor, reason=companion.reason)


def check_vocabularies(student: int, teacher: int, name: str) -> None:
    """Raise `UsageError` where a teacher's words are not those of the student (``GKDTrainer.__init__``)."""
    if student != teacher:
        raise UsageError(
            f"The model has a vocabulary of {student:,} tokens, and its teacher {name} one of {teacher:,}.",
            "Name a teacher with the same vocabulary: its distribution over all tokens is what is compared.",
        )


def _states_of(recording: Recording) -> ModelStates:
    """Parameters and gradients of a model; the optimizer is left open."""
    groups = recording.parameter_groups()
    order, in_layers = _order_of(recording, len(groups))
    return ModelStates(tuple(groups), recording.numerics.parameters, "", order, in_layers)


def buffers_of(architecture: Architecture) -> Tensors:
    """Tensors of a model that are not trained."""
    return Tensors(
        tuple(
            (Row(b.name, "buffer", "buffer", b.shape, b.dtype), num_bytes(b.shape, b.dtype), 1)
            for b in architecture.buffers
        )
    )


def _order_of(recording: Recording, num_groups: int) -> tuple[tuple[int, ...], frozenset[int]]:
    """The rows of the table of parameters in the order of the model, once for each layer; which belong to layers."""
    stem = len(recording.stem.tape.parameters)
    rows_of, end = [], stem
    for kind in recording.kinds:
        rows_of.append(range(end, end + len(kind.tape.parameters)))
        end += len(kind.tape.parameters)
    in_layers = [number for kind in recording.order for number in rows_of[kind]]
    return (*range(stem), *in_layers, *range(end, num_groups)), frozenset(range(stem, end))


class StepProgram:
    """Everything that happens to memory in a step, for any micro-batch and length.

    Laid out once for a recording and the choices that change what is kept; evaluated for as many sizes as wanted.
    """

    def __init__(self, layout: Layout, optimizer: str, data_parallel_size: int, *, compiled: bool = False) -> None:
        """`compiled`: the backward pass is one graph of ``torch.compile``, which hands out all gradients at its end."""
        self.layout = layout
        self.compiled = compiled
        self.recording = layout.recording
        self.data_parallel_size = data_parallel_size
        self.states = layout.states._replace(optimizer=optimizer)

    # -- what is there all the time ----------------------------------------------------------------------------------

    @cached_property
    def buffers(self) -> Tensors:
        """Tensors of the model that are not trained."""
        return buffers_of(self.recording.architecture)

    def inputs(self, accumulation: int) -> Tensors:
        """Ids and labels of all micro-batches of a step: the Trainer fetches them before the first forward pass."""
        seen = {s.name: s for piece in self.recording.pieces() for s in piece.tape.storages if s.role == "input"}
        rows = []
        for s in seen.values():
            times = accumulation if s.shape else min(1, accumulation)
            rows.append((Row("inputs", s.name, "input", s.shape, s.dtype), s.size, times))
        return Tensors(tuple(rows))

    @property
    def parameters(self) -> Tensors:
        """The parameters."""
        return self.layout.parameters

    def parameter_bytes(self, sizes: Sizes) -> int:
        """Bytes of all parameters on the device, a companion's among them."""
        rows = tuple(row for row in self.layout.companion_model.rows if row[0].kind == "parameter")
        return self.parameters.total(sizes) + Tensors(rows).total(sizes)

    @property
    def gradients(self) -> Tensors:
        """What is left of a backward pass: one gradient for each trained parameter, or none after updates in it."""
        return self.layout.gradients if self.states.in_backward is None else Tensors(())

    @property
    def forward(self) -> tuple[Part, ...]:
        """Ids to loss."""
        return self.layout.forward

    @cached_property
    def backward(self) -> tuple[Part, ...]:
        """Loss to gradients, in the first micro-step; or to updated parameters."""
        how = self.states.in_backward
        return self.layout.backward if how is None else self.layout.updating(how)

    @property
    def backward_again(self) -> tuple[Part, ...]:
        """The same in later micro-steps; compiled, all its gradients are there before one is added to the others."""
        return self.layout.backward if self.compiled else self.layout.backward_again

    @cached_property
    def _buckets(self) -> Tensors:
        return self.states.gradient_buckets(self.data_parallel_size)

    def resident(self, accumulation: int, *, with_states: bool) -> tuple[Tensors, ...]:
        """What is allocated during the whole step."""
        states = (self.optimizer_states,) if with_states else ()
        always = (self.parameters, self.buffers, self.layout.companion_model, self._buckets)
        return (*always, self.inputs(accumulation), *states)

    @cached_property
    def optimizer_states(self) -> Tensors:
        """What the optimizer remembers between steps."""
        return self.states.optimizer_states()

    def offloaded_bytes(self, sizes: Sizes) -> int:
        """Bytes of hidden states that wait on the host from forward to backward pass, in blocks of 512."""
        pieces = self.layout.layers if self.layout.offloads else []
        waiting = [x.piece.hidden for x in pieces if x.offloads]
        return sum(sizes[num_bytes(hidden.shape, hidden.dtype)] for hidden in waiting if hidden is not None)

    @cached_property
    def host_bytes(self) -> int:
        """Bytes of optimizer states in unified memory: on the host, where the card has no room for them."""
        return self.states.host_state_bytes()

    @cached_property
    def end_temporaries(self) -> tuple[Tensors, Tensors]:
        """What the gradient clip and the optimizer step need for a moment."""
        clip = self.states.clip_temporaries() if self.states.in_backward is None else Tensors(())
        return clip, self.states.step_temporaries()

    @cached_property
    def _fixed(self) -> tuple[int, int, int, int, int]:
        """Bytes that do not depend on the micro-batch.

        Parameters, buffers and buckets; optimizer states; gradients; temporaries of the clip; those of the update.
        """
        sizes = Sizes({})
        clip, step = self.end_temporaries
        resident = (self.parameters, self.buffers, self.layout.companion_model, self._buckets)
        always = sum(tensors.total(sizes) for tensors in resident)
        return (
            always,
            self.optimizer_states.total(sizes),
            self.gradients.total(sizes),
            clip.total(sizes),
            step.total(sizes),
        )

    @property
    def resident_bytes(self) -> int:
        """What is allocated during the whole of a step but the first, without the inputs."""
        fixed, states, *_ = self._fixed
        return fixed + states

    @property
    def end_bytes(self) -> int:
        """The highest point of gradient clip and update above what is there during the whole step."""
        _, _, gradients, clip, step = self._fixed
        return gradients + max(clip, step)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def peaks(self, sizes: Sizes, accumulation: int, *, first_step: bool = False) -> Peaks:
        """Allocated bytes at every instant of a step: the first one, or any later one."""
        fixed, states, gradients, clip, step = self._fixed
        born = states if first_step and not self.states.from_start else 0
        base: Any = fixed + self.inputs(accumulation).total(sizes) + states - born
        companion = self.layout.companion
        instants = INSTANTS if companion is None else (FORWARD, companion.instant, *INSTANTS[1:])
        peaks: dict[str, Any] = dict.fromkeys(instants, 0)

        def climb(parts: Sequence[Part], start: Any) -> Any:
            live = start
            for part in parts:
                whole = sizes.extent(part.segment).repeated(len(part.places))
                peaks[part.instant] = maximum(peaks[part.instant], live + whole.peak)
                live = live + whole.net
            return live

        after_forward = climb(self.forward, base)
        climb(self.backward, after_forward)
        if accumulation > 1:
            climb(self.backward_again, climb(self.forward, base + gradients))
        peaks[CLIP] = base + gradients + clip if self.states.in_backward is None else 0 * base  # there is none
        peaks[OPTIMIZER] = base + gradients + born + step
        middle = self.layout.layers[len(self.layout.layers) // 2]
        kept_by_layer = sizes.extent(middle.forward).net + sizes.extent(middle.autocast_exit).net
        return Peaks(peaks, after_forward - base, kept_by_layer)
