"""Training a model of rewards: what RewardTrainer does around the model in each micro-step.

    loss = mean(-log sigmoid(score of the chosen - score of the rejected))

Source: ``RewardTrainer.compute_loss`` and ``DataCollatorForPreference`` of TRL 1.16 (trainer/reward_trainer.py),
without margins in the data and with ``center_rewards_coefficient=None``, its default; the numbers that it reports
afterwards are not computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memplan.errors import UsageError
from memplan.probes.preference import log_sigmoid
from memplan.probes.training import outputs_to_fp32

if TYPE_CHECKING:
    from torch import nn

    from memplan.probes.training import Region
    from memplan.specs.training import Setup


class Rewards:
    """Scores of sequences, compared within pairs."""

    companion = None
    companion_label = ""

    def __init__(self, module: nn.Module, setup: Setup) -> None:
        """Raises `UsageError` where the module gives sequences no score."""
        if not type(module).__name__.endswith("ForSequenceClassification"):
            raise UsageError(
                f"Rewards are scores of sequences; this is a {type(module).__name__}.",
                "Return a model for sequence classification, or leave --objective out.",
            )
        model: Any = module
        self.model = model
        self.setup = setup
        self._words = int(model.config.get_text_config().vocab_size)

    def make_inputs(self, micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        """The chosen sequences, then the rejected ones."""
        shape = (2 * micro_batch_size, seq_len)
        ids = torch.randint(self._words, shape, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}

    def loss(self, inputs: dict[str, torch.Tensor], autocast: Region, **_: Any) -> torch.Tensor:
        """The loss of a micro-batch."""
        with autocast():
            outputs = self.model(**inputs, use_cache=False)
        outputs = outputs_to_fp32(outputs, self.setup)
        chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
        return -log_sigmoid(chosen - rejected).mean()
