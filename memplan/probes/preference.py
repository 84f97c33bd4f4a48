"""Training on pairs of a chosen and a rejected sequence: what DPOTrainer does around the model in each micro-step.

The policy runs, then, without a graph, the reference: a second model, or the same one without its adapters; then the
loss is taken from both (``DPOTrainer._compute_loss`` of TRL 1.16, trainer/dpo_trainer.py).  What the loss holds by
variables is held here, too; the numbers that TRL reports afterwards are not computed.
"""

from __future__ import annotations

import contextlib
import types
from typing import TYPE_CHECKING, Any

import torch

from memplan.probes.checkpointing import enable_checkpointing
from memplan.probes.heads import head_of, language_model
from memplan.probes.losses import IGNORED, tiled_numbers

if TYPE_CHECKING:
    from torch import nn

    from memplan.probes.autocast import CudaAutocast
    from memplan.probes.training import Region
    from memplan.specs.training import Setup

BETA = 0.1
REPORTED = ("entropy", "mean", "best")
"""Numbers of each token that DPOTrainer has the policy's output layer compute besides."""


class Preference:
    """Direct preference optimisation of a model."""

    companion_label = "reference model"

    def __init__(
        self, policy: nn.Module, reference: nn.Module | None, setup: Setup, autocast: CudaAutocast | None
    ) -> None:
        self.policy: Any = policy
        self.companion: Any = reference
        self.setup = setup
        self._autocast = autocast
        model: Any = policy
        self._words = int(model.config.get_text_config().vocab_size)

    def make_inputs(self, micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        """What DataCollatorForPreference gives: the chosen sequences, then the rejected ones."""
        shape = (2 * micro_batch_size, seq_len)
        inputs = {"input_ids": torch.randint(self._words, shape, dtype=torch.int64)}
        for name in ("attention_mask", "completion_mask"):
            inputs[name] = torch.ones(shape, dtype=torch.int64)
        if not self.setup.has_reference:
            for name in ("ref_chosen_logps", "ref_rejected_logps"):
                inputs[name] = torch.zeros(micro_batch_size)
        return inputs

    def loss(self, inputs: dict[str, torch.Tensor], autocast: Region, **_: Any) -> torch.Tensor:
        """The loss of a micro-batch."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        with autocast():
            outputs = self.policy(**given, labels=labels)
        per_token = outputs["log_probs"][:, 1 - labels.size(1) :]
        chosen, rejected = per_token.sum(dim=1).chunk(2, dim=0)
        if self.setup.has_reference:
            with torch.no_grad(), self._as_reference() as reference, autocast():
                found = reference(**given, labels=labels)
            chosen_ref, rejected_ref = found["log_probs"].sum(dim=1).chunk(2, dim=0)
        else:
            chosen_ref, rejected_ref = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        margins = (chosen - chosen_ref) - (rejected - rejected_ref)
        return 0.0 + (-log_sigmoid(BETA * margins)).mean() * 1.0

    @contextlib.contextmanager
    def _as_reference(self) -> Any:
        """The reference: the second model, or the policy with its adapters switched off and nothing computed twice."""
        if self.companion is not None:
            yield self.companion
            return
        how = self.setup.activation_checkpointing
        again = how not in {"none", "selective"}
        if again:
            getattr(self.policy, "activation_checkpointing_disable", self.policy.gradient_checkpointing_disable)()
        try:
            with self.policy.disable_adapter():
                yield self.policy
        finally:
            if again:
                enable_checkpointing(self.policy, how, self._autocast, reentrant=self.setup.reentrant)


def add_fused_head(module: nn.Module, setup: Setup, autocast: CudaAutocast | None, reported: tuple[str, ...]) -> None:
    """Let the model return log-probabilities of its labels instead of logits (``add_fused_lm_head``), in place."""
    model = language_model(module, "the objective")

    def forward(self: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        outputs = self.base_model(input_ids=input_ids, use_cache=False, **kwargs)
        numbers = tiled_numbers(outputs[0], head_of(self, autocast, setup.supervised), labels, reported)
        loss = -numbers["log_probs"].sum() / numbers["mask"].sum().clamp(min=1)
        return {"loss": loss, **numbers}

    model.forward = types.MethodType(forward, model)


class _LogSigmoid(torch.autograd.Function):
    """``F.logsigmoid`` on CUDA: it keeps its input, and a buffer without elements."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """``F.logsigmoid`` with CUDA's allocations."""
    return _LogSigmoid.apply(x)  # type: ignore[no-untyped-call,no-any-return]
