"""Output layer and loss in one: losses that never hold the logits of all tokens.

Each is one operator on the tape, which works through chunks of tokens.  What it keeps is exact; its high points are
listed one after the other, each with all that is alive in it beside the operator's inputs (see `Op.moments`).

    C   tokens of a chunk     n   tokens whose next one has a label     V   words     H   width

Beside the products, the time is that of the passes over the logits, counted in bytes a logit (`Loop.moved`): a chunk
of TRL's first loss is read and written by ten operators, a tile of its second by one kernel a pass.

The sources are named at each; the trace runs the same steps (`memplan.probes.losses`).  Left out: what the kernels of
sorting and indexing need for a moment (a few numbers a token), more than a few numbers a word beside the logits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.operators.layout import copy, take
from memplan.operators.losses import PREDICTING, divide
from memplan.operators.sizes import BYTES_PER_ELEMENT, Size, at_most, count, more_than, num_bytes, power_of_two
from memplan.operators.tape import Loop
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.operators.sizes import Dim, Shape
    from memplan.operators.tape import Tape, Tensor

PAIRS = "b*(s-1)"
"""The same, in a row."""

CHUNK_TOKENS = 256
"""Tokens of a chunk in TRL 1.7 to 1.14 (``_CHUNKED_LM_HEAD_CHUNK_SIZE`` in trainer/sft_trainer.py)."""
TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Of a tile in TRL 1.16 (kernels/chunked_logprob.py, ``_CHUNKED_LOGPROB_CHUNK_SIZE`` in trainer/utils.py)."""


class OutputLayer(NamedTuple):
    """What turns hidden states into logits."""

    weight: Tensor
    bias: Tensor | None
    softcapped: bool
    """Whether logits are bent by tanh."""


def product_flops(tokens: Shape, weight: Tensor) -> Size:
    """FLOPs of one product of `tokens` hidden states with the weight of the output layer."""
    return count((*tokens, *weight.shape)).times(2)


def _num_gradients(*inputs: Tensor) -> int:
    return sum(x.requires_grad for x in inputs)


def chunked_loss(t: Tape, hidden: Tensor, head: OutputLayer, labels: Tensor, num_items: Tensor) -> Tensor:
    """256 tokens at a time, each chunk computed again in the backward pass: what is kept are the hidden states alone.

    ``_chunked_cross_entropy_loss`` of TRL 1.14 (trainer/sft_trainer.py).  A chunk holds its logits, log-probabilities,
    probabilities and their product in fp32, because entropy is reported.  Gradients of the weight are as large as the
    weight for every chunk, and are added up.  Ignored labels save time, not memory: tokens without one are sorted to
    the end, and their chunks are left out.
    """
    width = hidden.shape[-1]
    before = take(t, hidden, (*PREDICTING, width))
    flat = copy(t, before, ("[b>1]", *PREDICTING, width))  # a view of a single sequence
    valid = t.op("ne", (labels,), (PAIRS,), dtype="bool")
    order = t.op("argsort", (valid,), (PAIRS,), dtype="int64")
    gathered = gather(t, flat, order, (PAIRS, width))
    targets = gather(t, labels, order, (PAIRS,))
    loss = _chunks(t, gathered, head, targets)
    loss = divide(t, loss, num_items)
    t.keep_alive(hidden, valid, order)
    return loss


def gather(t: Tape, x: Tensor, index: Tensor, shape: Shape) -> Tensor:
    """``x[index]``: a copy; keeps the index."""
    return t.op("index", (x, index), shape, keeps=(index,), reason="gradients go back to where the rows came from")


