"""A lower bound of the time of a piece of the model, operator by operator.

    time of an operator = max(FLOPs / peak FLOP/s of its dtype, bytes moved / memory bandwidth)

the roofline of Williams, Waterman and Patterson (CACM 2009).  Matrix products are bound by arithmetic when the
micro-batch is large and by reading their weights when it is tiny; element-wise operators by bandwidth.  A backward pass
does the FLOPs of a matrix product once for each gradient, and 2.5 times those of a fused attention kernel (Dao, 2023,
FlashAttention-2, section 3.1: five products for two).

Left out: kernel launches, the host, shapes that fill no tile, clocks below the rated ones, communication.  Real steps
take longer, mostly by a factor of 1.2 to 3; what is compared, configurations of one model on one GPU, keeps its order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.operators.sizes import Size
from memplan.operators.tape import ATTENTION_KERNEL, PRODUCTS
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from memplan.operators.tape import Op, Tape

ATTENTION_BACKWARD = 2.5
"""FLOPs of the backward of a fused attention kernel over those of its forward."""


class Speed(NamedTuple):
    """What a GPU can do at most."""

    flops_per_s: Mapping[str, float]
    """Dense FLOP/s by dtype of the factors."""
    bytes_per_s: float
    """Bandwidth of its memory."""
    launch_s: float = 0.0
    """Least time of an operator: launching its kernels."""

    def of(self, dtype: str) -> float:
        """FLOP/s of products of this dtype; where it is not known, of the next wider one that is."""
        for name in (dtype, "fp16" if dtype == "bf16" else "bf16", "fp32"):
            if name in self.flops_per_s:
                return self.flops_per_s[name]
        return max(self.flops_per_s.values())


class Work(NamedTuple):
    """FLOPs and bytes of one operator."""

    flops: Size
    dtype: str
    moved: tuple[Size, ...]


class Timed(NamedTuple):
    """A piece of the model."""

    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    spans: tuple[Work, ...]
    """What selective checkpointing computes twice."""
    saved: tuple[Work, ...]
    """The forward pass without fused attention: what checkpointing computes twice that saves what attention gives."""


def timed(tape: Tape, *, fused: bool = False) -> Timed:
    """The work of a recorded piece; `fused`: of its products alone."""
    real = [op for op in tape.ops if _computes(op) and (op.name in PRODUCTS or not fused)]
    in_span = {id(op) for span in tape.spans for op in tape.ops[span.start : span.stop]}
    return Timed(
        (*(_forward(op) for op in real), *(_inside(op.loop.dtype, op.loop.moved) for op in real if op.loop)),
        (
            *(_backward(op) for op in real if op.gradients),
            *(_inside(op.loop.dtype, op.loop.backward_moved) for op in real if op.loop and op.gradients),
        ),
        tuple(_forward(op) for op in real if id(op) in in_span),
        tuple(_forward(op) for op in real if op.name != ATTENTION_KERNEL),
    )


def _computes(op: Op) -> bool:
    """Views and holds move nothing."""
    inside = {x.storage for x in op.inputs}
    return any(x.storage not in inside for x in op.outputs)


def _forward(op: Op) -> Work:
    dtype = op.loop.dtype if op.loop else op.inputs[0].dtype if op.inputs else "fp32"
    return Work(op.flops, dtype, _merged([x.bytes for x in (*op.inputs, *op.outputs)]))


def _backward(op: Op) -> Work:
    if op.name in {"linear", "bmm", "grouped_mm"}:
        factor: float = sum(1 for g in op.gradients if g.of.number in {x.number for x in op.inputs[:2]})
    else:
        factor = ATTENTION_BACKWARD if op.name == ATTENTION_KERNEL else 1
    kept = (x.bytes for x in (*op.keeps, *op.pins))
    moved = [op.outputs[0].bytes, *kept, *(g.of.bytes for g in op.gradients if not g.alias)]
    if op.loop:
        return Work(op.loop.backward_flops, op.loop.dtype, _merged(moved))
    flops = Size(int(op.flops.factor * factor), op.flops.dims)
    return Work(flops, op.outputs[0].dtype, _merged(moved))


def _inside(dtype: str, moved: Sequence[Size]) -> Work:
    """The kernels of a loop that are no products: they run between them, and are bound by bandwidth."""
    return Work(Size(0), dtype, _merged(moved))


def _merged(sizes: Iterable[Size]) -> tuple[Size, ...]:
    by_dims: dict[tuple[str, ...], int] = {}
    for size in sizes:
        by_dims[size.dims] = by_dims.get(size.dims, 0) + size.factor
    return tuple(Size(factor, dims) for dims, factor in by_dims.items())


class Term(NamedTuple):
    """Some equal operators, timed at the rates of a `Speed`; their time is the largest of the two and a launch."""

    computing_s: float
    moving_s: float
    num: int
    """How many of them a step has; 0 launches where it is memory traffic alone."""
    launches: bool = True


def terms(work: Sequence[Work], speed: Speed, env: Mapping[str, Any], num: int) -> Iterator[Term]:
    """The operators of a piece that runs `num` times, one by one."""
    for one in work:
        moving = sum(float(size.value(env)) for size in one.moved) / speed.bytes_per_s
        yield Term(float(one.flops.value(env)) / speed.of(one.dtype), moving, num)


def seconds(work: Sequence[Work], speed: Speed, env: Mapping[str, Any]) -> Any:
    """Time of all of it, for one configuration or for arrays of them."""
    products: dict[tuple[str, ...], Any] = {}

    def value(size: Size) -> Any:
        product = products.get(size.dims)
        if product is None:
            product = products[size.dims] = Size(1, size.dims).value(env) * 1.0
        return size.factor * product

    whole: Any = 0.0
    for one in work:
        moving = sum(value(size) for size in one.moved) / speed.bytes_per_s
        computing = value(one.flops) / speed.of(one.dtype)
        whole = whole + _longest(moving, computing, speed.launch_s)
    return whole


def _longest(moving: Any, computing: Any, launch_s: float) -> Any:
    """The largest of three, of numbers or element by element."""
    if isinstance(moving, float) and isinstance(computing, float):
        return max(moving, computing, launch_s)
    import numpy as np

    return np.maximum(np.maximum(moving, computing), launch_s)
