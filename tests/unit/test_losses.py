"""Losses that never hold all logits, worked out by hand: what is kept, the high points, the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from memplan.architectures.architecture import Piece, record
from memplan.architectures.heads import ALL_LOGITS
from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.memory.events import Extent, Sizes
from memplan.memory.lifetimes import PieceLifetimes
from memplan.operators.fused_losses import LOSS_BY_NAME, OutputLayer
from memplan.operators.sizes import allocated, at_most, bind, more_than, power_of_two
from memplan.operators.tape import Numerics, Tape
from memplan.specs.training import LOSSES

if TYPE_CHECKING:
    from memplan.operators.tape import Op

WIDTH, WORDS = 512, 8192
BATCH, LENGTH = 2, 1024
TOKENS = BATCH * LENGTH
PREDICTING = BATCH * (LENGTH - 1)
HIDDEN_BYTES, WEIGHT_BYTES = 2 * TOKENS * WIDTH, 2 * WORDS * WIDTH
SCALAR = 512
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
}
BERT = LLAMA | {"model_type": "bert", "max_position_embeddings": 64, "type_vocab_size": 2}


def head(loss: str, numerics: Numerics = Numerics("bf16"), *, frozen: bool = False) -> Piece:  # noqa: B008 - a value
    """The loss alone, on hidden states of (b, s, 512) and a weight of (8192, 512)."""
    t = Tape(numerics, loss=loss)
    dtype = numerics.parameters
    hidden = t.external("hidden", ("b", "s", WIDTH), dtype, role="hidden", requires_grad=True)
    weight = t.parameter("weight", (WORDS, WIDTH), trainable=not frozen)
    labels = t.external("labels", ("b", "s"), "int64", role="input")
    num_items = t.external("num_items", (), "int64", role="input")
    with t.scope("loss"):
        out = LOSS_BY_NAME[loss](t, hidden, OutputLayer(weight, None, False), labels, num_items)
    return Piece(tape=t, hidden=hidden, output=out, shared={})


def extents(piece: Piece) -> tuple[Extent, Extent, Extent]:
    """Extents of forward, of backward in the first micro-step, and in a later one."""
    lifetimes = PieceLifetimes(piece)
    sizes = Sizes(bind(BATCH, LENGTH))
    first, later = lifetimes.backward()
    return sizes.extent(lifetimes.forward), sizes.extent(first), sizes.extent(later)


def work(piece: Piece) -> Op:
    """The operator that takes the output layer in."""
    return next(op for op in piece.tape.ops if op.loop is not None)


# -- dimensions worked out from others ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "length", "share", "chunk"),
    [
        (1, 1, 16, 1),  # a chunk of one token: pow2(1)
        (4, 4096, 8, 2048),  # the example in Liger's source: 16384 tokens, V = 32000, H = 4096
        (1, 5, 2, 4),  # ceil(5 / 2) = 3, and then 4
        (1, 2, 1, 2),  # never more than all tokens
        (3, 1000, 32, 128),  # ceil(3000 / 32) = 94
    ],
)
def test_liger_rounds_a_chunk_up_to_a_power_of_two(batch: int, length: int, share: int, chunk: int) -> None:
    """next_power_of_2(ceil(b s / ceil(V / H))), but at most b s."""
    assert bind(batch, length)[power_of_two("b*s", share)] == chunk


def test_dimensions_of_arrays_are_those_of_their_numbers() -> None:
    """The formula of a grid is the formula of its points."""
    batches, lengths = np.arange(1, 9)[:, None], np.arange(1, 2000, 7)[None, :]
    names = [power_of_two("b*s", 31), at_most("n", 256), more_than("n", 256), "n", "b*s"]
    grid = bind(batches, lengths)
    for name in names:
        expected = [[bind(int(b), int(s))[name] for s in lengths[0]] for b in batches[:, 0]]
        assert np.array_equal(np.broadcast_to(grid[name], (8, lengths.size)), expected)


def test_a_dimension_that_nobody_knows_is_an_error() -> None:
    for name in ("t", "min(b, x)", "largest(b, 3)"):
        with pytest.raises((KeyError, ValueError)):
            bind(1, 1)[name]


def test_labels_that_are_ignored() -> None:
    """N is the share of b (s - 1), rounded up; exact for a share in decimals (0.07 x 100 is 7, not 8)."""
    assert bind(1, 101, 0.07)["n"] == 7
    assert bind(2, 52, 0.5)["n"] == 51
    assert bind(1, 4, 0.5)["n"] == 2
    assert bind(np.array([1, 2]), 101, 0.07)["n"].tolist() == [7, 14]


def test_ignored_labels_save_what_a_loss_leaves_out() -> None:
    """TRL's second loss keeps rows of labelled tokens alone; its first keeps all, and computes fewer chunks."""
    for loss, changes in (("tiled", True), ("chunked", False), ("fused", False)):
        forward = PieceLifetimes(head(loss)).forward
        all_of_them, half = (Sizes(bind(BATCH, LENGTH, share)).extent(forward).net for share in (1.0, 0.5))
        assert (half < all_of_them) == changes
    flops = [work(head("chunked")).flops.value(bind(BATCH, LENGTH, share)) for share in (1.0, 0.5)]
    assert flops[0] == 2 * flops[1]


