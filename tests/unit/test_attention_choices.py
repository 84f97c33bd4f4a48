"""Attention that a model, a precision or a card does not have is refused before anything is counted."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.estimation.step import Recordings
from memplan.specs.gpu import GpuSpec
from memplan.specs.training import Setup

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
BLOOM = {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 500}


def card(capability: str | None) -> GpuSpec:
    return GpuSpec(name="card", label="Some card", label_bytes=10**10, compute_capability=capability)


@pytest.mark.parametrize(
    ("config", "precision", "capability", "said"),
    [
        (LLAMA, "fp32", "9.0", "half precision only"),
        (LLAMA, "fp16", "7.5", "and Some card has 7.5"),
        (LLAMA | {"head_dim": 264}, "bf16", None, "heads of 264"),
    ],
)
def test_flash_is_refused_where_its_kernel_does_not_run(
    config: dict[str, Any], precision: str, capability: str | None, said: str
) -> None:
    estimator = Estimator(read_architecture(config, "config"), "a model", card(capability))
    with pytest.raises(UsageError, match=said):
        estimator.check(Setup(seq_len=64, attention="flash", precision=precision))


@pytest.mark.parametrize("capability", ["8.0", "12.0", "gfx942", None])
@pytest.mark.parametrize("precision", ["bf16", "fp16-mixed"])
def test_flash_is_allowed_elsewhere(capability: str | None, precision: str) -> None:
    estimator = Estimator(read_architecture(LLAMA | {"head_dim": 256}, "config"), "a model", card(capability))
    estimator.check(Setup(seq_len=64, attention="flash", precision=precision))


def test_an_attention_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(UsageError, match="bloom has no sdpa attention") as caught:
        Recordings(read_architecture(BLOOM, "config")).recording(Setup(seq_len=64, attention="sdpa"))
    assert "eager" in str(caught.value)
