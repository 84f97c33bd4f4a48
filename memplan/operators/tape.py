"""What does a piece of a model compute, and what does autograd keep of it?

A `Tape` is the recording of one piece (the embedding, one layer, the loss head): tensors, parameters and operators in
the order in which PyTorch runs them.  Recording is what a model description does; everything else (parameter tables,
bytes kept for the backward pass, momentary bytes, timelines, FLOPs) is read off the tape.

Vocabulary of the recording

=============  ======================================================================================================
tensor         a shape and a dtype on a *storage*; views share the storage of what they view
kept           tensors an operator saves for its backward pass (``SavedVariable`` in PyTorch's autograd)
gradient       how the gradient of one input comes about: a new tensor, or the very storage of the incoming gradient
scratch        bytes needed for a moment while the operator (or its backward) runs
=============  ======================================================================================================

Only what requires a gradient keeps anything, exactly as in derivatives.yaml: a linear layer keeps its input when its
weight is trained, and its weight when a gradient flows to its input.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memplan.operators.sizes import Shape, Size, count, num_bytes
from memplan.specs.recipe import EVERYTHING
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memplan.specs.recipe import Recipe


PRODUCTS = frozenset({"linear", "bmm", "grouped_mm", "attention kernel"})
"""Operators that multiply matrices: a compiler runs them once; the rest it may fuse, and compute again."""
PAUSE = "pause"
"""The name of the operator that stands for what else runs meanwhile (see `Tape.pause`)."""
CACHED = "cat (cache)"
"""The name of the operator that puts keys or values into a cache."""
ATTENTION_KERNEL = "attention kernel"
"""The name of fused attention, whatever the kernel."""
MODULES_TO_SAVE = "modules_to_save"
"""Under this name peft keeps the trained copy of a module beside the frozen original."""


class Numerics(NamedTuple):
    """The dtypes of a run."""

    parameters: str
    """dtype of the parameters: ``fp32``, ``bf16`` or ``fp16``."""
    autocast: str | None = None
    """dtype of autocast's low-precision operators, None where autocast is off."""


class Batch(NamedTuple):
    """How sequences lie in a micro-batch."""

    padded: bool = False
    """Whether a mask is passed because it holds padding."""
    flattened: bool = False
    """Whether they lie end to end in one row, and position ids are passed."""
    several: bool = False
    """Whether such a row holds more than one."""

    @property
    def masked(self) -> bool:
        """Whether what a token attends to depends on more than its place in the row."""
        return self.padded or self.several


ROWS = Batch()
"""A row for each, without padding."""


class Tensor(NamedTuple):
    """A value on the tape."""

    number: int
    """Position in the tape's table of tensors."""
    shape: Shape
    dtype: str
    storage: int
    """Which storage it lies on; views share it."""
    requires_grad: bool

    @property
    def bytes(self) -> Size:
        """Bytes of its elements (of a view: of the part it shows)."""
        return num_bytes(self.shape, self.dtype)


class Storage(NamedTuple):
    """A block of memory."""

    number: int
    size: Size
    role: str
    """``parameter``, ``buffer``, ``input``, ``shared`` (made by an earlier piece) or ``activation``."""
    module: str
    """Path of the module that makes it, within its piece."""
    name: str
    """What it holds, named after the operator that makes it."""
    shape: Shape
    dtype: str
    cached: bool = False
    """True of autocast's low-precision copies of parameters, which its cache holds until the region ends."""