# -- Liger -------------------------------------------------------------------------------------------------------------


def test_fused_keeps_both_gradients() -> None:
    """Gradients of the hidden states and of the weight, in bf16, the loss and what divides it: nothing of (n, V).

    ceil(8192 / 512) = 16 chunks of 128 tokens: 128 x 8192 logits in bf16 are alive beside the gradients, the losses
    (fp32) and the mask (a byte) of every token, and the labels shifted by one.
    """
    forward, first, later = extents(head("fused"))
    assert forward.net + HIDDEN_BYTES == HIDDEN_BYTES + WEIGHT_BYTES + SCALAR
    logits = 2 * 128 * WORDS
    labels = allocated(8 * BATCH * (LENGTH + 1)) + 8 * TOKENS
    assert forward.peak == HIDDEN_BYTES + WEIGHT_BYTES + logits + 5 * TOKENS + labels + SCALAR
    # The weight's gradient stays after the first micro-step; later ones add it to what is there and let it go.
    assert (first.net, later.net) == (SCALAR, SCALAR - WEIGHT_BYTES)  # that of the loss goes last


def test_fused_without_a_gradient_of_the_weight() -> None:
    """A frozen output layer (LoRA) needs none: one product less, and V H numbers."""
    frozen, trained = head("fused", frozen=True), head("fused")
    assert extents(trained)[0].net - extents(frozen)[0].net == WEIGHT_BYTES
    product = 2 * TOKENS * WORDS * WIDTH
    env = bind(BATCH, LENGTH)
    assert [work(x).flops.value(env) for x in (frozen, trained)] == [2 * product, 3 * product]
    assert work(trained).loop is not None
    assert work(trained).loop.backward_flops.value(env) == 0  # type: ignore[union-attr]


def test_fused_under_autocast_casts_the_weight_for_every_product() -> None:
    """fp32 gradients; in bf16 logits, two copies of the weight (one is autocast's cache) and one of a chunk."""
    forward, _, _ = extents(head("fused", Numerics("fp32", "bf16")))
    kept = 2 * HIDDEN_BYTES + 2 * WEIGHT_BYTES
    labels = allocated(8 * BATCH * (LENGTH + 1)) + 8 * TOKENS
    alive = 2 * 128 * WORDS + 2 * WEIGHT_BYTES + 2 * 128 * WIDTH + 5 * TOKENS
    assert forward.peak == kept + alive + labels + SCALAR


# -- TRL ---------------------------------------------------------------------------------------------------------------


def test_chunked_keeps_the_hidden_states_and_two_indices() -> None:
    """The n rows that predict, their order and their labels; b s rows of hidden states go."""
    forward, _, _ = extents(head("chunked"))
    rows = allocated(2 * PREDICTING * WIDTH)
    indices = 2 * allocated(8 * PREDICTING)
    assert forward.net + HIDDEN_BYTES == rows + indices + SCALAR


