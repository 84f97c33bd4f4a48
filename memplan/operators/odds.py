"""From all logits of pairs of sequences to the loss of odds-ratio preference optimisation.

    loss = cross-entropy of the chosen - beta * mean(log sigmoid(log odds of the chosen - log odds of the rejected))
    log odds = p - log(1 - exp(p))      p: mean log-probability of the labelled tokens of a sequence

Chosen and rejected sequences come apart and are put together to one micro-batch of ``b`` sequences, ``b/2`` pairs.  The
model returns all logits, in fp32 under autocast; the cross-entropy is taken of a copy of the chosen half, the
log-probabilities by a Triton kernel that keeps the logits as they are.

Source: ``ORPOTrainer`` of TRL 1.16 (experimental/orpo/orpo_trainer.py); ``selective_log_softmax`` (trainer/utils.py),
``_LogProbEntropyFunction`` (kernels/logprob_entropy.py).  Left out: ids and mask of the prompts alone, which the
collator gives besides (16 bytes a token) and nothing takes; the copies of mask and labels while the layers run; what
the metrics that it reports need for a moment, a few numbers a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.elementwise import keeps_input, keeps_result, mul, neg, scale, sub
from memplan.operators.layout import take
from memplan.operators.losses import PREDICTING, divide, log_softmax, nll_loss
from memplan.operators.preference import PAIRS, TOKENS, log_sigmoid, mean
from memplan.operators.sizes import num_bytes
from memplan.operators.tape import Gradient

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor

CHOSEN = ("b/2", "s-1")
IF_ONE_PAIR, IF_SEVERAL_PAIRS = "[b=2]", "[b>2]"
"""Dimensions that are 1 or 0: a slice of a single sequence is no copy."""

KINDS = ("input_ids", "attention_mask", "labels")
INPUTS = tuple(f"{which}_{kind}" for which in ("chosen", "rejected") for kind in KINDS)
"""What DPODataCollatorWithPadding gives, an int64 a token each."""


def concatenated_ids(t: Tape) -> Tensor:
    """The ids of all sequences: a tensor of its own beside those of the chosen and the rejected ones."""
    for name in INPUTS:
        t.external(name, (*PAIRS, "s"), "int64", role="input")
    return t.op("concatenated ids", (), TOKENS, dtype="int64")


def odds_loss(t: Tape, logits: Tensor, hidden: Tensor) -> Tensor:
    """The loss of what the model returned."""
    mask, labels = (t.op(f"concatenated {name}", (), TOKENS, dtype="int64") for name in ("mask", "labels"))
    t.keep_alive(hidden)
    t.pause()
    if t.numerics.autocast is not None:  # accelerate hands the outputs out in fp32
        logits = t.cast(logits, "fp32")
    ids = t.op("clone", (), TOKENS, dtype="int64")
    where = t.op("eq", (mask,), TOKENS, dtype="bool")
    targets = t.op("where", (where, ids), TOKENS, dtype="int64")
    t.keep_alive(ids)
    likelihood = _likelihood(t, logits, targets)
    log_probs = _mean_log_probabilities(t, logits, labels)
    chosen, rejected = take(t, log_probs, PAIRS), take(t, log_probs, PAIRS)
    t.keep_alive(mask, labels, targets)
    ratio = log_sigmoid(t, _log_odds(t, chosen, rejected))
    loss = sub(t, likelihood, mean(t, scale(t, ratio)))
    t.keep_alive(logits, ratio)
    return loss


def _likelihood(t: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the chosen sequences, in the dtype of the logits: of a copy, unless there is a single pair."""
    words = logits.shape[-1]
    shown = take(t, take(t, logits, (*PAIRS, "s", words)), (*CHOSEN, words))
    copied = t.op("clone", (shown,), (IF_SEVERAL_PAIRS, *CHOSEN, words), gradients=[Gradient(shown, alias=True)])
    copied_targets = t.op("clone", (targets,), (IF_SEVERAL_PAIRS, *CHOSEN))
    single = t.op("what is shown of a single pair", (targets,), (IF_ONE_PAIR, *TOKENS))
    log_probs = log_softmax(t, t.view(copied, (*CHOSEN, words)))
    loss = nll_loss(t, log_probs, copied_targets, single)
    t.keep_alive(copied)
    return loss


def _mean_log_probabilities(t: Tape, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labelled tokens of each sequence, (b,) in fp32 (``get_batch_logps``)."""
    words = logits.shape[-1]
    labels = t.op("clone", (labels,), PREDICTING)
    mask = t.op("ne", (labels,), PREDICTING, dtype="bool")
    ignored = t.op("eq", (labels,), PREDICTING, dtype="bool")
    targets = t.op("where", (ignored, labels), PREDICTING, dtype="int64")
    shown = take(t, logits, (*PREDICTING, words))
    numbers = num_bytes(PREDICTING, "fp32")
    log_probs = t.op(
        "log-probabilities of labels",
        (shown, targets),
        PREDICTING,
        dtype="fp32",
        keeps=(shown, targets),
        extra_outputs=(("log-sum-exp", PREDICTING, "fp32"), ("expected logit", PREDICTING, "fp32")),
        scratch=(numbers,),  # the entropy
        reason="its backward computes the probabilities again",
    )
    product = mul(t, log_probs, mask)
    total = t.op("sum", (product,), ("b",), gradients=[Gradient(product, alias=True)])
    average = divide(t, total, t.op("sum", (mask,), ("b",), dtype="int64"))
    t.keep_alive(log_probs)
    return average


def _log_odds(t: Tape, chosen: Tensor, rejected: Tensor) -> Tensor:
    difference = sub(t, chosen, rejected)
    return sub(t, difference, sub(t, _log1mexp(t, chosen), _log1mexp(t, rejected)))


def _log1mexp(t: Tape, x: Tensor) -> Tensor:
    """``where(x < -log(2), log1p(-exp(x)), log(-expm1(x)))``, all of it computed; keeps five tensors."""
    low = t.op("lt", (x,), x.shape, dtype="bool", gradients=())
    far = keeps_input(t, "log1p", neg(t, keeps_result(t, "exp", x)))
    near = keeps_input(t, "log", neg(t, keeps_result(t, "expm1", x)))
    return t.op("where", (low, far, near), x.shape, dtype=x.dtype, keeps=(low,))