class Stored(NamedTuple):
    """A tensor that holds some of a quantised weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str


class Parameter(NamedTuple):
    """A row of the table of parameters."""

    name: str
    shape: tuple[int, ...]
    trainable: bool
    tensor: int
    storage: int
    """Storage on the tape that recorded it."""
    of_embedding: bool = False
    """Whether it is the table of an ``nn.Embedding`` (some optimizers treat those differently)."""
    dtype: str = ""
    """In which it is stored; empty: that of the model."""
    stored: tuple[Stored, ...] = ()
    """What holds it in memory where it is quantised; empty: one tensor of its shape and dtype."""


class Gradient(NamedTuple):
    """How the gradient of one input comes about in the backward pass."""

    of: Tensor
    alias: bool = False
    """True where the gradient lies on the storage of the incoming gradient (views, plain sums)."""
    shown: bool = False
    """True where it is, besides, shown for more elements than it has (``expand``): nothing is added to it in place."""
    scratch: tuple[Size, ...] = ()
    """Bytes alive beside it while it is computed."""
    computed_at: Size | None = None
    """Its bytes as computed, where it is then cast or summed to the form of the input."""
    kept: Tensor | None = None
    """The tensor that the operator made in its forward pass and kept to hand out now, where it did."""
    moments: tuple[tuple[Size, ...], ...] = ()
    """High points in turn on the way to it: what is alive at each before it is there."""


class Loop(NamedTuple):
    """The inside of an operator that goes through its input chunk by chunk."""

    backward_flops: Size
    """Floating-point operations of its backward."""
    dtype: str
    """In which its products are computed."""
    moments: tuple[tuple[Size, ...], ...] = ()
    """Its high points in turn: what is alive at each beside its inputs, before its outputs are there."""
    backward_moments: tuple[tuple[Size, ...], ...] = ()
    """The same in its backward, before its gradients are there."""
    made_ahead: tuple[Tensor, ...] = ()
    """Inputs whose gradients the forward pass makes and keeps."""
    moved: tuple[Size, ...] = ()
    """Bytes that its kernels beside the products read and write."""
    backward_moved: tuple[Size, ...] = ()
    """The same in its backward."""
    gives_views: bool = False
    """Whether gradients of weights come from linear layers inside, as transposed views of products."""


class Op(NamedTuple):
    """One operator."""

    name: str
    module: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    keeps: tuple[Tensor, ...]
    """What is saved for the backward pass, parameters included."""
    keeps_output: bool
    """True where an output is among what is kept: then it has to be computed before it can be kept."""
    gradients: tuple[Gradient, ...]
    scratch: tuple[Size, ...]
    backward_scratch: tuple[Size, ...]
    """Bytes alive during the whole of its backward."""
    flops: Size
    """Floating-point operations of the forward pass (one multiply-add is two)."""
    reason: str
    """Why it keeps what it keeps."""
    pins: tuple[Tensor, ...] = ()
    """What it holds on to behind autograd's back (as attributes of its node): it stays until the graph goes."""
    loop: Loop | None = None
    """What an operator that goes chunk by chunk does inside."""


class Span(NamedTuple):
    """A run of operators that can be recomputed by itself."""

    name: str
    start: int
    stop: int
    """Position after its last operator."""
    inputs: tuple[Tensor, ...]