def test_chunked_has_four_fp32_tensors_of_a_chunk_at_once() -> None:
    """Logits, log-probabilities, probabilities and their product: 4 x 4 x 256 x 8192 bytes, whatever the batch."""
    loop = work(head("chunked")).loop
    assert loop is not None
    env = bind(BATCH, LENGTH)
    assert max(sum(size.value(env) for size in moment) for moment in loop.moments) == 16 * 256 * WORDS


def test_chunked_adds_up_gradients_of_the_weight() -> None:
    """From the second chunk on there are three of them for a moment: the sum so far, the new one, their sum."""
    loop = work(head("chunked")).loop
    assert loop is not None
    one, many = bind(1, 257), bind(BATCH, LENGTH)  # n = 256 is one chunk
    adding = loop.backward_moments[-2]
    part, rows = 2 * 256 * WIDTH, 2 * PREDICTING * WIDTH
    assert sum(size.value(many) for size in adding) == 3 * WEIGHT_BYTES + part + rows
    assert sum(size.value(one) for size in adding) == WEIGHT_BYTES + part


def test_tiled_sums_gradients_in_fp32_and_casts_them() -> None:
    """The end of the backward: both sums in fp32, both gradients in bf16, and the tile of 2046 x 32768 numbers."""
    loop = work(head("tiled")).loop
    assert loop is not None
    env = bind(BATCH, LENGTH)
    rows = 2 * PREDICTING * WIDTH
    tile = 2 * PREDICTING * 32768
    assert sum(size.value(env) for size in loop.backward_moments[-1]) == 3 * rows + 3 * WEIGHT_BYTES + tile


def test_tiled_keeps_two_numbers_a_token() -> None:
    """Beside rows, labels and mask: log-sum-exp and entropy in fp32."""
    forward, _, _ = extents(head("tiled"))
    rows, labels, mask = (allocated(n * PREDICTING) for n in (2 * WIDTH, 8, 1))
    assert forward.net + HIDDEN_BYTES == rows + labels + mask + 2 * allocated(4 * PREDICTING) + 2 * SCALAR


# -- cut cross-entropy -------------------------------------------------------------------------------------------------


def test_cut_keeps_two_numbers_a_token_and_one_a_word() -> None:
    """Hidden states, log-sum-exp (fp32) and position (int64) of every token, the average logit of every word."""
    forward, _, _ = extents(head("cut"))
    assert forward.net == allocated(4 * PREDICTING) + allocated(8 * PREDICTING) + 4 * WORDS + SCALAR


@pytest.mark.parametrize("numerics", [Numerics("fp32"), Numerics("fp32", "bf16")])
def test_cut_takes_half_precision_alone(numerics: Numerics) -> None:
    with pytest.raises(UsageError, match="fp32"):
        head("cut", numerics)


# -- models ------------------------------------------------------------------------------------------------------------


def test_gradients_made_ahead_are_counted_once() -> None:
    """The sum of what all segments leave is the same as with all logits: one gradient a parameter."""
    full, fused = (record(read_architecture(LLAMA, "config"), Numerics("bf16"), loss=x) for x in ("full", "fused"))
    assert [p.name for p in full.parameters()] == [p.name for p in fused.parameters()]


def test_losses_are_those_that_are_recorded() -> None:
    assert {*ALL_LOGITS, *LOSS_BY_NAME} == set(LOSSES)


@pytest.mark.parametrize(
    ("config", "loss", "message"),
    [
        ({"model_type": "gpt2"}, "fused", "no fused loss for gpt2"),
        (BERT, "chunked", "another task"),
        ({"model_type": "gptj"}, "cut", "bias"),
    ],
)
def test_losses_that_a_model_cannot_have(config: dict[str, object], loss: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        record(read_architecture(config, "config"), Numerics("bf16"), attention="eager", loss=loss)
