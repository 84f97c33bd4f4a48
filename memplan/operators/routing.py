"""Operators that choose experts for tokens and bring tokens to them.

What each keeps follows tools/autograd/derivatives.yaml of PyTorch 2.13: whatever picks rows keeps where it picked them,
a grouped product its two factors and the offsets of the groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.elementwise import add_scalar
from memplan.operators.sizes import count, num_bytes
from memplan.operators.tape import Gradient, Op, Tensor, elements

if TYPE_CHECKING:
    from memplan.operators.sizes import Shape
    from memplan.operators.tape import Tape


def top_k(t: Tape, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``x.topk(k)``: the values and their int64 positions, which are kept; the gradient of `x` is mostly zeros."""
    shape = (*x.shape[:-1], k)
    values = t.op(
        "topk",
        (x,),
        shape,
        extra_outputs=(("positions", shape, "int64"),),
        flops=elements(x),
        reason="the gradient goes to the numbers that were chosen",
    )
    return values, t.ops[-1].outputs[1]


def largest(t: Tape, x: Tensor) -> Tensor:
    """``x.max(-1, keepdim=True).values``: keeps the int64 positions; the gradient of `x` is mostly zeros."""
    shape = (*x.shape[:-1], 1)
    reason = "the gradient goes to the numbers that were chosen"
    return t.op("max", (x,), shape, extra_outputs=(("positions", shape, "int64"),), flops=elements(x), reason=reason)


def sort(t: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.sort`` of whole numbers: them in order, and the int64 permutation."""
    ordered = t.op("sort", (x,), x.shape, extra_outputs=(("permutation", x.shape, "int64"),))
    return ordered, t.ops[-1].outputs[1]


def pick(t: Tape, x: Tensor, positions: Tensor, shape: Shape) -> Tensor:
    """``x[positions]``, giving `shape`: keeps the positions; its backward adds up what was picked more than once."""
    return t.op(
        "index",
        (x, positions),
        shape,
        keeps=(positions,),
        reason="the gradient goes back to the rows that were picked",
    )


def gather(t: Tape, x: Tensor, positions: Tensor) -> Tensor:
    """``x.gather(-1, positions)``: keeps the positions; the gradient of `x` is mostly zeros."""
    reason = "the gradient goes to the numbers that were chosen"
    return t.op("gather", (x, positions), positions.shape, keeps=(positions,), reason=reason)


def fill_where(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """``x.masked_fill(mask, number)``: keeps the mask."""
    reason = "no gradient goes to what is overwritten"
    return t.op("masked_fill", (x, mask), x.shape, keeps=(mask,), reason=reason, flops=elements(x))


def normalise_in_place(t: Tape, x: Tensor, *, shifted: bool = False) -> Tensor:
    """``x /= x.sum(-1, keepdim=True)``: keeps the sum, and a copy of `x` made before it is overwritten.

    `shifted`: a small number is added to the sum.

    The gradient of the sum, ``-grad * ((x / sum) / sum)``, is one C++ expression (div_tensor_other_backward in
    torch/csrc/autograd/FunctionsManual.cpp).
    """
    dtype = x.dtype if t.numerics.autocast is None else "fp32"
    shape = (*x.shape[:-1], 1)
    total = t.op("sum", (x,), shape, dtype=dtype, gradients=[Gradient(x, alias=True)], flops=elements(x))
    if shifted:
        total = add_scalar(t, total)
    before = t.op("clone", (x,), x.shape, gradients=())
    out = x._replace(number=len(t.tensors))
    t.tensors.append(out)
    wide = num_bytes(x.shape, dtype)
    of_x = Gradient(x) if dtype == x.dtype else Gradient(x, computed_at=wide)
    gradients = (of_x, Gradient(total, scratch=(wide,) * 3, computed_at=wide)) if x.requires_grad else ()
    keeps = (before, total) if x.requires_grad else ()
    reason = "the derivative of a quotient needs both"
    t.ops.append(Op("div_", t.module, (x, before, total), (out,), keeps, False, gradients, (), (), elements(x), reason))
    return out


def grouped_product(t: Tape, rows: Tensor, weight: Tensor, offsets: Tensor, shape: Shape) -> Tensor:
    """``grouped_mm``: each group of `rows` times its own matrix of `weight`, giving `shape`.

    Autocast does not know it (aten/src/ATen/autocast_mode.h): it runs in the dtype of the parameters.
    """
    rows = t.cast(rows, weight.dtype)
    keeps = [kept for kept, other in ((rows, weight), (weight, rows)) if other.requires_grad]
    return t.op(
        "grouped_mm",
        (rows, weight, offsets),
        shape,
        keeps=(*keeps, offsets),
        flops=count((*shape, rows.shape[-1])).times(2),
        reason="the gradient of the weights needs the rows, that of the rows the weights",
    )


def sum_of_chosen(t: Tape, x: Tensor) -> Tensor:
    """The sum of (b, s, k, h) over k: keeps nothing; its backward writes the gradient k times."""
    return t.op("sum", (x,), (*x.shape[:-2], x.shape[-1]), flops=elements(x))
