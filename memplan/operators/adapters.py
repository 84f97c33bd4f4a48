"""Adapters of low rank beside a linear layer, in the order in which peft runs them.

    LoRA    y = W x + scaling * B(A(dropout(x)))                    A: (rank, in)    B: (out, rank)
    DoRA    y = W x + (g - 1) * W x' + g * B(A(x')) * scaling       x' = dropout(x)  g = m / |W + scaling * B A|

peft casts the input to the dtype of A, which is fp32 beside half-precision weights (``autocast_adapter_dtype``), and
the sum back to that of W x.  So an adapted layer keeps an input of its own, in fp32, although W is frozen.

Sources: peft 0.21, tuners/lora/layer.py (``Linear.forward``, ``Embedding.forward``), tuners/lora/variants.py
(``DoraLinearVariant``), tuners/lora/dora.py (``DoraLinearLayer``), tuners/lora/bnb.py (``Linear4bit.forward``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.operators.elementwise import add, add_scalar, dropout, mul, scale, sub
from memplan.operators.layout import copy
from memplan.operators.products import project
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor
    from memplan.specs.adapter import Lora


EMBEDDING = "embedding"
"""The name of the operator that looks rows up."""


class Base(NamedTuple):
    """The frozen layer that an adapter stands beside."""

    x: Tensor
    """Its input."""
    y: Tensor
    """Its result."""
    weight: Tensor
    """(out, in); in the dtype in which it is multiplied where it is quantised."""
    bias: Tensor | None = None
    quantised: bool = False


def adapted(t: Tape, base: Base, lora: Lora) -> Tensor:
    """The result of a linear layer with its adapter's added; recorded within the layer's scope."""
    under_autocast = t.numerics.autocast is not None
    dtype = "fp32" if lora.dtype == "fp32" else t.numerics.parameters
    result = copy(t, base.y) if base.quantised else base.y
    x = base.x if base.quantised and under_autocast else t.cast(base.x, dtype)
    t.hold_in_module(base.x, x)  # by the call and by a variable
    if lora.dora:
        total = add(t, result, _dora(t, base._replace(x=x, y=result), lora, dtype))
        return total if base.quantised and under_autocast else t.cast(total, base.y.dtype)
    bent = scale(t, _low_rank(t, dropout(t, x, lora.dropout), _weights(t, base, lora, dtype)))
    if base.quantised and not under_autocast:
        bent = t.cast(bent, result.dtype)
    return t.cast(add(t, result, bent), base.y.dtype)


def adapted_embedding(
    t: Tape, ids: Tensor, table: Tensor, x: Tensor, lora: Lora, *, scaled_by: Tensor | None
) -> Tensor:
    """The result `x` of an embedding of the weight `table` with its adapter's added; recorded within its scope.

    ``x + scaling * embedding(ids, A.T) @ B.T``, A: (rank, rows), B: (width, rank); no dropout.  The gradient of A is
    computed as that of its transpose, and copied into the layout of A.  `scaled_by`: what the embedding multiplies its
    result with.

    Raises:
        UsageError: the adapter is one of DoRA.
    """
    if lora.dora:
        raise UsageError("DoRA beside an embedding is not modelled.", "Leave embeddings out of --lora-targets.")
    dtype = "fp32" if lora.dtype == "fp32" else t.numerics.parameters
    rows, width = _dims(table)
    first = t.parameter("lora_embedding_A", (lora.rank, rows), of_adapter=True, dtype=dtype)
    second = t.parameter("lora_embedding_B", (width, lora.rank), of_adapter=True, dtype=dtype)
    transposed = t.view(first, (rows, lora.rank), copied_back=True)
    small = t.op(EMBEDDING, (ids, transposed), (*ids.shape, lora.rank), dtype=dtype, keeps=(ids,))
    t.hold_in_module(small)
    low = t.numerics.autocast
    factor = second if low is None else t.cast(second, low)  # a view of it, which autocast's cache does not take
    bent = scale(t, project(t, small, factor, None, width))
    if scaled_by is not None:
        bent = mul(t, bent, t.cast(scaled_by, bent.dtype))
    t.hold_in_module(bent)
    return t.cast(add(t, x, bent), x.dtype)


def _weights(t: Tape, base: Base, lora: Lora, dtype: str) -> tuple[Tensor, Tensor]:
    out_features, in_features = _dims(base.weight)
    found = []
    for name, shape in (("lora_A", (lora.rank, in_features)), ("lora_B", (out_features, lora.rank))):
        with t.scope(name):
            found.append(t.parameter("weight", shape, of_adapter=True, dtype=dtype))
    return found[0], found[1]


def _dims(weight: Tensor) -> tuple[int, int]:
    out_features, in_features = weight.shape
    assert isinstance(out_features, int)
    assert isinstance(in_features, int)
    return out_features, in_features


def _low_rank(t: Tape, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """``B(A(x))``: keeps `x` for A and the product of `rank` numbers a row for B."""
    for name, weight in zip(("lora_A", "lora_B"), weights, strict=True):
        with t.scope(name, x):
            x = project(t, x, weight, None, weight.shape[0])
    return x


def _dora(t: Tape, base: Base, lora: Lora, dtype: str) -> Tensor:
    """What DoRA adds to the result: ``DoraLinearLayer.forward``.

    The norm of W + scaling * B A is a constant to autograd; on the way to it B A is computed from an identity matrix
    of (in, in), with a graph that nothing uses and that lives until the layer has run.
    """
    out_features, _ = _dims(base.weight)
    weights = _weights(t, base, lora, dtype)
    with t.scope("lora_magnitude_vector"):
        magnitude_dtype = "fp32" if lora.dtype == "fp32" or base.quantised else t.numerics.parameters
        magnitude = t.parameter("weight", (out_features,), of_adapter=True, dtype=magnitude_dtype)
        plain = base.y if lora.dropout == 0 or t.evaluation else None
        x = dropout(t, base.x, lora.dropout)
        update = _update(t, weights, dtype, x.dtype)
        weight = t.op("dequantize", (), base.weight.shape, dtype=base.weight.dtype) if base.quantised else base.weight
        weight = t.cast(weight, x.dtype)
        whole = add(t, weight._replace(requires_grad=False), scale(t, update))
        norm = t.op("norm", (whole,), (out_features,))
        stretch = t.op(
            "div", (magnitude, norm), (out_features,), keeps=(norm,), dtype="fp32" if x.dtype == "fp32" else None
        )
        stretch = t.view(stretch, (1, out_features))
        small = _low_rank(t, x, weights)
        if plain is None:
            plain = project(t, x, weight, None, out_features)
        elif base.bias is not None:
            plain = sub(t, plain, base.bias)
        first = mul(t, add_scalar(t, stretch), plain)
        second = scale(t, mul(t, stretch, small))
        t.hold_in_module(update, weight, norm, stretch, small, plain, x)
        return add(t, first, second)


def _update(t: Tape, weights: tuple[Tensor, Tensor], dtype: str, result_dtype: str) -> Tensor:
    """``B(A(eye)).T`` of (out, in), which has no gradient; its graph holds the identity matrix and A of it."""
    out_features, rank = _dims(weights[1])
    _, in_features = _dims(weights[0])
    lowered = [t.autocast(weight)._replace(requires_grad=False) for weight in weights]
    eye = t.autocast(t.op("eye", (), (in_features, in_features), dtype=dtype))
    inner = t.op("linear", (eye, lowered[0]), (in_features, rank))
    made = t.op("linear", (inner, lowered[1]), (in_features, out_features))
    t.hold_in_module(eye, inner)
    return t.cast(t.view(made, (out_features, in_features)), result_dtype)
