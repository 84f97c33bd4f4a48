"""From the last hidden states to the loss: the one place where a language model's output layer meets its loss.

A family says what its output layer is called, what it is tied to and what happens to its logits; `Tape.loss` says how
the loss is computed.  ``full`` records all logits and the loss of transformers on them; the others take the output
layer in (`memplan.operators.fused_losses`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.architectures.blocks import HIDDEN, lm_head, output_parameters
from memplan.operators.fused_losses import LOSS_BY_NAME
from memplan.operators.losses import causal_lm_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.operators.tape import Tape, Tensor


def causal_head(
    t: Tape,
    hidden: Tensor,
    vocab_size: int,
    *,
    tied_to: str | None,
    name: str = "lm_head",
    bias: bool = False,
    bend: Callable[[Tape, Tensor], Tensor] | None = None,
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
        bend: What happens to the logits before the loss: scaled, or bent by tanh.
        holds_hidden: Whether the model's output holds the last hidden states until the loss is there.
    """
    if t.loss == "full":
        logits = lm_head(t, hidden, vocab_size, tied_to=tied_to, name=name, bias=bias)
        if bend is not None:
            with t.scope(name):
                logits = bend(t, logits)
        labels, num_items = _targets(t)
        with t.scope("loss"):
            loss = causal_lm_loss(t, logits, labels, num_items)
            if holds_hidden:
                t.keep_alive(hidden)
        return loss
    weight, offset = output_parameters(t, hidden, vocab_size, tied_to=tied_to, name=name, bias=bias)
    labels, num_items = _targets(t)
    with t.scope("loss"):
        return LOSS_BY_NAME[t.loss](t, hidden, weight, offset, labels, num_items)


def _targets(t: Tape) -> tuple[Tensor, Tensor]:
    """Labels, and how many there are in all micro-batches of the step."""
    labels = t.external("labels", HIDDEN, "int64", role="input")
    return labels, t.external("num_items_in_batch", (), "int64", role="input")
