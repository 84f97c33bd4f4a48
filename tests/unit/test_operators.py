"""What single operators keep and need, worked out by hand from PyTorch's derivatives."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import pytest

from memplan.architectures.architecture import Piece
from memplan.memory.events import Extent, Sizes
from memplan.memory.lifetimes import PieceLifetimes
from memplan.operators.attention import fused
from memplan.operators.elementwise import add, dropout, keeps_input, mul
from memplan.operators.layout import copy, split, take
from memplan.operators.matrix import linear
from memplan.operators.normalisation import layer_norm, rms_norm
from memplan.operators.sizes import Size, allocated, bind, count, num_bytes
from memplan.operators.tape import Numerics, Tape

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.operators.tape import Tensor

TOKENS = 256
WIDTH = 512
BF16, FP32 = Numerics("bf16"), Numerics("fp32")
FULL16, FULL32 = 2 * TOKENS * WIDTH, 4 * TOKENS * WIDTH


def piece(build: Callable[[Tape, Tensor], Tensor], numerics: Numerics = BF16, attention: str = "sdpa") -> Piece:
    """A piece of one (1, 256, 512) tensor in, one out."""
    t = Tape(numerics, attention=attention)
    x = t.external("hidden", ("b", "s", WIDTH), numerics.parameters, role="hidden", requires_grad=True)
    return Piece(tape=t, hidden=x, output=build(t, x), shared={})


def extents(what: Piece, checkpointing: str = "none") -> tuple[Extent, Extent]:
    """Extents of its forward and backward pass."""
    lifetimes = PieceLifetimes(what, checkpointing=checkpointing)
    sizes = Sizes(bind(1, TOKENS))
    return sizes.extent(lifetimes.forward), sizes.extent(lifetimes.backward()[0])


def test_allocations_are_rounded_to_512_bytes() -> None:
    """CUDA's caching allocator hands out multiples of 512 bytes; nothing takes nothing."""
    assert [allocated(n) for n in (0, 1, 511, 512, 513)] == [0, 512, 512, 512, 1024]


def test_shapes_count_their_elements() -> None:
    """Numbers multiply, names stay: (b, 3, s, 5) has 15 b s elements, 30 b s bytes in bf16."""
    assert count(("b", 3, "s", 5)) == Size(15, ("b", "s"))
    assert num_bytes(("s", "b"), "bf16") == Size(2, ("b", "s"))
    assert Size(15, ("b", "s")).value({"b": 2, "s": 7}) == 210


def test_a_linear_layer_keeps_its_input() -> None:
    """Its input (256 KiB) stays for the weight's gradient and y comes beside it; the backward leaves dx, dW and db."""
    forward, backward = extents(piece(lambda t, x: linear(t, x, WIDTH, "proj", bias=True)))
    assert forward == Extent(FULL16, FULL16)
    weight, bias = 2 * WIDTH * WIDTH, 2 * WIDTH
    # + dx, dW, db, then - x and - dy
    assert backward == Extent(weight + bias - FULL16, FULL16 + weight + bias)


def test_a_frozen_linear_layer_keeps_nothing_but_its_weight() -> None:
    """Without a gradient of the weight the input is free to go: one activation in, one out."""
    forward, backward = extents(piece(lambda t, x: linear(t, x, WIDTH, "proj", trainable=False)))
    assert forward.net == 0
    assert backward == Extent(0, FULL16)


def test_a_sum_keeps_nothing_and_passes_its_gradient_on() -> None:
    """In x + x the two gradients are one block that adds to itself out of place, once."""
    forward, backward = extents(piece(lambda t, x: add(t, x, x)))
    assert forward == Extent(0, FULL16)
    assert backward.net == 0


def test_a_product_keeps_both_factors() -> None:
    """silu(x) * x keeps x (twice over, one storage) and silu(x)."""
    forward, _ = extents(piece(lambda t, x: mul(t, keeps_input(t, "silu", x), x)))
    assert forward.net == 2 * FULL16  # silu(x) and the result; x stays


def test_dropout_keeps_a_byte_an_element() -> None:
    """CUDA's fused dropout: a boolean mask; at p = 0 nothing happens at all."""
    forward, _ = extents(piece(lambda t, x: dropout(t, x, 0.1)))
    assert forward.net == TOKENS * WIDTH
    assert extents(piece(lambda t, x: dropout(t, x, 0.0)))[0] == Extent(0, 0)


@pytest.mark.parametrize(("numerics", "copies"), [(BF16, FULL32 + FULL16 + FULL16 - FULL16), (FP32, FULL32 + FULL32)])
def test_an_rms_norm_written_out_keeps_its_fp32_copy(numerics: Numerics, copies: int) -> None:
    """In bf16 x in fp32, y and the result instead of x, rsqrt (4 bytes a token); in fp32 x stays, y and the result."""
    forward, _ = extents(piece(lambda t, x: rms_norm(t, x, "norm"), numerics))
    assert forward.net == copies + 4 * TOKENS


