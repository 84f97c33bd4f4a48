"""A model as three kinds of pieces: the stem (ids to hidden states), the layers, and the head (hidden states to loss).

Layers that are described by the same function are recorded once.  `record` turns an architecture and the choices that
change what runs (dtypes, attention implementation, windows shorter than the sequence) into tapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.architectures.classifiers import Classes
from memplan.architectures.heads import check_loss
from memplan.architectures.named import check_names
from memplan.errors import UsageError
from memplan.operators.odds import concatenated_ids
from memplan.operators.sizes import Size, num_bytes
from memplan.operators.tape import ROWS, Batch, Numerics, Parameter, Tape, Tensor
from memplan.specs.conversions import converted
from memplan.specs.recipe import EVERYTHING
from memplan.specs.values import NamedTuple, dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memplan.operators.sizes import Shape
    from memplan.specs.recipe import Recipe

    Shared = Mapping[str, Tensor]
    Stem = Callable[[Tape], tuple[Tensor, dict[str, Tensor]]]
    LayerKind = Callable[[Tape, Tensor, Shared], Tensor]
    Head = Callable[[Tape, Tensor, Shared], Tensor]


class Handed:
    """A layer that is handed only some of the tensors that layers share, because others are for layers of another type.

    It matters to checkpointing, which keeps all that a layer is handed.
    """

    def __init__(self, *, kind: LayerKind, names: tuple[tuple[str, str], ...]) -> None:
        """`names`: (the layer's name for it, its name among the shared tensors); absent ones are skipped."""
        self.kind = kind
        self.names = names

    def __call__(self, t: Tape, x: Tensor, shared: Shared) -> Tensor:
        """Record the layer."""
        return self.kind(t, x, {own: shared[name] for own, name in self.names if name in shared})


class Buffer(NamedTuple):
    """A tensor of the model that is not trained."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model computes in one training step, from token ids to the loss."""

    model_type: str
    """Hugging Face's name of the family."""
    task: str
    """``causal-lm``, ``masked-lm`` or ``features``: which head and loss."""
    stem: Stem
    """Records the embedding; gives the hidden states and what all layers share (rotary tables, masks)."""
    layers: tuple[LayerKind, ...]
    """One entry a layer; the same object twice is the same computation."""
    layer_prefix: str
    """Module path of a layer with ``{}`` for its number."""
    head: Head
    """Records everything from the last layer to the loss."""
    vocab_size: int
    max_positions: int | None
    """Longest sequence the model has positions for; None where it has no limit."""
    hidden_size: int
    usual_positions: int | None = None
    """Positions that a model without such a limit was made with; None where its config names none."""
    classes: Classes = Classes()
    """Of a model that tells them apart, in place of words."""
    buffers: tuple[Buffer, ...] = ()
    windows: frozenset[int] = frozenset()
    """The longest sequences that need no mask: `w` - 1 for layers that attend to the last `w` tokens."""
    cache_windows: tuple[int | None, ...] | None = None
    """For each layer the window that its key-value cache is limited to; None where generation is not described."""
    attentions: tuple[str, ...] = ("eager", "sdpa", "flash")
    """Attention implementations that the model has."""
    unmodelled: tuple[tuple[str, str], ...] = ()
    """(what, why) of everything that this description leaves out."""

    def check_length(self, seq_len: int, name: str) -> None:
        """Raise `UsageError` where the model, known to the user as `name`, has too few positions."""
        most = self.max_positions
        if most is not None and seq_len > most:
            raise UsageError(
                f"{name} has positions for {most} tokens, not for {seq_len}.", f"Use --seq-len {most} or less."
            )


class Piece(NamedTuple):
    """A recorded part of the model."""

    tape: Tape
    hidden: Tensor | None
    """What comes in (None for the stem)."""
    output: Tensor
    shared: Mapping[str, Tensor]
    """Tensors shared by all layers: made here (stem) or used here."""


class Recording(NamedTuple):
    """The tapes of a whole model."""

    architecture: Architecture
    numerics: Numerics
    stem: Piece
    kinds: tuple[Piece, ...]
    """The distinct layers."""
    order: tuple[int, ...]
    """For each layer of the model, which of `kinds` it is."""
    head: Piece

    @property
    def has_adapters(self) -> bool:
        """Whether adapters stand beside the weights, which are the model without them."""
        return self.stem.tape.recipe.lora is not None

    def pieces(self) -> tuple[Piece, ...]:
        """All distinct pieces."""
        return (self.stem, *self.kinds, self.head)

    def parameters(self) -> list[Parameter]:
        """The table of parameters by full name, in the model's order; a tied weight appears once."""
        table: dict[str, Parameter] = {row.name: row for row in self.stem.tape.parameters}
        for number, kind in enumerate(self.order):
            prefix = self.architecture.layer_prefix.format(number)
            for row in self.kinds[kind].tape.parameters:
                full = f"{prefix}.{row.name}"
                table[full] = row._replace(name=full)
        for row in self.head.tape.parameters:
            table.setdefault(row.name, row)
        return list(table.values())

    def parameter_groups(self) -> list[tuple[Parameter, int]]:
        """The same, with the rows of equal layers together: (row, how often); ``*`` stands for the layer's number."""
        groups = [(row, 1) for row in self.stem.tape.parameters]
        for kind, piece in enumerate(self.kinds):
            times, name = self.order.count(kind), self.pattern(kind)
            groups += [(row._replace(name=f"{name}.{row.name}"), times) for row in piece.tape.parameters]
        known = {row.name for row in self.stem.tape.parameters}
        return groups + [(row, 1) for row in self.head.tape.parameters if row.name not in known]

    def pattern(self, kind: int) -> str:
        """The path of the layers of one kind.

        ``model.layers.*``; where layers differ ``model.layers.1-31``, or ``model.layers.*[kind 2]`` where those of one
        kind do not follow each other.
        """
        prefix = self.architecture.layer_prefix
        if len(self.kinds) == 1:
            return prefix.format("*")
        first, times = self.order.index(kind), self.order.count(kind)
        if times == 1:
            return prefix.format(first)
        if set(self.order[first : first + times]) == {kind}:
            return prefix.format(f"{first}-{first + times - 1}")
        return f"{prefix.format('*')}[kind {kind + 1}]"


def record(
    architecture: Architecture,
    numerics: Numerics,
    *,
    attention: str = "sdpa",
    exceeded: frozenset[int] = frozenset(),
    batch: Batch = ROWS,
    recipe: Recipe = EVERYTHING,
    loss: str = "full",
    objective: str = "lm",
    grad: bool = True,
    evaluation: bool = False,
    generating: bool = False,
    leaves: bool = False,
    caches: bool = False,
) -> Recording:
    """Record every distinct piece of the model once.

    Layers described by the same function are the same piece where the recipe says the same of all that is in them,
    and where their hidden states are alike in dtype and in whether they require a gradient.

    `exceeded`: the windows that are shorter than the sequence (see `Architecture.windows`); `batch`: how sequences lie
    in a micro-batch; `recipe`: what is trained; `objective`: what for; `grad`: False for a run under
    ``torch.no_grad()``, of a model that nothing is trained of; `evaluation`: no dropout, and no graph; `generating`:
    tokens from a key-value cache, "s" of them at a time; `leaves`: what comes into a layer is a leaf of its graph;
    `caches`: the model hands out a cache of keys and values.

    Raises:
        UsageError: the model has no such attention or loss, or nothing that the recipe names.
    """
    check_loss(loss, architecture.model_type, architecture.task, objective)
    classes = architecture.classes._replace(num=1) if objective == "reward" else architecture.classes
    if attention not in architecture.attentions:
        raise UsageError(
            f"{architecture.model_type} has no {attention} attention in transformers.",
            f"Use --attention {' or '.join(architecture.attentions)}.",
        )

    given, recipe = recipe, converted(recipe, architecture.model_type)
    windows = (architecture.cache_windows or ()) if generating else ()

    def tape(prefix: str = "", window: int | None = None) -> Tape:
        return Tape(
            numerics,
            attention=attention,
            exceeded=exceeded,
            batch=batch,
            loss=loss,
            objective=objective,
            classes=classes,
            grad=grad,
            recipe=recipe,
            prefix=prefix,
            evaluation=evaluation,
            generating=generating,
            window=window,
            enters_a_leaf=leaves,
            caches=caches,
        )

    stem_tape = tape()
    hidden, shared = architecture.stem(stem_tape)
    embedded = stem_tape.embedded
    if embedded is not None and embedded.storage == hidden.storage:
        stem_tape.holds_output = True  # a variable of the model (inputs_embeds)
    stem = Piece(tape=stem_tape, hidden=None, output=hidden, shared=shared)

    def follow(part: LayerKind | Head, before: Tensor, prefix: str = "", window: int | None = None) -> Piece:
        t = tape(prefix, window)
        inside = t.external(
            "hidden states", before.shape, before.dtype, role="hidden", requires_grad=before.requires_grad
        )
        handed = {name for _, name in part.names} if isinstance(part, Handed) else set(shared)
        used = {
            name: t.external(name, x.shape, x.dtype, role="shared", requires_grad=x.requires_grad)
            for name, x in shared.items()
            if name in handed
        }
        output = part(t, inside, used)
        t.close()
        return Piece(tape=t, hidden=inside, output=output, shared=used)

    kinds: list[Piece] = []
    numbers_of: dict[tuple[int, str, bool, int | None], list[int]] = {}
    order = []
    for place, layer in enumerate(architecture.layers):
        prefix = f"{architecture.layer_prefix.format(place)}."
        window = windows[place] if windows else None
        alike = numbers_of.setdefault((id(layer), hidden.dtype, hidden.requires_grad, window), [])
        number = next((n for n in alike if _same_answers(kinds[n].tape, recipe, prefix)), None)
        if number is None:
            number = len(kinds)
            kinds.append(follow(_within_a_loop(layer), hidden, prefix, window))
            alike.append(number)
        hidden = kinds[number].output
        order.append(number)
    recording = Recording(
        architecture=architecture,
        numerics=numerics,
        stem=stem,
        kinds=tuple(kinds),
        order=tuple(order),
        head=follow(architecture.head, hidden),
    )
    if grad:
        check_names(recording, given, objective)
        _check_trained(recording)
    return recording


def _same_answers(known: Tape, recipe: Recipe, prefix: str) -> bool:
    """Whether the recipe says of the layer at `prefix` what it said of one that is recorded."""
    if recipe == EVERYTHING or known.prefix == prefix:
        return True
    return all(getattr(recipe, question)(prefix + name) == said for (question, name), said in known.asked.items())


def _check_trained(recording: Recording) -> None:
    if not any(row.trainable for piece in recording.pieces() for row in piece.tape.parameters):
        raise UsageError("Nothing is left to train.", "Freeze less, or add adapters with --lora-rank.")


def _within_a_loop(layer: LayerKind) -> LayerKind:
    """The layer as the model runs it: ``hidden_states = layer(hidden_states)`` holds what goes in until it returns."""
    kind = layer.kind if isinstance(layer, Handed) else layer

    def held(t: Tape, x: Tensor, shared: Shared) -> Tensor:
        t.hold_in_piece(x)
        return kind(t, x, shared)

    return Handed(kind=held, names=layer.names) if isinstance(layer, Handed) else held


def buffer_bytes(architecture: Architecture) -> Size:
    """Bytes of all buffers, unrounded."""
    return Size(sum(num_bytes(buffer.shape, buffer.dtype).factor for buffer in architecture.buffers))


def int64(t: Tape, name: str, shape: Shape) -> Tensor:
    """Token ids or labels of the micro-batch: an input of the step, or put together from several."""
    if name == "input_ids" and t.objective == "orpo":
        return concatenated_ids(t)
    return t.external(name, shape, "int64", role="input")
