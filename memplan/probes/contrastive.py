"""Training an encoder by pairs that belong together: what SentenceTransformerTrainer does in each micro-step.

    loss = mean(logsumexp over j of 20 cos(a_i, p_j) - 20 cos(a_i, p_i))

Every other positive of the micro-batch is a negative.  Anchors and positives go through the encoder one after the
other, so that their activations add up, and the mean of the last hidden states over the tokens is the embedding.

Source: ``MultipleNegativesRankingLoss`` (scale 20, one direction), ``embed_columns``, ``cos_sim`` and ``Pooling``
(mean) of sentence-transformers 6.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.errors import UsageError
from memplan.probes.training import outputs_to_fp32

if TYPE_CHECKING:
    from memplan.probes.training import Region
    from memplan.specs.training import Setup

COLUMNS = ("anchor", "positive")
SCALE = 20.0
LEAST = 1e-9
HALVES = (torch.float16, torch.bfloat16)


class InBatchNegatives:
    """Embeddings of anchors against those of all positives of the micro-batch."""

    companion = None
    companion_label = ""

    def __init__(self, module: nn.Module, setup: Setup) -> None:
        """Raises `UsageError` where the module is no encoder of words."""
        model: Any = module
        config: Any = getattr(model, "config", None)
        words = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
        if not isinstance(words, int) or config.is_encoder_decoder:
            raise UsageError(
                f"--objective contrastive takes an encoder of words; this is a {type(module).__name__}.",
                "Name another model, such as bert-base, or leave --objective out.",
            )
        self.model = model
        self.setup = setup
        self._words = words

    def make_inputs(self, micro_batch_size: int, seq_len: int) -> dict[str, Any]:
        """Ids and mask of the anchors, and of the positives."""
        shape = (micro_batch_size, seq_len)
        return {
            name: {
                "input_ids": torch.randint(self._words, shape, dtype=torch.int64),
                "attention_mask": torch.ones(shape, dtype=torch.int64),
            }
            for name in COLUMNS
        }

    def loss(self, inputs: dict[str, Any], autocast: Region, **_: Any) -> torch.Tensor:
        """The loss of a micro-batch."""
        columns: list[dict[str, torch.Tensor]] = [dict(inputs[name]) for name in COLUMNS]
        anchors, positives = (self._embed(column, autocast) for column in columns)
        own = torch.arange(len(anchors), device=anchors.device)
        rows = torch.arange(len(anchors), device=anchors.device)
        candidates = torch.cat([positives], dim=0)
        local = (anchors[own], positives[own])  # one rank asks for the first alone
        scores = _cosines(local[0], candidates)
        scores = scores * SCALE
        right = scores[rows, own]
        joint = torch.cat([scores], dim=1)
        return -(right - torch.logsumexp(joint, dim=1)).mean()

    def _embed(self, column: dict[str, torch.Tensor], autocast: Region) -> torch.Tensor:
        """(b, width) of one column, whose dict holds the last hidden states from here on."""
        with autocast():
            outputs = self.model(input_ids=column["input_ids"], attention_mask=column["attention_mask"])
            column["token_embeddings"] = outputs.last_hidden_state
            del outputs  # the pooled output of BERT's own goes, with its graph
            column["sentence_embedding"] = torch.cat([_mean(**column)], dim=-1)
        column.update(outputs_to_fp32(column, self.setup))
        return column["sentence_embedding"]


def _mean(token_embeddings: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    dtype = token_embeddings.dtype
    sums = torch.float32 if dtype in HALVES else dtype
    mask = attention_mask.unsqueeze(-1).to(dtype)
    total = (token_embeddings * mask).sum(dim=1, dtype=sums)
    count = torch.clamp(mask.sum(dim=1, dtype=sums), min=LEAST)
    return (total / count).to(dtype)


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = (x.float() if x.dtype in HALVES else x for x in (a, b))
    return torch.mm(nn.functional.normalize(a, p=2, dim=-1), nn.functional.normalize(b, p=2, dim=-1).transpose(0, 1))
