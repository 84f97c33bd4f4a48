"""The loss head as Hugging Face computes it (transformers/loss/loss_utils.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.elementwise import add, neg, scale
from memplan.operators.layout import copy, take
from memplan.operators.tape import Gradient, Op, Tape, Tensor, elements

if TYPE_CHECKING:
    from memplan.operators.sizes import Shape

PREDICTING = ("b", "s-1")
"""The tokens that have a next one, by sequence."""


def log_softmax(t: Tape, x: Tensor) -> Tensor:
    """``F.log_softmax``: keeps its result."""
    return t.op(
        "log_softmax",
        (x,),
        x.shape,
        keeps_output=True,
        flops=elements(x).times(5),
        reason="the derivative of log-softmax needs its result",
    )


def cross_entropy(t: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """``F.cross_entropy`` over the last dimension: log-softmax, then the negative log-likelihood of the targets.

    The backward of the likelihood is a new tensor of the size of the log-probabilities, mostly zeros.
    """
    logits = t.autocast_fp32(logits)
    loss = nll_loss(t, log_softmax(t, logits), targets)
    t.keep_alive(logits)
    return loss


def nll_loss(t: Tape, log_probabilities: Tensor, *targets: Tensor) -> Tensor:
    """The mean negative log-likelihood of the targets (which may be kept as several tensors)."""
    return t.op(
        "nll_loss",
        (log_probabilities, *targets),
        (),
        keeps=(log_probabilities, *targets),
        extra_outputs=(("total weight", (), log_probabilities.dtype),),
        gradients=[Gradient(log_probabilities)],
        reason="the gradient of the loss needs the targets",
    )


def causal_lm_loss(t: Tape, logits: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
    """``ForCausalLMLoss``: fp32 copy of the logits, labels shifted by one, sum over tokens divided by `num_items`."""
    upcast = t.cast(logits, "fp32")
    padded = t.op("pad", (labels,), ("[b>1]", "b", "s+1"), dtype="int64")  # of a single sequence, what is kept
    targets = copy(t, padded, ("b", "s+[b=1]"))
    loss = cross_entropy(t, upcast, targets)
    loss = divide(t, loss, num_items)
    t.keep_alive(logits, upcast, padded)
    return loss


def masked_lm_loss(t: Tape, logits: Tensor, labels: Tensor, num_items: Tensor | None) -> Tensor:
    """``ForMaskedLMLoss`` (with `num_items`), or a plain mean over tokens where the model takes its own loss."""
    upcast = t.cast(logits, "fp32") if num_items is not None else logits
    loss = cross_entropy(t, upcast, labels)
    if num_items is not None:
        loss = divide(t, loss, num_items)
    t.keep_alive(logits, upcast)
    return loss


def smoothed_loss(t: Tape, logits: Tensor, hidden: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
    """The Trainer's own loss of smoothed labels: log-probabilities of the labels, and the sum of those of all words.

    ``LabelSmoother`` of transformers 5.23 (trainer_pt_utils.py), after the model has returned: in the dtype of the
    logits, or in fp32 under autocast, as accelerate hands them out.  A slice of a single sequence is no copy.
    Kept are the log-probabilities and, because ``gather`` saves its input, their negative.
    """
    words = logits.shape[-1]
    several: Shape = ("[b>1]", *PREDICTING)
    t.keep_alive(hidden)
    t.pause()
    if t.numerics.autocast is not None:
        logits = t.cast(logits, "fp32")
    shifted = copy(t, take(t, logits, (*PREDICTING, words)), (*several, words))
    targets = t.op("clone", (labels,), several)
    log_probs = neg(t, log_softmax(t, t.view(shifted, (*PREDICTING, words))))
    ignored = t.op("eq", (targets,), (*PREDICTING, 1), dtype="bool")
    index = t.op("clamp", (targets,), (*PREDICTING, 1))
    likelihood = gather_last(t, log_probs, index)
    total = sum_in_fp32(t, log_probs)
    likelihood = _mean_over(t, masked_fill_in_place(t, likelihood, ignored), num_items)
    spread = t.op("mul", (num_items,), (), gradients=())
    total = _mean_over(t, masked_fill_in_place(t, total, ignored), spread)
    loss = add(t, scale(t, likelihood), scale(t, total))
    t.keep_alive(logits, shifted, log_probs, ignored, index)
    return loss


def gather_last(t: Tape, x: Tensor, index: Tensor) -> Tensor:
    """``x.gather(-1, index)``: keeps both (its derivative asks `x` for its shape)."""
    reason = "the derivative of gather asks what is gathered from for its shape"
    return t.op("gather", (x, index), index.shape, dtype=x.dtype, keeps=(x, index), reason=reason)


def sum_in_fp32(t: Tape, x: Tensor) -> Tensor:
    """``x.sum(-1, keepdim=True, dtype=torch.float32)``: keeps nothing.

    The gradient is the incoming one, shown for every element; where `x` has another dtype, that is written out.
    """
    gradient = Gradient(x, alias=True, shown=True) if x.dtype == "fp32" else Gradient(x)
    return t.op("sum", (x,), (*x.shape[:-1], 1), dtype="fp32", gradients=[gradient], flops=elements(x))


def masked_fill_in_place(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """``x.masked_fill_(mask, number)``: keeps the mask; the result lies on the storage of `x`."""
    out = x._replace(number=len(t.tensors))
    t.tensors.append(out)
    gradients = (Gradient(x),) if x.requires_grad else ()
    keeps = (mask,) if x.requires_grad else ()
    t.ops.append(Op("masked_fill_", t.module, (x, mask), (out,), keeps, False, gradients, (), (), elements(x), ""))
    return out


def _mean_over(t: Tape, x: Tensor, num: Tensor) -> Tensor:
    """``x.sum() / num``."""
    total = divide(t, t.op("sum", (x,), (), gradients=[Gradient(x, alias=True)]), num)
    t.keep_alive(x)
    return total


def divide(t: Tape, x: Tensor, by: Tensor) -> Tensor:
    """``x / by``, with `by` on the device: keeps `by` (and `x` only where `by` needs a gradient)."""
    return t.op("div", (x, by), x.shape, keeps=(by,), gradients=[Gradient(x)])
