"""Odds-ratio preference optimisation: what ORPOTrainer does around the model in each micro-step.

    loss = cross-entropy of the chosen - beta * mean(log sigmoid(log odds of the chosen - log odds of the rejected))

Source: ``ORPOTrainer.get_batch_loss_metrics`` and what it calls, of TRL 1.16 (experimental/orpo/orpo_trainer.py);
``selective_log_softmax`` (trainer/utils.py) takes a Triton kernel on CUDA (kernels/logprob_entropy.py), of which the
tensors are made here, and no numbers.  What the loss holds by variables is held here, too; the numbers that TRL reports
afterwards are not computed.  Left out: the prompts' own ids and mask, which the collator gives besides and nothing
takes, and the loss of a mixture's router.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it

from memplan.probes.losses import IGNORED
from memplan.probes.preference import BETA, log_sigmoid
from memplan.probes.training import outputs_to_fp32

if TYPE_CHECKING:
    from torch import nn

    from memplan.probes.training import Region
    from memplan.specs.training import Setup

KINDS = ("input_ids", "attention_mask", "labels")
LN_2 = 0.6931471805599453


class Odds:
    """Odds-ratio preference optimisation of a model."""

    companion = None
    companion_label = ""

    def __init__(self, module: nn.Module, setup: Setup) -> None:
        model: Any = module
        self.model = model
        self.setup = setup
        self._words = int(model.config.get_text_config().vocab_size)

    def make_inputs(self, micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        """What DPODataCollatorWithPadding gives of the chosen and of the rejected sequences."""
        shape = (micro_batch_size, seq_len)
        inputs = {}
        for which in ("chosen", "rejected"):
            for kind in KINDS:
                made = torch.ones(shape) if kind == "attention_mask" else torch.randint(self._words, shape)
                inputs[f"{which}_{kind}"] = made.to(torch.int64)
        return inputs

    def loss(self, inputs: dict[str, torch.Tensor], autocast: Region, **_: Any) -> torch.Tensor:
        """The loss of a micro-batch."""
        chosen, rejected, _held, likelihood = self._forward(inputs, autocast)
        losses = BETA * log_sigmoid(log_odds(chosen, rejected))
        return likelihood - losses.mean()

    def _forward(self, inputs: dict[str, torch.Tensor], autocast: Region) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of both, their logits, and the cross-entropy of the chosen (``concatenated_forward``)."""
        num = inputs["chosen_labels"].shape[0]
        both = {kind: torch.cat((inputs[f"chosen_{kind}"], inputs[f"rejected_{kind}"])) for kind in KINDS}
        with autocast():
            outputs = self.model(both["input_ids"], attention_mask=both["attention_mask"], use_cache=False)
        outputs = outputs_to_fp32(outputs, self.setup)
        logits = outputs.logits
        labels = both["input_ids"].clone()
        labels = torch.where(both["attention_mask"] == 1, labels, IGNORED)
        likelihood = _cross_entropy(logits[:num], labels[:num])
        log_probs = mean_log_probabilities(logits, both["labels"])
        return log_probs[:num], log_probs[num:], logits, likelihood


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits[..., :-1, :].contiguous()
    labels = labels[..., 1:].contiguous()
    logits = logits.view(-1, logits.shape[-1])
    return F.cross_entropy(logits, labels.view(-1))


def mean_log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over the labelled tokens of each sequence (``get_batch_logps``)."""
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    mask = labels != IGNORED
    labels = torch.where(labels == IGNORED, 0, labels)
    log_probs = _selective_log_softmax(logits, labels)
    return (log_probs * mask).sum(-1) / mask.sum(-1)


def _selective_log_softmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_probs, _entropy = _LogProbEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return log_probs  # type: ignore[no-any-return]


class _LogProbEntropy(torch.autograd.Function):
    """``_LogProbEntropyFunction`` of TRL, without its kernels."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = torch.empty(logits.shape[:-1], device=logits.device)
        entropy, log_z, expected = (torch.empty_like(log_probs) for _ in range(3))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, log_z, expected)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, _labels, _log_z, _expected = ctx.saved_tensors
        grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        grads[0].contiguous()
        return grad_logits, None


def log_odds(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """How much likelier the chosen one is, as odds (``odds_ratio_loss``)."""
    chosen, rejected = chosen.float(), rejected.float()
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """``log(1 - exp(x))`` for negative x."""
    return torch.where(x < -LN_2, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))