class Tape:
    """The recording of one piece of a model."""

    embedded: Tensor | None = None
    """What the embedding of the tokens gave."""

    def __init__(  # noqa: PLR0913, PLR0915 - one argument and statement for each thing that is recorded
        self,
        numerics: Numerics,
        *,
        attention: str = "sdpa",
        exceeded: frozenset[int] = frozenset(),
        batch: Batch = ROWS,
        recipe: Recipe = EVERYTHING,
        prefix: str = "",
        loss: str = "full",
        objective: str = "lm",
        classes: Any = None,
        grad: bool = True,
        evaluation: bool = False,
        generating: bool = False,
        window: int | None = None,
        enters_a_leaf: bool = False,
        caches: bool = False,
    ) -> None:
        self.generating = generating
        """Whether the piece predicts one token after the other from a key-value cache; it implies `evaluation`."""
        self.window = window
        """Tokens that a layer's key-value cache is limited to, None where it holds all."""
        self.in_cache: list[Tensor] = []
        """What the key-value cache holds of this piece."""
        self.numerics = numerics
        self.grad = grad
        """Whether autograd records; False within ``torch.no_grad()``."""
        self.objective = objective
        """What is trained for: one of `memplan.specs.training.OBJECTIVES`."""
        self.classes = classes
        """Of a model that tells them apart (`memplan.architectures.classifiers.Classes`)."""
        self.recipe = recipe
        """What is trained."""
        self.prefix = prefix
        """Path of the piece in the model, ending in a dot; empty for what is no layer."""
        self.asked: dict[tuple[str, str], Any] = {}
        """What the recipe was asked about this piece, (question, name within the piece), and its answers."""
        self.attention = attention
        """Attention implementation: ``eager``, ``sdpa`` or ``flash``."""
        self.loss = loss
        """How the loss of a language model is computed: one of `memplan.specs.training.LOSSES`, or ``smoothed``."""
        self.exceeded = exceeded
        """Attention windows that are shorter than the sequence."""
        self.batch = batch
        """How sequences lie in the micro-batch."""
        self.evaluation = evaluation
        """Whether the piece runs in evaluation mode and under ``torch.no_grad``: no dropout, and nothing is kept."""
        self.enters_a_leaf = enters_a_leaf
        """Whether the hidden states that come in are a leaf of the graph (reentrant checkpointing detaches them)."""
        self.caches = caches
        """Whether the model hands out a cache of keys and values with its result (``use_cache=True``)."""
        self.minds_padding = False
        """Whether the description did something about it."""
        self.tensors: list[Tensor] = []
        self.storages: list[Storage] = []
        self.parameters: list[Parameter] = []
        self._parameter_of: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.spans: list[Span] = []
        self.outlive: list[Tensor] = []
        """What the caller of the model holds until the backward pass is over."""
        self.holds_output = False
        """Whether a variable of the model holds what this piece hands on until the last layer has run."""
        self.returned: list[Tensor] = []
        """What the piece returns beside its output, for nobody."""
        self.in_model: list[Tensor] = []
        """What variables of the model hold until the last layer returns."""
        self.in_next: list[Tensor] = []
        """What a variable of the model holds until the next layer returns."""
        self.all_outputs_held = False
        """Whether the model holds what each layer hands on until the last one returns; it counts in evaluation."""
        self._path: list[str] = []
        self._held: list[list[Tensor]] = [[]]
        self._casts: dict[tuple[int, str], Tensor] = {}

    # -- where we are ------------------------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        """Path of the module being recorded."""
        return ".".join(self._path)

    @contextmanager
    def scope(self, name: str, *held: Tensor) -> Iterator[None]:
        """Record what follows as part of the submodule `name`; variables of its caller hold `held` until it returns."""
        self._path.append(name)
        self._held.append(list(held))
        try:
            yield
        finally:
            self._let_variables_go()
            self._path.pop()

    @property
    def keys(self) -> str:
        """The dimension of keys and values: the sequence; of a cache, all that it holds and what is new."""
        if not self.generating:
            return "s"
        return "l" if self.window is None else f"in {self.window}"

    @property
    def keys_before(self) -> str:
        """How many of them the cache has had before."""
        return "l-1" if self.window is None else f"before {self.window}"

    # -- values ------------------------------------------------------------------------------------------------------

    def _new(
        self, shape: Shape, dtype: str, *, role: str, name: str, requires_grad: bool, cached: bool = False
    ) -> Tensor:
        storage = Storage(len(self.storages), num_bytes(shape, dtype), role, self.module, name, shape, dtype, cached)
        self.storages.append(storage)
        tensor = Tensor(len(self.tensors), shape, dtype, storage.number, requires_grad)
        self.tensors.append(tensor)
        return tensor

    def ask(self, question: str, name: str) -> Any:
        """What the recipe answers for a module or parameter of this piece, `name` being its path within the piece.

        Layers of one kind for which the answers are the same are recorded once.
        """
        answer = getattr(self.recipe, question)(self.prefix + name)
        self.asked[question, name] = answer
        return answer

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        trainable: bool = True,
        absolute: bool = False,
        of_embedding: bool = False,
        of_adapter: bool = False,
        dtype: str | None = None,
        stored: tuple[Stored, ...] = (),
    ) -> Tensor:
        """A weight of the current module; the same full name twice is the same weight (tied).

        Of a module that the recipe copies, the original is there as well, and of no use.
        """
        full = name if absolute or not self._path else f"{self.module}.{name}"
        if full in self._parameter_of:
            return self._parameter_of[full]
        dtype = dtype or self.recipe.dtype(self.numerics.parameters)
        if of_adapter:
            trained = trainable and self.ask("trains_adapter", full)
        else:
            trained = trainable and self.ask("trains", full)
            if not absolute and self.ask("copies", self.module):
                self._new_parameter(full, shape, False, of_embedding, dtype, stored)
                full, trained = f"{self.module}.{MODULES_TO_SAVE}.{name}", trainable
        return self._new_parameter(full, shape, trained, of_embedding, dtype, stored)

    def _new_parameter(
        self,
        full: str,
        shape: tuple[int, ...],
        trained: bool,
        of_embedding: bool,
        dtype: str,
        stored: tuple[Stored, ...],
    ) -> Tensor:
        tensor = self._new(shape, dtype, role="parameter", name=full, requires_grad=trained)
        self._parameter_of[full] = tensor
        row = Parameter(full, shape, trained, tensor.number, tensor.storage, of_embedding, dtype, stored)
        self.parameters.append(row)
        return tensor

    def external(self, name: str, shape: Shape, dtype: str, *, role: str, requires_grad: bool = False) -> Tensor:
        """A tensor made elsewhere: an ``input`` of the step, a ``buffer``, or something ``shared`` by all layers."""
        return self._new(shape, dtype, role=role, name=name, requires_grad=requires_grad)

    def view(self, x: Tensor, shape: Shape, *, copied_back: bool = False) -> Tensor:
        """Another shape on the same storage; its gradient is a view of the incoming one.

        `copied_back`: the gradient is a copy, because it is a parameter's and has to have its layout.
        """
        out = Tensor(len(self.tensors), shape, x.dtype, x.storage, x.requires_grad)
        self.tensors.append(out)
        self._record("view", (x,), (out,), gradients=(Gradient(x, alias=not copied_back),))
        return out

    def also_returns(self, x: Tensor) -> None:
        """The layer returns this one, too (attention weights), and the model makes no use of it."""
        self.returned.append(x)

    def keep_alive(self, *tensors: Tensor) -> None:
        """These are held by a Python variable up to this point, although no operator needs them any more."""
        self._record("hold", tensors, ())

    def hold_in_module(self, *tensors: Tensor) -> None:
        """These are held by variables of the module's ``forward`` until it returns."""
        self._held[-1].extend(tensors)

    def hold_in_piece(self, tensor: Tensor) -> None:
        """A variable of the layer holds this one until it returns (``out, _ = self.attention(...)``)."""
        self._held[0].append(tensor)

    def pause(self) -> None:
        """The model has returned and autocast has ended; a reference model may run before its caller goes on."""
        self._record(PAUSE, (), ())

    def hold_in_model(self, tensor: Tensor) -> None:
        """A variable of the model's ``forward`` holds this one of the stem until the last layer returns.

        It counts in evaluation; in training what is held so long is kept by the graph, or small.
        """
        if self.evaluation:
            self.in_model.append(tensor)

    def hold_into_next(self, tensor: Tensor) -> None:
        """The layer returns this one, too, and the model holds it (``outputs = layer(...)``) until the next returns.

        It counts in evaluation; in training the graph keeps it.
        """
        if self.evaluation:
            self.in_next.append(tensor)

    def cached(self, x: Tensor, dtype: str) -> Tensor:
        """A copy of `x` in the cache that the model hands out."""
        return self.op(CACHED, (x,), x.shape, dtype=dtype)

    @property
    def handed_out(self) -> tuple[Tensor, ...]:
        """What the model hands out besides its result."""
        return tuple(op.outputs[0] for op in self.ops if op.name == CACHED)

    def close(self) -> None:
        """The piece has run."""
        self._let_variables_go()

    def _let_variables_go(self) -> None:
        held = self._held.pop()
        if held:
            self.keep_alive(*held)

    def require_gradient(self, x: Tensor) -> Tensor:
        """``x.requires_grad_(True)``: what is computed from it has a gradient from here on.

        It is a leaf of the graph, which holds it to the end of the backward pass (``AccumulateGrad``).
        """
        if self.evaluation or not self.grad or x.requires_grad:
            return x
        self.tensors[x.number] = x = x._replace(requires_grad=True)
        self._record("requires_grad_", (x,), (), keeps=(x,), reason="a leaf of the graph is held by it")
        return x

    # -- operators ---------------------------------------------------------------------------------------------------

    def op(  # noqa: PLR0913 - one keyword for each thing that an operator may do
        self,
        name: str,
        inputs: Sequence[Tensor],
        shape: Shape,
        *,
        dtype: str | None = None,
        keeps: Sequence[Tensor] = (),
        keeps_output: bool = False,
        gradients: Sequence[Gradient] | None = None,
        scratch: Sequence[Size] = (),
        backward_scratch: Sequence[Size] = (),
        flops: Size | None = None,
        reason: str = "",
        cached: bool = False,
        extra_outputs: Sequence[tuple[str, Shape, str]] = (),
        keeps_extra: bool = True,
        pins: Sequence[Tensor] = (),
        loop: Loop | None = None,
    ) -> Tensor:
        """Record an operator with one result of `shape` (and `extra_outputs` that only its backward uses).

        `gradients` defaults to a new tensor for every input that requires one; those of other inputs are dropped.
        """
        requires_grad = self.grad and not self.evaluation and any(x.requires_grad for x in inputs)
        out = self._new(
            shape, dtype or inputs[0].dtype, role="activation", name=name, requires_grad=requires_grad, cached=cached
        )
        extras = [
            self._new(extra_shape, extra_dtype, role="activation", name=f"{name} {label}", requires_grad=False)
            for label, extra_shape, extra_dtype in extra_outputs
        ]
        ahead = {
            x.number: self._new(x.shape, x.dtype, role="activation", name=f"{name} gradient", requires_grad=False)
            for x in (loop.made_ahead if loop and requires_grad else ())
            if x.requires_grad
        }
        extras += ahead.values()
        kept = list(keeps)
        if keeps_output:
            kept.append(out)
        if keeps_extra:
            kept.extend(extras)
        if gradients is None:
            gradients = [Gradient(x, kept=ahead.get(x.number)) for x in inputs]
        self._record(
            name,
            tuple(inputs),
            (out, *extras),
            keeps=tuple(kept) if requires_grad else (),
            keeps_output=bool(keeps_output or extras),
            gradients=tuple(g for g in gradients if g.of.requires_grad) if requires_grad else (),
            scratch=tuple(scratch),
            backward_scratch=tuple(backward_scratch),
            flops=flops,
            reason=reason,
            pins=tuple(pins) if requires_grad else (),
            loop=loop,
        )
        return out

    def _record(
        self,
        name: str,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        *,
        keeps: tuple[Tensor, ...] = (),
        keeps_output: bool = False,
        gradients: tuple[Gradient, ...] = (),
        scratch: tuple[Size, ...] = (),
        backward_scratch: tuple[Size, ...] = (),
        flops: Size | None = None,
        reason: str = "",
        pins: tuple[Tensor, ...] = (),
        loop: Loop | None = None,
    ) -> None:
        self.ops.append(
            Op(
                name,
                self.module,
                inputs,
                outputs,
                keeps,
                keeps_output,
                gradients,
                scratch,
                backward_scratch,
                flops if flops is not None else Size(0),
                reason,
                pins,
                loop,
            )
        )

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """``x.to(dtype)``: nothing is kept; the gradient is cast back."""
        if x.dtype == dtype:
            return x
        return self.op("to", (x,), x.shape, dtype=dtype)

    def autocast(self, x: Tensor) -> Tensor:
        """`x` as autocast hands it to a low-precision operator; copies of parameters are cached for the whole region.

        Only fp32 leaves that require a gradient are cached (cached_cast in aten/src/ATen/autocast_mode.cpp).
        """
        low = self.numerics.autocast
        if low is None or x.dtype not in {"fp32", "bf16", "fp16"} or x.dtype == low:
            return x
        if not self._is_leaf(x) or not x.requires_grad:
            return self.cast(x, low)
        key = (x.number, low)
        if key not in self._casts:
            self._casts[key] = self.op("to (autocast cache)", (x,), x.shape, dtype=low, cached=True)
        return self._casts[key]

    def _is_leaf(self, x: Tensor) -> bool:
        storage = self.storages[x.storage]
        if storage.role == "hidden":
            return self.enters_a_leaf and x.shape == storage.shape and x.dtype == "fp32"
        return self._parameter_of.get(storage.name) is x

    def autocast_fp32(self, x: Tensor) -> Tensor:
        """`x` as autocast hands it to an operator of its fp32 list."""
        if self.numerics.autocast is None:
            return x
        return self.cast(x, "fp32")

    @contextmanager
    def recomputable(self, name: str, *inputs: Tensor) -> Iterator[None]:
        """What is recorded inside can be recomputed from `inputs` (selective checkpointing)."""
        start = len(self.ops)
        yield
        self.spans.append(Span(name, start, len(self.ops), inputs))


def elements(x: Tensor) -> Size:
    """Number of elements of `x`."""
    return count(x.shape)
