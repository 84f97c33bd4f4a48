"""Encoders trained by pairs: the trace against the loss of sentence-transformers itself."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import memplan
from memplan.errors import UsageError
from memplan.probes.trace import trace_training
from memplan.specs.training import Setup

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}
PAIRS, LENGTH = 3, 96


def setup_of(**choices: Any) -> Setup:
    usual = {"objective": "contrastive", "micro_batch_size": PAIRS, "seq_len": LENGTH, "precision": "fp32"}
    return Setup(**{**usual, "attention": "eager", "dropout": 0.0, **choices})


class Saved:
    """A tensor that autograd keeps, as long as it does: nobody asks for what BERT pools."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Words(torch.nn.Module):
    """The first module of a SentenceTransformer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        output = self.model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
        return features | {"token_embeddings": output.last_hidden_state}


def kept_by_autograd(config: dict[str, Any], num_pairs: int) -> int:
    """Bytes of numbers that MultipleNegativesRankingLoss keeps for its backward pass."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoConfig, AutoModel

    chosen = AutoConfig.for_model(**config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = AutoModel.from_config(chosen, attn_implementation="eager").train()
    model: Any = torch.nn.Sequential(Words(encoder), Pooling(config["hidden_size"]))
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    shape = (num_pairs, LENGTH)
    columns = [
        {"input_ids": torch.randint(100, shape), "attention_mask": torch.ones(shape, dtype=torch.int64)} for _ in "ap"
    ]
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(x: Any) -> Saved:
        one = Saved(x.detach())
        saved.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        loss = MultipleNegativesRankingLoss(model)(columns, None)
    assert loss.requires_grad
    storages = [one.tensor.untyped_storage() for one in saved if one.tensor.dtype.is_floating_point]
    return sum({x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in own}.values())


def kept_by_the_trace(setup: Setup) -> int:
    trace = trace_training(BERT, setup)
    return sum(event.num_bytes for event in trace.kept if event.dtype.startswith(("fp", "bf")))


@pytest.mark.parametrize("num_pairs", [1, 3, 5])
def test_kept_bytes_are_those_of_the_real_loss(num_pairs: int) -> None:
    pytest.importorskip("sentence_transformers")
    the_loss = 4
    assert kept_by_the_trace(setup_of(micro_batch_size=num_pairs)) == kept_by_autograd(BERT, num_pairs) + the_loss


def test_two_columns_keep_what_two_micro_batches_would() -> None:
    """GIVEN anchors and positives of one length THEN layers keep twice what they keep of one column.

    But for the last hidden states, which an output layer of words keeps and a mean does not.
    """
    hidden = PAIRS * LENGTH * BERT["hidden_size"] * 4
    pairs = trace_training(BERT, setup_of())
    words = trace_training(BERT, setup_of(objective="lm", micro_batch_size=PAIRS))
    assert pairs.kept_activation_bytes_per_layer == 2 * (words.kept_activation_bytes_per_layer - hidden)


def test_scores_grow_with_the_square_of_the_batch() -> None:
    """The scores of all pairs are (n, n): the second difference of what is kept is that of a few such matrices."""
    kept = [kept_by_the_trace(setup_of(micro_batch_size=n)) for n in (16, 32, 48)]
    second = kept[2] - 2 * kept[1] + kept[0]
    assert second > 0
    assert second % (2 * 16 * 16 * 4) == 0


@pytest.mark.slow
def test_a_plan_counts_pairs() -> None:
    """The plan comes from traces, and names what it counts."""
    found = memplan.suggest("bert-base", gpu="16GB", target_batch=64, seq_len=128, objective="contrastive")
    assert found.best is not None
    assert found.best.setup.objective == "contrastive"
    assert (found.best.setup.micro_batch_size, found.best.setup.gradient_accumulation_steps) == (64, 1)
    assert [lever.flag for lever in found.levers] == []


@pytest.mark.parametrize("model", ["t5-small", "vit-base"])
def test_who_is_no_encoder_of_words(model: str) -> None:
    with pytest.raises(UsageError, match="contrastive"):
        memplan.estimate(model, objective="contrastive")
