"""Linear layers whose weight is stored in few bits (bitsandbytes): what stores it, and what a product with it needs.

==========  ============================================================================================================
nf4         half a byte a number; for each block of 64 an fp32 scale; a table of 16 numbers a weight
nf4-double  the same with scales of one byte, for each block of 256 of which there is an fp32; a table of 256 numbers
==========  ============================================================================================================

A product makes the weight again in the dtype of its input, multiplies, and lets it go.  The gradient of the input makes
it in the dtype that the weight had when it was packed, and casts that: under autocast it is there twice.  The packed
weight is all that is kept: the weight is frozen, so that its gradient needs no input.

Sources: bitsandbytes 0.50, nn/modules.py (``Linear4bit``), functional.py (``quantize_4bit``, ``dequantize_4bit``),
autograd/_functions.py (``MatMul4Bit``), backends/cuda/ops.py (``_dequant_linear_fallback``).

Left out: the kernels that multiply without making the weight again, which bitsandbytes takes for few rows (fewer than
5 always, more than 1,536 never, between them by card and shape).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.sizes import count, num_bytes
from memplan.operators.tape import Gradient, Stored

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor

BLOCK = 64
"""Numbers that share a scale (``blocksize`` of ``Params4bit``)."""

BLOCK_OF_SCALES = 256
"""Scales that share one (``quantize_blockwise`` in ``quantize_4bit`` with ``compress_statistics``)."""

SOURCE = "bitsandbytes.nn.Params4bit"


def stored_4bit(num: int, *, double: bool) -> tuple[Stored, ...]:
    """The tensors that hold a weight of `num` elements in NF4."""
    blocks = -(-num // BLOCK)
    packed = Stored("packed, two numbers a byte", ((num + 1) // 2, 1), "uint8", SOURCE)
    table = Stored("the 16 numbers of NF4", (16,), "fp32", SOURCE)
    if not double:
        return packed, Stored("scales of blocks of 64", (blocks,), "fp32", SOURCE), table
    return (
        packed,
        Stored("scales of blocks of 64, in a byte", (blocks,), "uint8", SOURCE),
        table,
        Stored("mean of the scales", (), "fp32", SOURCE),
        Stored("scales of blocks of 256 scales", (-(-blocks // BLOCK_OF_SCALES),), "fp32", SOURCE),
        Stored("the 256 numbers of scales", (256,), "fp32", SOURCE),
    )


def quantised_linear(t: Tape, x: Tensor, out_features: int, *, bias: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """A linear layer with a weight in NF4, recorded within its scope: weight, bias and result, in the dtype of `x`."""
    in_features = x.shape[-1]
    assert isinstance(in_features, int)
    double = t.recipe.quantize == "nf4-double"
    shape = (out_features, in_features)
    num = count(shape).factor
    stored = stored_4bit(num, double=double)
    weight = t.parameter("weight", shape, trainable=False, dtype=t.numerics.parameters, stored=stored)
    dtype = x.dtype
    x = t.cast(x, t.numerics.autocast or t.numerics.parameters)
    inputs = [x, weight]
    offset = t.parameter("bias", (out_features,)) if bias else None
    if offset is not None:
        inputs.append(t.cast(offset, x.dtype))
    scales = num_bytes((-(-num // BLOCK),), "fp32")
    whole = num_bytes(shape, x.dtype)
    made_again = num_bytes(shape, weight.dtype)
    moments = ((scales, made_again),) if double else ()
    if weight.dtype != x.dtype:
        moments = (*moments, (made_again, whole))
    result = (*x.shape[:-1], out_features)
    y = t.op(
        "linear (4 bit)",
        inputs,
        result,
        keeps=(weight,),
        gradients=[Gradient(x, scratch=(whole,), moments=moments)],
        scratch=(scales, scales, whole) if double else (whole,),
        flops=count((*result, in_features)).times(2),
        reason="the gradient of the input needs the packed weight",
    )
    return weight, offset, t.cast(y, dtype)
