"""Operators that work element by element.

What each keeps follows tools/autograd/derivatives.yaml of PyTorch 2.13: a product keeps the other factor, ``silu`` and
``gelu`` their input, ``tanh``, ``relu`` and ``rsqrt`` their result, sums and casts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.sizes import Shape, num_bytes
from memplan.operators.tape import Gradient, Op, Tape, Tensor, elements

if TYPE_CHECKING:
    from collections.abc import Callable

    Activation = Callable[[Tape, Tensor], Tensor]

_RANK = {"bool": 0, "int64": 1, "fp16": 2, "bf16": 2, "fp32": 3}


def promoted(*dtypes: str) -> str:
    """The dtype that arithmetic on these gives (fp16 with bf16 gives fp32)."""
    best = max(dtypes, key=_RANK.__getitem__)
    return "fp32" if {"fp16", "bf16"} <= set(dtypes) else best


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an operation on `a` and `b`; a dimension 1 stretches."""
    if len(a) < len(b):
        a, b = b, a
    padded = (1,) * (len(a) - len(b)) + b
    return tuple(y if x == 1 else x for x, y in zip(a, padded, strict=True))


def _reduced(x: Tensor, shape: Shape, dtype: str, *, computed: bool) -> Gradient:
    """Gradient of `x` in an operation of `shape` and `dtype`: computed at full size, then summed and cast to `x`."""
    same_shape, same_dtype = x.shape == shape, x.dtype == dtype
    if same_shape and same_dtype:
        return Gradient(x, alias=not computed)
    full = num_bytes(shape, dtype)
    if computed:
        return Gradient(x, computed_at=full)
    return Gradient(x)


