"""Sums of losses and numbers of tokens: what a micro-batch adds to a step.

The mean over a batch is (sum of losses) / (number of tokens with a loss).  A causal language model predicts the token
behind each, so that the first label of a row has no loss: of labels of shape (b, s) those of ``labels[:, 1:]`` count
that are not -100.  transformers counts alike (5.23, ``Trainer._get_num_items_in_batch``); where the batch holds
``shift_labels``, as padding-free collators make them, all of those count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn

    Loss = Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor | int]]
    """(model, micro-batch) -> the sum of its losses (a scalar) and how many there are."""
    Count = Callable[[Any], "torch.Tensor | int"]
    """Micro-batch -> how many losses it has, before the forward pass."""

IGNORED = -100
"""The label of a token that has no loss: ``ignore_index`` of torch.nn.functional.cross_entropy."""


def count_next_tokens(micro_batch: Any) -> torch.Tensor:
    """Tokens that a causal language model is trained to predict; a scalar tensor.

    Raises:
        UsageError: the micro-batch has no labels.
    """
    return (shifted(micro_batch) != IGNORED).sum()


def count_labels(micro_batch: Any) -> torch.Tensor:
    """Labels that are not -100, where each belongs to its own position: encoders, and models with a decoder of its own.

    Raises:
        UsageError: the micro-batch has no labels.
    """
    return (_labels(micro_batch) != IGNORED).sum()


def causal_lm_loss(model: nn.Module, micro_batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of a causal language model of transformers, and the number of tokens it is over.

    The cross-entropy is taken in fp32.  The balance loss of a mixture of experts that is told to return one
    (``output_router_logits``) is added with its coefficient, weighted with the tokens of the micro-batch: the balance
    of each micro-batch, not that of the whole batch.
    """
    from torch.nn import functional

    targets = shifted(micro_batch)
    inputs = {name: value for name, value in micro_batch.items() if name not in {"labels", "shift_labels"}}
    output = model(**inputs)
    logits = output.logits if "shift_labels" in micro_batch else output.logits[:, :-1]
    total = functional.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    num = (targets != IGNORED).sum()
    balance = getattr(output, "aux_loss", None)
    if balance is not None:
        total = total + num * _coefficient(model) * balance.to(total.device)
    return total, num


def mean_loss(count: Count = count_next_tokens, loss_of: Callable[[Any], torch.Tensor] | None = None) -> Loss:
    """For a model that returns a mean: the sum is the mean times what `count` counts.

    Args:
        count: What the model takes the mean over.
        loss_of: The loss of what the model returns; None: ``output.loss``, ``output["loss"]`` or the output itself.
    """

    def loss(model: nn.Module, micro_batch: Any) -> tuple[torch.Tensor, torch.Tensor | int]:
        output = called(model, micro_batch)
        mean = own_loss(output) if loss_of is None else loss_of(output)
        num = count(micro_batch)
        return mean * num, num

    return loss


def called(model: nn.Module, micro_batch: Any) -> Any:
    """What a model returns for a dict of keyword arguments, a tuple of positional ones, or one tensor."""
    if hasattr(micro_batch, "keys"):
        return model(**micro_batch)
    return model(*micro_batch) if isinstance(micro_batch, tuple) else model(micro_batch)


def own_loss(output: Any) -> torch.Tensor:
    """The loss that a model returns."""
    if isinstance(output, dict):
        output = output["loss"]
    found: torch.Tensor = getattr(output, "loss", output)
    return found


def shifted(micro_batch: Any) -> torch.Tensor:
    """The label of what each position predicts; shape (b, s - 1), or that of ``shift_labels``."""
    if hasattr(micro_batch, "keys") and micro_batch.get("shift_labels") is not None:
        given: torch.Tensor = micro_batch["shift_labels"]
        return given
    return _labels(micro_batch)[:, 1:]


def _labels(micro_batch: Any) -> torch.Tensor:
    labels = micro_batch.get("labels") if hasattr(micro_batch, "keys") else None
    if labels is None:
        raise UsageError(
            "The micro-batch has no 'labels', so nobody can count what the loss is the mean over.",
            "Give labels, or count=: a function from a micro-batch to its number of losses, such as len.",
        )
    found: torch.Tensor = labels
    return found


def _coefficient(model: nn.Module) -> float:
    config: Any = getattr(getattr(model, "module", model), "config", None)
    config = getattr(config, "text_config", config)
    return float(config.router_aux_loss_coef)
