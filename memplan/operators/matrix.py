"""Matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.sizes import Shape, count

if TYPE_CHECKING:
    from memplan.operators.sizes import Dim
    from memplan.operators.tape import Tape, Tensor


def linear(t: Tape, x: Tensor, out_features: int, name: str, *, bias: bool = False, trainable: bool = True) -> Tensor:
    """``nn.Linear`` named `name`: weight (out, in), optional bias.

    Keeps its input for the gradient of the weight and its weight for the gradient of the input; under autocast both in
    the low-precision dtype.
    """
    in_features = x.shape[-1]
    assert isinstance(in_features, int)
    with t.scope(name):
        weight = t.parameter("weight", (out_features, in_features), trainable=trainable)
        offset = t.parameter("bias", (out_features,), trainable=trainable) if bias else None
        return project(t, x, weight, offset, out_features)


def conv1d(t: Tape, x: Tensor, out_features: int, name: str) -> Tensor:
    """GPT-2's ``Conv1D``: a linear layer whose weight is stored (in, out), with a bias."""
    in_features = x.shape[-1]
    assert isinstance(in_features, int)
    with t.scope(name):
        weight = t.parameter("weight", (in_features, out_features))
        offset = t.parameter("bias", (out_features,))
        return project(t, x, weight, offset, out_features)


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


def embedding(t: Tape, ids: Tensor, num_rows: int, width: int, name: str, *, weight: str | None = None) -> Tensor:
    """``nn.Embedding`` named `name`: keeps the ids; its gradient is dense, as large as the table."""
    with t.scope(name):
        table = t.parameter("weight", (num_rows, width), of_embedding=True)
        return t.op("embedding", (ids, table), (*ids.shape, width), dtype=table.dtype, keeps=(ids,))
