"""Linear layers whose weight is stored in 8 bits (LLM.int8(), Dettmers et al., 2022).

A byte a number and an fp32 scale for each output.  The input is cast to fp16, its rows are quantised, the product of
bytes is summed in int32, scaled to fp16 and cast.  Unlike a layer of 4 bits it holds on to its input, although the
backward pass has no use for it, and not by autograd's means: neither checkpointing nor its own backward lets it go, but
only the end of the graph, when the backward pass is over.  The gradient of the input makes the weight again in the
input's dtype.

Sources: bitsandbytes 0.50, autograd/_functions.py (``MatMul8bitLt``), backends/cuda/ops.py (``int8_vectorwise_quant``,
``int8_mm_dequant``), backends/default/ops.py (``int8_mixed_scaled_mm``), nn/modules.py (``Linear8bitLt``).

Left out: columns with outliers (numbers of 6 and more), which are multiplied in half precision.  How many there are
depends on the data; each keeps a column of the input more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.sizes import count, num_bytes
from memplan.operators.tape import Gradient, Stored

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor

SOURCE = "bitsandbytes.nn.Int8Params"


def stored_8bit(out_features: int, in_features: int) -> tuple[Stored, ...]:
    """The tensors that hold a weight in int8."""
    return (
        Stored("one number a byte", (out_features, in_features), "int8", SOURCE),
        Stored("scales of the outputs", (out_features,), "fp32", SOURCE),
    )


def int8_linear(t: Tape, x: Tensor, out_features: int, *, bias: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """A linear layer with a weight in int8, recorded within its scope: weight, bias and result, in the dtype of `x`."""
    in_features = x.shape[-1]
    assert isinstance(in_features, int)
    shape = (out_features, in_features)
    stored = stored_8bit(out_features, in_features)
    weight = t.parameter("weight", shape, trainable=False, dtype=t.numerics.parameters, stored=stored)
    offset = t.parameter("bias", (out_features,)) if bias else None
    plain = x._replace(requires_grad=False)
    half = t.cast(plain, "fp16")
    scales = t.op("row_stats", (), x.shape[:-1], dtype="fp32")
    rows = t.op("quantised rows", (half,), x.shape, dtype="int8")
    magnitudes = t.op("abs", (half,), x.shape)
    outliers = t.op("ge", (magnitudes,), x.shape, dtype="bool")
    t.keep_alive(outliers, half)
    result = (*x.shape[:-1], out_features)
    sums = t.op("int8_linear_matmul", (rows, weight), result, dtype="int32")
    scaled = t.op("int8_mm_dequant", (sums, scales), result, dtype="fp16")
    y = t.op(
        "linear (8 bit)",
        (x, scaled),
        result,
        keeps=(weight,),
        pins=(x,),
        flops=count((*result, in_features)).times(2),
        gradients=[Gradient(x, scratch=(num_bytes(shape, x.dtype),))],
        reason="MatMul8bitLt holds on to its input",
    )
    t.keep_alive(sums, rows, scales)
    return weight, offset, y
