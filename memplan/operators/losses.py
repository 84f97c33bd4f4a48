"""The loss head as Hugging Face computes it (transformers/loss/loss_utils.py)."""

from __future__ import annotations

from memplan.operators.layout import copy, take
from memplan.operators.tape import Gradient, Tape, Tensor, elements


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

    ``LabelSmoother`` of transformers 5.23 (trainer_pt_utils.py) on what the model has returned, after it: in the dtype
    of the logits, or fp32 under autocast, as accelerate hands them out.  A slice of a single sequence is no copy.
    """
    words = logits.shape[-1]
    t.keep_alive(hidden)
    if t.numerics.autocast is not None:
        logits = t.cast(logits, "fp32")
    shifted = copy(t, take(t, logits, ("b", "s-1", words)), ("[b>1]", "b", "s-1", words))
    targets = copy(t, labels, ("[b>1]", "b", "s-1"))
    found = log_softmax(t, t.view(shifted, ("b", "s-1", words)))
    log_probs = t.op("neg", (found,), found.shape)
    loss = t.op("mean", (log_probs,), ())
    t.keep_alive(logits, shifted, targets, num_items)
    return loss


def divide(t: Tape, x: Tensor, by: Tensor) -> Tensor:
    """``x / by``, with `by` on the device: keeps `by` (and `x` only where `by` needs a gradient)."""
    return t.op("div", (x, by), x.shape, keeps=(by,), gradients=[Gradient(x)])
