"""Adapters of low rank beside a linear layer, in the order in which peft runs them.

    y = W x + scaling * B(A(dropout(x)))                            A: (rank, in)    B: (out, rank)

peft casts the input to the dtype of A, which is fp32 beside half-precision weights (``autocast_adapter_dtype``), and
the sum back to that of W x.  So an adapted layer keeps an input of its own, in fp32, although W is frozen.

Sources: peft 0.21, tuners/lora/layer.py (``Linear.forward``), tuners/lora/dora.py (``DoraLinearLayer.forward``),
tuners/lora/bnb.py (``Linear4bit.forward``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.elementwise import add, dropout, scale
from memplan.operators.layout import copy
from memplan.operators.products import project

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor
    from memplan.specs.adapter import Lora


def adapted(t: Tape, x: Tensor, base: Tensor, lora: Lora, *, quantised: bool) -> Tensor:
    """The result `base` of a linear layer on `x`, with an adapter's added; recorded within the layer's scope."""
    low = t.numerics.parameters
    dtype = "fp32" if lora.dtype == "fp32" else low
    if quantised:
        base = copy(t, base)
    given = x
    if not (quantised and t.numerics.autocast):
        x = t.cast(x, dtype)
    t.hold_in_module(given, x)  # by the call and by a variable
    out_features = base.shape[-1]
    assert isinstance(out_features, int)
    bent = scale(t, low_rank(t, dropout(t, x, lora.dropout), lora.rank, out_features, dtype))
    if quantised and t.numerics.autocast is None:
        bent = t.cast(bent, base.dtype)
    return t.cast(add(t, base, bent), base.dtype)


def low_rank(t: Tape, x: Tensor, rank: int, out_features: int, dtype: str) -> Tensor:
    """``B(A(x))``: keeps `x` for A and the product of `rank` numbers a row for B."""
    for name, rows in (("lora_A", rank), ("lora_B", out_features)):
        with t.scope(name):
            width = x.shape[-1]
            assert isinstance(width, int)
            weight = t.parameter("weight", (rows, width), of_adapter=True, dtype=dtype)
            x = project(t, x, weight, None, rows)
    return x
