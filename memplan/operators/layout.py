"""Operators that move or rearrange elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.elementwise import promoted
from memplan.operators.sizes import Dim, Shape, Size, num_bytes
from memplan.operators.tape import Gradient, Op, Tape, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def copy(t: Tape, x: Tensor, shape: Shape | None = None) -> Tensor:
    """``contiguous()`` or ``reshape`` of something that is not: a copy, nothing kept; the gradient passes through."""
    return t.op("clone", (x,), shape or x.shape, gradients=[Gradient(x, alias=True)])


def cat(t: Tape, parts: Sequence[Tensor], shape: Shape) -> Tensor:
    """``torch.cat``: a new tensor of the widest dtype; each gradient is a slice of the incoming one, or a cast."""
    dtype = promoted(*(part.dtype for part in parts))
    return t.op("cat", parts, shape, dtype=dtype, gradients=[Gradient(x, alias=x.dtype == dtype) for x in parts])


def write_slice(t: Tape, into: Tensor, x: Tensor) -> Tensor:
    """``into[..., a:b].copy_(x)``: keeps nothing; the result lies on the storage of `into`.

    Its backward (CopySlices in torch/csrc/autograd/functions/tensor.cpp) copies the whole gradient, which becomes that
    of `into` with zeros written into the slice, and then the slice, which is cast to be that of `x`.
    """
    out = into._replace(number=len(t.tensors), requires_grad=into.requires_grad or x.requires_grad)
    t.tensors.append(out)
    part, whole = num_bytes(x.shape, into.dtype), into.bytes
    copied = (part,) * (x.dtype != into.dtype)
    gradients = (
        (Gradient(into), Gradient(x, scratch=(*copied, part)))
        if into.requires_grad
        else (Gradient(x, scratch=(*copied, whole)),)
    )
    t.ops.append(
        Op(
            "copy_ (slice)",
            t.module,
            (into, x),
            (out,),
            (),
            False,
            gradients if x.requires_grad else (),
            (),
            (),
            Size(0),
            "",
        )
    )
    return out


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
