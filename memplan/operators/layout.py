"""Operators that move or rearrange elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.sizes import Dim, Shape, Size
from memplan.operators.tape import Gradient, Op, Tape, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def copy(t: Tape, x: Tensor, shape: Shape | None = None) -> Tensor:
    """``contiguous()`` or ``reshape`` of something that is not: a copy, nothing kept; the gradient passes through."""
    return t.op("clone", (x,), shape or x.shape, gradients=[Gradient(x, alias=True)])


def cat(t: Tape, parts: Sequence[Tensor], shape: Shape) -> Tensor:
    """``torch.cat``: a new tensor; each gradient is a slice of the incoming one."""
    return t.op("cat", parts, shape, gradients=[Gradient(part, alias=True) for part in parts])


def take(t: Tape, x: Tensor, shape: Shape) -> Tensor:
    """``x[..., a:b]`` or ``x.expand(...)``: a view whose backward is a new tensor of the size of `x`."""
    out = Tensor(len(t.tensors), shape, x.dtype, x.storage, x.requires_grad)
    t.tensors.append(out)
    t.ops.append(
        Op("slice", t.module, (x,), (out,), (), False, (Gradient(x),) if x.requires_grad else (), (), (), Size(0), "")
    )
    return out


def split(t: Tape, x: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """``x.split(...)`` or ``chunk``: views; the backward of all of them at once is one new tensor."""
    outs = []
    for shape in shapes:
        out = Tensor(len(t.tensors), shape, x.dtype, x.storage, x.requires_grad)
        t.tensors.append(out)
        outs.append(out)
    t.ops.append(
        Op(
            "split",
            t.module,
            (x,),
            tuple(outs),
            (),
            False,
            (Gradient(x),) if x.requires_grad else (),
            (),
            (),
            Size(0),
            "",
        )
    )
    return tuple(outs)


def repeat_heads(t: Tape, x: Tensor, heads: Dim, times: int) -> Tensor:
    """``repeat_kv``: (b, kv, s, d) to (b, heads, s, d), a copy where `times` > 1; the backward sums.

    A single head is shown `times` times without a copy (``expand``, and a ``reshape`` that has nothing to move).
    """
    if times == 1:
        return x
    b, kv_heads, s, d = x.shape
    if kv_heads == 1:
        return take(t, x, (b, heads, s, d))
    return t.op("repeat_kv", (x,), (b, heads, s, d))