def add(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a + b``: keeps nothing; both gradients are the incoming one where the shapes agree."""
    shape, dtype = broadcast(a.shape, b.shape), promoted(a.dtype, b.dtype)
    gradients = [_reduced(x, shape, dtype, computed=False) for x in (a, b)]
    return t.op("add", (a, b), shape, dtype=dtype, gradients=gradients, flops=elements(a))


def add_into(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a += b``: the same as `add` on the storage of `a`."""
    out = Tensor(len(t.tensors), a.shape, a.dtype, a.storage, a.requires_grad or b.requires_grad)
    t.tensors.append(out)
    gradients = tuple(_reduced(x, a.shape, a.dtype, computed=False) for x in (a, b) if x.requires_grad)
    t.ops.append(Op("add_", t.module, (a, b), (out,), (), False, gradients, (), (), elements(a), ""))
    return out


def sub(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a - b``: keeps nothing; the gradient of `a` is the incoming one, that of `b` is computed."""
    shape, dtype = broadcast(a.shape, b.shape), promoted(a.dtype, b.dtype)
    gradients = [_reduced(a, shape, dtype, computed=False), _reduced(b, shape, dtype, computed=True)]
    return t.op("sub", (a, b), shape, dtype=dtype, gradients=gradients, flops=elements(a))


def add_in_place(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a += b`` for equal shapes: the result lies on the storage of `a`; both gradients are the incoming one."""
    out = a._replace(number=len(t.tensors), requires_grad=a.requires_grad or b.requires_grad)
    t.tensors.append(out)
    gradients = tuple(Gradient(x, alias=True) for x in (a, b) if x.requires_grad)
    t.ops.append(Op("add_", t.module, (a, b), (out,), (), False, gradients, (), (), elements(a), ""))
    return out


def add_scalar(t: Tape, a: Tensor) -> Tensor:
    """``a + number``: keeps nothing; the gradient is the incoming one."""
    return t.op("add", (a,), a.shape, gradients=[Gradient(a, alias=True)], flops=elements(a))


def mul(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a * b``: keeps the factor that the other's gradient needs."""
    shape, dtype = broadcast(a.shape, b.shape), promoted(a.dtype, b.dtype)
    keeps = [kept for kept, other in ((a, b), (b, a)) if other.requires_grad]
    gradients = [_reduced(x, shape, dtype, computed=True) for x in (a, b)]
    return t.op(
        "mul",
        (a, b),
        shape,
        dtype=dtype,
        keeps=keeps,
        gradients=gradients,
        flops=elements(a),
        reason="a product keeps each factor for the gradient of the other",
    )


def scale(t: Tape, x: Tensor) -> Tensor:
    """``x * number`` or ``x / number``: keeps nothing."""
    return t.op("mul (scalar)", (x,), x.shape, flops=elements(x))


def neg(t: Tape, x: Tensor) -> Tensor:
    """``-x``: keeps nothing."""
    return t.op("neg", (x,), x.shape, flops=elements(x))


def power(t: Tape, x: Tensor) -> Tensor:
    """``x.pow(n)``: keeps `x`; its backward holds ``x.pow(n - 1)`` and n times that beside the result.

    ``grad * (n * x.pow(n - 1))`` is one C++ expression, whose temporaries live to its end (pow_backward in
    torch/csrc/autograd/FunctionsManual.cpp).  In fp32 under autocast.
    """
    x = t.autocast_fp32(x)
    return t.op(
        "pow",
        (x,),
        x.shape,
        keeps=(x,),
        gradients=[Gradient(x, scratch=(x.bytes, x.bytes))],
        flops=elements(x),
        reason="the derivative of a power needs the base",
    )


def clamp(t: Tape, x: Tensor, *, sides: int) -> Tensor:
    """``x.clamp(a, b)``, or with one side alone: keeps `x`; its backward holds one boolean for each side."""
    return t.op(
        "clamp",
        (x,),
        x.shape,
        keeps=(x,),
        gradients=[Gradient(x, scratch=(num_bytes(x.shape, "bool"),) * sides)],
        flops=elements(x),
        reason="the derivative of clamp needs its input",
    )


def clamp_in_place(t: Tape, x: Tensor) -> Tensor:
    """``x.clamp_(a, b)``: autograd copies `x` before it is overwritten, because the derivative needs it."""
    if t.evaluation:
        return x
    kept = t.op("clone", (x,), x.shape, gradients=())
    return t.op(
        "clamp",
        (x,),
        x.shape,
        keeps=(kept,),
        flops=elements(x),
        reason="the derivative of clamp needs its input",
    )


def shaken(t: Tape, x: Tensor) -> Tensor:
    """``x *= torch.empty_like(x).uniform_(a, b)``: keeps the noise; the result lies on the storage of `x`.

    In training alone.
    """
    if t.evaluation:
        return x
    noise = t.op("uniform", (x,), x.shape, gradients=())
    out = x._replace(number=len(t.tensors))
    t.tensors.append(out)
    gradients = (Gradient(x),) if x.requires_grad else ()
    keeps = (noise,) if x.requires_grad else ()
    reason = "a product keeps each factor for the gradient of the other"
    t.ops.append(Op("mul_", t.module, (x, noise), (out,), keeps, False, gradients, (), (), elements(x), reason))
    return out


def keeps_input(t: Tape, name: str, x: Tensor) -> Tensor:
    """An activation function that keeps its input: ``silu``, ``gelu`` (exact or tanh)."""
    return t.op(
        name, (x,), x.shape, keeps=(x,), flops=elements(x).times(8), reason=f"the derivative of {name} needs its input"
    )


def keeps_result(t: Tape, name: str, x: Tensor) -> Tensor:
    """An activation function that keeps its result: ``relu``, ``tanh``, ``sigmoid``, ``rsqrt``."""
    return t.op(
        name, (x,), x.shape, keeps_output=True, flops=elements(x), reason=f"the derivative of {name} needs its result"
    )


def gelu_new(t: Tape, x: Tensor) -> Tensor:
    """GELU by tanh, written out in Python operators (``NewGELUActivation`` in transformers): keeps five tensors.

    0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x**3)))
    """
    half = scale(t, x)
    cube = scale(t, power(t, x))
    inner = scale(t, add(t, x, cube))
    bent = keeps_result(t, "tanh", inner)
    return mul(t, half, add_scalar(t, bent))


def gelu_fast(t: Tape, x: Tensor) -> Tensor:
    """The same with the cube written as products (``FastGELUActivation``): keeps seven tensors.

    0.5 * x * (1 + tanh(x * 0.7979 * (1 + 0.044715 * x * x)))
    """
    half = scale(t, x)
    outer = scale(t, x)
    inner = add_scalar(t, mul(t, scale(t, x), x))
    bent = keeps_result(t, "tanh", mul(t, outer, inner))
    return mul(t, half, add_scalar(t, bent))


def gelu_python(t: Tape, x: Tensor) -> Tensor:
    """GELU by the error function, written out (``GELUActivation._gelu_python``): keeps three tensors.

    x * 0.5 * (1 + erf(x / sqrt(2))).  The derivative ``2 / sqrt(pi) * exp(-x.pow(2)) * grad`` is one C++ expression.
    """
    half, inner = scale(t, x), scale(t, x)
    bent = t.op(
        "erf",
        (inner,),
        x.shape,
        keeps=(inner,),
        gradients=[Gradient(inner, scratch=(x.bytes,) * 4)],
        flops=elements(x).times(8),
        reason="the derivative of erf needs its input",
    )
    return mul(t, half, add_scalar(t, bent))


def relu_squared(t: Tape, x: Tensor) -> Tensor:
    """``torch.square(relu(x))``, which is ``pow`` (aten/src/ATen/native/UnaryOps.cpp): in fp32 under autocast."""
    return power(t, keeps_result(t, "relu", x))


def _keeps_input(name: str) -> Activation:
    return lambda t, x: keeps_input(t, name, x)


def _keeps_result(name: str) -> Activation:
    return lambda t, x: keeps_result(t, name, x)


ACTIVATION_BY_NAME: dict[str, Activation] = {
    "silu": _keeps_input("silu"),
    "swish": _keeps_input("silu"),
    "gelu": _keeps_input("gelu"),
    "gelu_python": gelu_python,
    "gelu_pytorch_tanh": _keeps_input("gelu"),
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "relu": _keeps_result("relu"),
    "relu2": relu_squared,
    "tanh": _keeps_result("tanh"),
}
"""Activation functions by the name they have in a model's config."""


def dropout(t: Tape, x: Tensor, p: float) -> Tensor:
    """``F.dropout`` in training: nothing at p = 0, else CUDA's fused kernel keeps a mask of one byte an element."""
    if p == 0 or t.evaluation:
        return x
    return t.op(
        "dropout",
        (x,),
        x.shape,
        extra_outputs=(("mask", x.shape, "bool"),),
        flops=elements(x),
        reason="dropout keeps its mask, one byte an element",
    )
