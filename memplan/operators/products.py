"""Products of matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.sizes import Shape, count

if TYPE_CHECKING:
    from memplan.operators.sizes import Dim
    from memplan.operators.tape import Tape, Tensor


def project(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: Dim) -> Tensor:
    """``F.linear(x, weight, bias)``."""
    x, weight = t.autocast(x), t.autocast(weight)
    inputs = [x, weight]
    if bias is not None:
        inputs.append(t.autocast(bias))
    keeps = [kept for kept, other in ((x, weight), (weight, x)) if other.requires_grad]
    shape = (*x.shape[:-1], out_features)
    flops = count((*shape, x.shape[-1])).times(2)
    return t.op(
        "linear",
        inputs,
        shape,
        keeps=keeps,
        flops=flops,
        reason="the gradient of the weight needs the input, that of the input the weight",
    )


def matmul(t: Tape, a: Tensor, b: Tensor, shape: Shape, inner: Dim, *, autocast: bool = True) -> Tensor:
    """``torch.matmul(a, b)`` of batches of matrices, giving `shape`; `inner` is the summed dimension.  Keeps both.

    `autocast`: False within an operator that autocast has cast the inputs of already.
    """
    if autocast:
        a, b = t.autocast(a), t.autocast(b)
    keeps = [kept for kept, other in ((a, b), (b, a)) if other.requires_grad]
    flops = count((*shape, inner)).times(2)
    return t.op(
        "bmm",
        (a, b),
        shape,
        keeps=keeps,
        flops=flops,
        reason="a product keeps each factor for the gradient of the other",
    )