def test_a_fused_layer_norm_keeps_input_and_statistics() -> None:
    """The input stays; the result and 8 bytes a token of mean and deviation come."""
    forward, _ = extents(piece(lambda t, x: layer_norm(t, x, "norm")))
    assert forward.net == FULL16 + 8 * TOKENS


def test_fused_attention_keeps_five_tensors() -> None:
    """q, k, v (one projection here), the output and 4 bytes a row and head of log-sum-exp; nothing quadratic."""
    heads, dim = 8, WIDTH // 8

    def build(t: Tape, x: Tensor) -> Tensor:
        q = t.view(linear(t, x, WIDTH, "q"), ("b", heads, "s", dim))
        return t.view(fused(t, q, q, q), ("b", "s", WIDTH))

    forward, _ = extents(piece(build))
    assert forward.net == FULL16 + FULL16 + 4 * heads * TOKENS


@pytest.mark.parametrize(
    ("head_dim", "dtype", "masked", "kept"),
    [
        (100, "bf16", False, 4 * 2 * 104 * 2 + 4 * 2),  # q, k, v and the output padded to 104; the log-sum-exp
        (100, "bf16", True, 2 * 3 * 4 * 100 + 4 * 2 * TOKENS),  # the math kernel: q, k, v and probabilities in fp32
        (98, "fp32", False, 2 * 3 * 4 * 98 + 4 * 2 * TOKENS),
        (104, "bf16", True, 4 * 2 * 104 * 2 + 4 * 2 + 2 * TOKENS),  # the memory-efficient kernel and its mask
    ],
)
def test_what_attention_keeps_where_heads_are_not_aligned(head_dim: int, dtype: str, masked: bool, kept: int) -> None:
    t = Tape(Numerics(dtype))
    q, k, v = (t.external(n, ("b", 2, "s", head_dim), dtype, role="shared", requires_grad=True) for n in "qkv")
    fused(t, q, k, v, t.external("mask", ("b", 1, "s", "s"), "bool", role="input") if masked else None)
    kept_storages = {x.storage for op in t.ops for x in op.keeps} | ({0, 1, 2} if head_dim == 104 else set())
    env = bind(1, TOKENS)
    assert sum(t.storages[n].size.value(env) for n in kept_storages) == kept * TOKENS


def test_slices_and_splits_share_storage() -> None:
    """Views allocate nothing forward; backward a slice fills a full tensor, a split one for all of its parts."""
    half = ("b", "s", WIDTH // 2)
    forward, backward = extents(piece(lambda t, x: copy(t, take(t, x, half))))
    assert forward == Extent(FULL16 // 2 - FULL16, FULL16 // 2)
    assert backward == Extent(FULL16 - FULL16 // 2, FULL16)

    def both(t: Tape, x: Tensor) -> Tensor:
        first, second = split(t, x, (half, half))
        return add(t, copy(t, first), copy(t, second))

    assert extents(piece(both))[1].net == FULL16 // 2


def test_checkpointing_keeps_the_input_and_computes_again() -> None:
    """Two linear layers: kept is x alone; the backward runs the first again and stops before the second."""

    def build(t: Tape, x: Tensor) -> Tensor:
        return linear(t, linear(t, x, WIDTH, "one"), WIDTH, "two")

    plain, saved = extents(piece(build)), extents(piece(build), "full")
    assert plain[0].net == 2 * FULL16
    assert saved[0].net == FULL16
    weights = 2 * 2 * WIDTH * WIDTH
    # again: h; then dh, dW2 (h and dy go), then dx, dW1 (x and dh go)
    assert saved[1] == Extent(weights - FULL16, max(2 * FULL16 + weights // 2, FULL16 + weights))


def test_autocast_casts_once_and_keeps_the_copy() -> None:
    """fp32 x and W: bf16 copies of both are kept; W's once for two uses; the result is bf16."""

    def build(t: Tape, x: Tensor) -> Tensor:
        first = linear(t, x, WIDTH, "proj")
        return add(t, first, linear(t, x, WIDTH, "proj"))

    what = piece(build, Numerics("fp32", "bf16"))
    forward, _ = extents(what)
    assert what.output.dtype == "bf16"
    copies_of_x, copy_of_weight, result = 2 * FULL16, 2 * WIDTH * WIDTH, FULL16
    assert forward.net == copies_of_x + copy_of_weight + result - FULL32


def test_runs_of_segments_compose() -> None:
    """Equal runs have their highest point in the first or in the last, as n single ones in a row have."""
    for one in (Extent(3, 5), Extent(-2, 4), Extent(0, 1)):
        assert one.repeated(4) == reduce(Extent.then, [one] * 4)
    assert Extent(3, 5).repeated(0) == Extent(0, 0)
