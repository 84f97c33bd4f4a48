"""From the last hidden states of a pair of sequences, or from their scores, to the loss of a preference.

    loss = mean(-log sigmoid(beta * ((c - c_ref) - (r - r_ref))))      c, r: log-probability of the chosen, the rejected
    loss = mean(-log sigmoid(c - r))                                   c, r: their scores (`reward_loss`)

Chosen and rejected sequences are one micro-batch of ``b`` sequences, ``b/2`` pairs.  The log-probabilities of their
labelled tokens (the completions) are those of the tiled output layer.  The order of things is DPOTrainer's: the policy
runs, then the reference, without a graph and on top of all that the policy keeps; then the loss is taken.

Source: ``DPOTrainer._compute_loss`` of TRL 1.16 (trainer/dpo_trainer.py) with ``loss_type="sigmoid"``, its default;
``add_fused_lm_head`` (trainer/utils.py).  Left out: what the metrics that it reports need for a moment after the
reference has run, a few numbers a token; the labels while the layers run, one number a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.elementwise import add_scalar, neg, scale, sub
from memplan.operators.fused_losses import tiled_log_probabilities
from memplan.operators.layout import split, take
from memplan.operators.losses import PREDICTING
from memplan.operators.tape import Gradient

if TYPE_CHECKING:
    from memplan.operators.fused_losses import OutputLayer
    from memplan.operators.tape import Tape, Tensor

TOKENS = ("b", "s")
PAIRS = ("b/2",)

INPUTS = ("attention_mask", "completion_mask")
"""What DataCollatorForPreference gives beside the ids, an int64 a token each."""
PRECOMPUTED = ("ref_chosen_logps", "ref_rejected_logps")
"""What it gives besides where the reference ran before the training, a number a pair each."""

REPORTED = (("entropy", "fp32"), ("mean logits", "fp32"), ("is the likeliest", "bool"))
"""Of each token, for the metrics: what the policy's output layer computes besides."""


def dpo_loss(t: Tape, hidden: Tensor, head: OutputLayer) -> Tensor:
    """The loss of the policy; of a reference (a tape without a graph) the log-probabilities of its sequences."""
    labels = (
        t.op("masked_fill", (), TOKENS, dtype="int64")
        if t.grad
        else t.external("labels", TOKENS, "int64", role="buffer")  # the policy's
    )
    given = [t.external(name, TOKENS, "int64", role="input") for name in INPUTS if not _is_there(t, name)]
    precomputed = (
        [t.external(name, PAIRS, "fp32", role="input") for name in PRECOMPUTED]
        if t.objective == "dpo-precomputed"
        else []
    )
    log_probs, reported = tiled_log_probabilities(t, hidden, head, labels, REPORTED if t.grad else ())
    t.keep_alive(hidden)
    if not t.grad:
        return _summed(t, log_probs)
    chosen, rejected = split(t, _summed(t, log_probs), (PAIRS, PAIRS))
    if precomputed:
        chosen_ref, rejected_ref = precomputed
    else:
        t.pause()
        found = t.op("reference log-probabilities", (), ("b",), dtype="fp32")
        chosen_ref, rejected_ref = split(t, found, (PAIRS, PAIRS))
    margins = sub(t, sub(t, chosen, chosen_ref), sub(t, rejected, rejected_ref))
    loss = add_scalar(t, scale(t, mean(t, neg(t, log_sigmoid(t, scale(t, margins))))))
    t.keep_alive(labels, log_probs, *reported, margins, *given)
    return loss


def reward_loss(t: Tape, scores: Tensor) -> Tensor:
    """``-logsigmoid(chosen - rejected).mean()`` of the scores (b, 1) that a model of rewards has returned.

    ``RewardTrainer.compute_loss`` of TRL 1.16 (trainer/reward_trainer.py), with no margins in the data and no
    ``center_rewards_coefficient``; its collator gives a mask beside the ids, and no labels.
    """
    t.external("attention_mask", TOKENS, "int64", role="input")
    t.pause()
    if t.numerics.autocast is not None:  # accelerate hands the outputs out in fp32
        scores = t.cast(scores, "fp32")
    chosen, rejected = split(t, t.view(scores, ("b",)), (PAIRS, PAIRS))
    difference = sub(t, chosen, rejected)
    loss = neg(t, mean(t, log_sigmoid(t, difference)))
    t.keep_alive(scores)
    return loss


def _is_there(t: Tape, name: str) -> bool:
    return any(storage.name == name for storage in t.storages)


def _summed(t: Tape, log_probs: Tensor) -> Tensor:
    """``log_probs[:, -length:].sum(dim=1)``: keeps nothing, the gradient is the incoming one, shown for every token."""
    shown = take(t, log_probs, PREDICTING)
    return t.op("sum", (shown,), ("b",), gradients=[Gradient(shown, alias=True)])


def log_sigmoid(t: Tape, x: Tensor) -> Tensor:
    """``F.logsigmoid``: keeps its input (its buffer is empty on CUDA)."""
    return t.op("logsigmoid", (x,), x.shape, keeps=(x,), reason="the derivative of log-sigmoid needs its input")


def mean(t: Tape, x: Tensor) -> Tensor:
    """``x.mean()``: keeps nothing; the gradient is a number, shown for every element, over their number."""
    return t.op("mean", (x,), ())