def _chunks(t: Tape, hidden: Tensor, head: OutputLayer, targets: Tensor) -> Tensor:
    chunk = at_most(PAIRS, CHUNK_TOKENS)
    weight, bias, _ = head
    words = weight.shape[0]
    low = t.numerics.autocast
    computed = low or hidden.dtype
    logits = num_bytes((chunk, words), "fp32")
    low_logits = num_bytes((chunk, words), computed)
    product = (low_logits, logits) if computed != "fp32" else (logits,)
    made = _product_inputs(hidden, weight, chunk, low)
    forward = ((*made.passing, *made.kept, low_logits), product, (logits,) * 4)
    inputs = [hidden, weight, targets] if bias is None else [hidden, weight, targets, bias]
    one_pass, element = count(("n", words)), BYTES_PER_ELEMENT[computed]
    trained = [x for x in (hidden, weight) if x.requires_grad]
    sums = [Size(3 * x.bytes.factor // CHUNK_TOKENS, ("n", *x.bytes.dims)) for x in trained]  # of every chunk
    return t.op(
        "chunks of cross-entropy",
        inputs,
        (),
        dtype="fp32",
        keeps=(hidden, weight, targets),
        loop=Loop(
            product_flops(("n",), weight).times(1 + _num_gradients(hidden, weight)),
            computed,
            forward,
            _chunks_backward(hidden, head, chunk, computed, made),
            moved=(one_pass.times(element + 40),),
            backward_moved=(one_pass.times(2 * element + 60), *sums),
            gives_views=True,
        ),
        flops=product_flops(("n",), weight),
        reason="every chunk of it is computed again",
    )


class _ProductInputs(NamedTuple):
    """Copies that a chunk makes of its factors for the product of hidden states and weight."""

    passing: tuple[Size, ...]
    """Gone with the product: what is copied once more."""
    kept: tuple[Size, ...]
    """There until the product's gradients are."""
    weights: tuple[Size, ...]
    """Those of the weight, in the order in which they are made; their gradients come in the other order."""


def _product_inputs(hidden: Tensor, weight: Tensor, chunk: Dim, low: str | None) -> _ProductInputs:
    """The weight takes the dtype of the hidden states; autocast then lowers both, where they are not as low."""
    weights = () if weight.dtype == hidden.dtype else (num_bytes(weight.shape, hidden.dtype),)
    if low in {None, hidden.dtype}:
        return _ProductInputs((), weights, weights)
    lowered = num_bytes(weight.shape, low)
    part = num_bytes((chunk, hidden.shape[-1]), low)
    return _ProductInputs(weights, (lowered, part), (*weights, lowered))


def _chunks_backward(
    hidden: Tensor, head: OutputLayer, chunk: Dim, computed: str, made: _ProductInputs
) -> tuple[tuple[Size, ...], ...]:
    """The high points of a chunk's backward, with the sums of the chunks before it.

    Gradients of the weight are transposed views: the first two give a new tensor, to which others are added in place;
    those of the hidden states are all added in place (input_buffer.cpp).  Logits that are bent keep the tanh.
    """
    weight = head.weight
    words, width = weight.shape
    several = more_than("n", CHUNK_TOKENS)
    logits = num_bytes((chunk, words), "fp32")
    low_logits = num_bytes((chunk, words), computed)
    trained = [x for x in (hidden, weight) if x.requires_grad]
    sums = [num_bytes((several, *x.shape), x.dtype) for x in trained]
    low_part = [num_bytes((chunk, width), computed)] if hidden.requires_grad else []
    part = [num_bytes((chunk, width), hidden.dtype)] if hidden.requires_grad else []
    low_weight = [num_bytes(weight.shape, computed)] if weight.requires_grad else []
    found = [
        (*sums, *made.passing, *made.kept, low_logits),
        (*sums, *made.kept, *(logits,) * (5 if head.softcapped else 4)),
        (*sums, *made.kept, low_logits, *low_part, *low_weight),
    ]
    if weight.requires_grad:
        gradients = [*reversed(made.weights), weight.bytes]  # of the copies, and of what they are copies of
        found += [(*sums, *low_part, before, after) for before, after in pairwise(gradients)]
        found.append((*sums, *part, weight.bytes, sums[-1]))
    if hidden.requires_grad:
        found.append((sums[0], *part, hidden.bytes, *(x.bytes for x in trained[1:])))
    return tuple(found)


def fused_loss(t: Tape, hidden: Tensor, head: OutputLayer, labels: Tensor, num_items: Tensor) -> Tensor:
    """Liger's fused loss: gradients of hidden states and weight are computed in the forward pass and kept.

    ``LigerFusedLinearCrossEntropyFunction`` of liger-kernel 0.8.5 (ops/fused_linear_cross_entropy.py) with its default
    ``accum_dtype=None``, on compute capability 8.0 or more.  The logits of a chunk take about as many bytes as all
    hidden states: C is b s / ceil(V / H), rounded up to a power of two.  A frozen weight has no gradient.
    In evaluation there are none, but zeros in place of that of the hidden states.
    """
    weight = head.weight._replace(requires_grad=False) if t.evaluation else head.weight
    if head.bias is not None:
        raise UsageError("Liger's fused loss is not modelled for an output layer with a bias.", "Use --loss full.")
    padded = t.op("pad", (labels,), ("b", "s+1"), dtype="int64")
    targets = copy(t, padded, ("[b>1]", "b", "s"))  # a view of a single sequence
    words, width = weight.shape
    assert isinstance(words, int)
    assert isinstance(width, int)
    share = -(-words // width)
    chunk = power_of_two("b*s", share) if share > 1 else "b*s"
    computed = t.numerics.autocast or hidden.dtype
    passes = num_bytes(("b*s", words), computed).times(3)  # read, read again, overwritten by the gradient
    loss = t.op(
        "fused linear cross-entropy",
        (hidden, weight, targets),
        (),
        dtype="fp32",
        loop=Loop(count(()).times(0), computed, made_ahead=(hidden, weight), moved=(passes,)),
        extra_outputs=(("zeros", hidden.shape, hidden.dtype),) if t.evaluation else (),
        scratch=_fused_scratch(t, hidden, weight, chunk, several=share > 1),
        flops=product_flops(("b*s",), weight).times(2 + _num_gradients(weight)),
        reason="the gradients are there when the forward pass ends",
    )
    loss = divide(t, loss, num_items)
    t.keep_alive(hidden, padded, targets)
    return loss


def _fused_scratch(t: Tape, hidden: Tensor, weight: Tensor, chunk: Dim, *, several: bool) -> tuple[Size, ...]:
    """What is alive beside the gradients when a chunk's product is computed: `several` chunks, or one."""
    words, width = weight.shape
    low = t.numerics.autocast
    in_place = low is None or hidden.dtype == weight.dtype == low
    computed = hidden.dtype if in_place else low or hidden.dtype
    always = (num_bytes(("b*s",), "fp32"), num_bytes(("b*s",), "bool"), num_bytes((chunk, words), computed))
    if in_place:
        product = computed == "fp32" and weight.requires_grad
        return (*always, weight.bytes) if product else always
    copies = 2 if weight.requires_grad and several else 1  # of a parameter autocast keeps one until the forward ends
    return (*always, *(num_bytes(weight.shape, computed),) * copies, num_bytes((chunk, width), computed))


def tiled_loss(t: Tape, hidden: Tensor, head: OutputLayer, labels: Tensor, num_items: Tensor) -> Tensor:
    """TRL's fused output layer: a tile of 4096 tokens by 32768 words at a time, computed again in the backward pass.

    ``add_fused_lm_head`` and ``ChunkedLogProbFunction`` of TRL 1.16 (trainer/utils.py, kernels/chunked_logprob.py), as
    SFTTrainer asks for it: log-probabilities, entropy and whether the label is the likeliest word.  Gradients are
    summed in fp32 and then cast.
    """
    scattered, reported = tiled_log_probabilities(t, hidden, head, labels, REPORTED)
    negative = t.op("neg", (scattered,), PREDICTING)
    total = t.op("sum", (negative,), ())
    loss = divide(t, total, t.op("clamp", (num_items,), (), dtype="int64"))
    t.keep_alive(hidden, scattered, *reported)
    return loss


REPORTED = (("entropy", "fp32"), ("is the likeliest", "bool"))
"""What SFTTrainer asks for besides, a number a token each."""


def tiled_log_probabilities(
    t: Tape, hidden: Tensor, head: OutputLayer, labels: Tensor, reported: tuple[tuple[str, str], ...]
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of the labels, (b, s-1) in fp32, and what its caller holds besides.

    `reported`: further numbers of each token and their dtypes; autograd keeps the entropy where it is among them.
    """
    width = hidden.shape[-1]
    mask = t.op("ne", (labels,), PREDICTING, dtype="bool")
    gathered = gather(t, take(t, hidden, (*PREDICTING, width)), mask, ("n", width))
    targets = gather(t, labels, mask, ("n",))
    log_probs = _tiles(t, gathered, head, targets)
    others = [t.op("masked_scatter", (mask,), PREDICTING, dtype=dtype) for name, dtype in reported]
    scattered = t.op(
        "masked_scatter", (log_probs, mask), PREDICTING, keeps=(mask,), reason="gradients are taken from where it put"
    )
    return scattered, [*others, mask]


def _tiles(t: Tape, hidden: Tensor, head: OutputLayer, targets: Tensor) -> Tensor:
    rows = at_most("n", TILE_TOKENS)
    weight, bias, _ = head
    words, width = weight.shape
    assert isinstance(words, int)
    low = t.numerics.autocast
    computed = low or hidden.dtype
    numbers = num_bytes(("n",), "fp32")
    tile = num_bytes((rows, TILE_WORDS), computed)
    part_words = min(words, TILE_WORDS)
    copies = (num_bytes((part_words, width), computed),) if computed != weight.dtype else ()
    part = (num_bytes((rows, width), computed),) if computed != hidden.dtype else ()
    inputs = [hidden, weight, targets] if bias is None else [hidden, weight, targets, bias]
    trained = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    sums = [num_bytes(x.shape, "fp32") for x in trained]
    cast = [x.bytes for x in trained if x.dtype != "fp32"]
    last = (num_bytes((words - (-(-words // TILE_WORDS) - 1) * TILE_WORDS, width), computed),) if copies else ()
    both = (*copies, *(copies if words > 2 * TILE_WORDS else last if words > TILE_WORDS else ()))
    return t.op(
        "tiles of log-probabilities",
        inputs,
        ("n",),
        dtype="fp32",
        keeps=(hidden, weight, targets),
        extra_outputs=(("log-sum-exp", ("n",), "fp32"), ("entropy", ("n",), "fp32")),
        scratch=(*(numbers,) * 7, tile, *copies, *part),
        loop=Loop(
            product_flops(("n",), weight).times(1 + _num_gradients(hidden, weight)),
            computed,
            backward_moments=((*sums, tile, *both, *part), (*sums, tile, *last, *part, *cast)),
            moved=(num_bytes(("n", words), computed),),
            backward_moved=(num_bytes(("n", words), computed).times(2),),
        ),
        flops=product_flops(("n",), weight),
        reason="every tile of it is computed again",
    )


def cut_loss(t: Tape, hidden: Tensor, head: OutputLayer, labels: Tensor, num_items: Tensor) -> Tensor:
    """Cut cross-entropy: logits live in the registers of a kernel; kept are hidden states and two numbers a token.

    ``LinearCrossEntropyFunction`` of cut-cross-entropy 25.1.1 (cce.py, cce_backward.py) with ``shift=True``, whose
    kernels take hidden states in half precision alone.
    """
    weight = head.weight
    if head.bias is not None or hidden.dtype == "fp32":
        what = "an output layer with a bias" if head.bias is not None else "hidden states in fp32"
        raise UsageError(f"Cut cross-entropy 25.1.1 does not take {what}.", "Use --loss full or chunked.")
    words, width = weight.shape
    assert isinstance(words, int)
    assert isinstance(width, int)
    pairs = t.op("nonzero", (labels,), ("n", 2), dtype="int64")
    valid = t.op("sum", (t.cast(pairs, "int32"),), ("n",), dtype="int64")
    locks = (num_bytes(("n",), "int32"), num_bytes((words,), "int32"))
    loss = t.op(
        "cut cross-entropy",
        (hidden, weight, labels, valid),
        (),
        dtype="fp32",
        keeps=(hidden, weight, labels, valid),
        extra_outputs=(("log-sum-exp", ("n",), "fp32"), ("average logits", (words,), "fp32")),
        scratch=(num_bytes(("n",), "fp32"),),
        backward_scratch=(*locks, num_bytes((words,), "int32")),
        loop=Loop(product_flops(("n",), weight).times(1 + _num_gradients(hidden, weight)), hidden.dtype),
        flops=product_flops(("n",), weight),
        reason="logits are computed again",
    )
    loss = divide(t, loss, num_items)
    t.keep_alive(hidden)
    return loss


LOSS_BY_NAME = {"chunked": chunked_loss, "fused": fused_loss, "tiled": tiled_loss, "cut": cut_loss}
"""The losses of `memplan.specs.training.LOSSES` that take the output layer in."""
