"""From the last hidden states to the loss: the one place where a language model's output layer meets its loss.

A family says what its output layer is called, what it is tied to and what happens to its logits; `Tape.loss` says how
the loss is computed.  ``full`` records all logits and the loss of transformers on them; the others take the output
layer in (`memplan.operators.fused_losses`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.architectures.blocks import HIDDEN, lm_head, output_parameters
from memplan.architectures.classifiers import classifiers_for, generic_head
from memplan.errors import UsageError
from memplan.operators.attention import softcapped
from memplan.operators.distillation import distillation_loss, handed_out
from memplan.operators.elementwise import scale
from memplan.operators.fused_losses import LOSS_BY_NAME, OutputLayer
from memplan.operators.layout import take
from memplan.operators.losses import causal_lm_loss, smoothed_loss
from memplan.operators.odds import odds_loss
from memplan.operators.preference import dpo_loss
from memplan.specs.training import DISTILLATION, FUSED, PAIRED, PREFERRED, SCORED

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor


ALL_LOGITS = ("full", "full-kept")
"""Losses of all logits at once."""
SMOOTHED = "smoothed"
"""The loss that the Trainer takes from all logits where it smooths labels."""

BENT_BY_NAME = {"scaled": scale, "softcapped": softcapped}
"""What a model does to its logits: multiply them by a number (Cohere, Granite), or bend them by tanh (Gemma 2)."""

LIGER_MODEL_TYPES = frozenset(
    {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""Whose fused loss Liger Kernel 0.8.5 has (transformers/monkey_patch.py); it leaves others as they are."""


def check_loss(loss: str, model_type: str, task: str, objective: str = "lm") -> None:
    """Raise `UsageError` where the loss of such a model is not computed in this way."""
    if objective in PAIRED and objective not in SCORED and task != "causal-lm":
        raise UsageError(
            f"--objective {objective} trains causal language models; {model_type} is trained on another task ({task}).",
            "Leave --objective out.",
        )
    if objective == DISTILLATION and task != "causal-lm":
        raise UsageError(
            f"--objective {objective} takes causal language models as student and as teacher; {model_type} is trained "
            f"on another task ({task}).",
            "Name two language models of one vocabulary.",
        )
    if objective in SCORED and model_type not in classifiers_for(objective):
        raise UsageError(
            f"--objective {objective} is not modelled for {model_type}.",
            f"Known: {', '.join(sorted(classifiers_for(objective)))}; memplan trace runs the others.",
        )
    if loss == SMOOTHED and task != "causal-lm":
        raise UsageError(
            f"--label-smoothing is modelled for causal language models; {model_type} has another task ({task}).",
            "Leave --label-smoothing out; memplan trace runs it.",
        )
    if loss != "full" and task != "causal-lm":
        raise UsageError(
            f"--loss {loss} is a loss of causal language models; {model_type} is trained on another task ({task}).",
            "Use --loss full.",
        )
    if loss == FUSED and model_type not in LIGER_MODEL_TYPES:
        raise UsageError(
            f"Liger Kernel has no fused loss for {model_type}: Trainer would go on with all logits.",
            "Use --loss full, chunked or tiled.",
        )


def causal_head(
    t: Tape,
    hidden: Tensor,
    vocab_size: int,
    *,
    tied_to: str | None,
    name: str = "lm_head",
    bias: bool = False,
    logits: str = "",
    holds_hidden: bool = True,
) -> Tensor:
    """The loss of a causal language model.

    Args:
        t: Where it is recorded.
        hidden: The last hidden states, (b, s, width).
        vocab_size: Words.
        tied_to: Full name of the embedding's weight that the output layer shares, None where it has its own.
        name: The output layer's.
        bias: Whether it has one.
        logits: What happens to them before the loss: a key of `BENT_BY_NAME`, empty for nothing.
        holds_hidden: Whether the model's output holds the last hidden states until the loss is there.
    """
    if t.generating:
        return _next_token(t, hidden, vocab_size, tied_to=tied_to, name=name, bias=bias, logits=logits)
    if t.objective in SCORED:
        return generic_head(t, hidden)
    if t.objective not in PREFERRED and t.loss in (*ALL_LOGITS, SMOOTHED):
        made = _bent(t, lm_head(t, hidden, vocab_size, tied_to=tied_to, name=name, bias=bias), name, logits)
        if t.objective == DISTILLATION:
            return _distilled(t, hidden, made, name)
        return _of_all_logits(t, hidden, made, holds_hidden=holds_hidden)
    if t.ask("adapts_named", name):
        raise UsageError(
            f"--loss {t.loss} takes the weight of {name} alone and would leave its adapter out.",
            f"Use --loss full, or leave {name} out of --lora-targets.",
        )
    weight, offset = output_parameters(t, hidden, vocab_size, tied_to=tied_to, name=name, bias=bias)
    head = OutputLayer(weight, offset, logits == "softcapped")
    if t.objective in PREFERRED:
        with t.scope("loss"):
            return dpo_loss(t, hidden, head)
    labels, num_items = _targets(t)
    with t.scope("loss"):
        return LOSS_BY_NAME[t.loss](t, hidden, head, labels, num_items)


def _bent(t: Tape, made: Tensor, name: str, logits: str) -> Tensor:
    """The logits as the layer `name` made them, or what is made of them (`BENT_BY_NAME`)."""
    if not logits:
        return made
    with t.scope(name):
        return BENT_BY_NAME[logits](t, made)


def _next_token(
    t: Tape, hidden: Tensor, vocab_size: int, *, tied_to: str | None, name: str, bias: bool, logits: str
) -> Tensor:
    """The logits of the last token (``logits_to_keep=1``), and the fp32 copy of them that ``generate`` chooses from.

    Under autocast the logits alone.
    """
    b, _, width = hidden.shape
    last = take(t, hidden, (b, 1, width))
    made = _bent(t, lm_head(t, last, vocab_size, tied_to=tied_to, name=name, bias=bias), name, logits)
    t.keep_alive(hidden)
    if t.numerics.autocast is not None:  # its copies of weights go before the logits are handed out in fp32
        return made
    scores = t.op("to", (made,), (b, vocab_size), dtype="fp32")
    t.keep_alive(made)
    return scores


def _of_all_logits(t: Tape, hidden: Tensor, logits: Tensor, *, holds_hidden: bool) -> Tensor:
    """The loss that is taken from the logits of all tokens at once."""
    if t.objective == "orpo":
        with t.scope("loss"):
            return odds_loss(t, logits, hidden)
    labels, num_items = _targets(t)
    with t.scope("loss"):
        if t.loss == SMOOTHED:
            return smoothed_loss(t, logits, hidden, labels, num_items)
        loss = causal_lm_loss(t, logits, labels, num_items)
        if holds_hidden:
            t.keep_alive(hidden)
        if t.loss == "full-kept":
            t.outlive.append(logits)
    return loss


def _distilled(t: Tape, hidden: Tensor, logits: Tensor, name: str) -> Tensor:
    """The loss of a student; of a teacher (a tape without a graph) its logits."""
    t.keep_alive(hidden)
    with t.scope(name):
        made = handed_out(t, logits)
    if not t.grad:
        return made
    labels, num_items = _targets(t)
    with t.scope("loss"):
        return distillation_loss(t, made, labels, num_items)


def _targets(t: Tape) -> tuple[Tensor, Tensor]:
    """Labels, and how many there are in all micro-batches of the step."""
    labels = t.external("labels", HIDDEN, "int64", role="input")
    return labels, t.external("num_items_in_batch", (), "int64", role="input")
