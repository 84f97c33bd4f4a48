"""Checkpointing that saves what attention gives (TRL 1.16's selective): the formula against the real modules.

The real ones run under torch.utils.checkpoint.create_selective_checkpoint_contexts, with the operators of TRL's policy.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import memplan
from memplan.errors import UsageError
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE
from tests.support.witnesses import compare

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("llama", "gpt2", "bert", "qwen2", "gemma", "olmo2", "modernbert")),
    *((name, {"precision": "bf16-mixed", "gradient_accumulation_steps": 2}) for name in ("llama", "gpt2")),
    *(("llama", {"attention": attention}) for attention in ("flash", "eager")),
    ("gpt2", {"precision": "fp32"}),
    *((name, {"padding": True}) for name in ("llama", "gpt2")),
    ("gpt2", {"dropout": 0.1}),
    ("llama", {"lora": Lora(rank=8)}),
    ("llama", {"lora": Lora(rank=8), "quantize": "nf4", "precision": "bf16-autocast"}),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21.2 asks for it
@pytest.mark.parametrize(("model_type", "choices"), CASES, ids=str)
def test_all_but_attention_is_computed_again(model_type: str, choices: dict[str, Any]) -> None:
    """GIVEN a fused kernel WHEN layers run again THEN formula and trace keep the same, and reach the same peak."""
    setup = Setup(micro_batch_size=2, seq_len=128, activation_checkpointing="save-attention", **choices)
    both = compare(CONFIG_BY_MODEL_TYPE[model_type], setup)
    assert both.formula == both.trace
    assert both.formula_peak == pytest.approx(both.trace_peak, rel=1e-3)


def test_what_is_kept_besides() -> None:
    """llama-3-8b: 32 layers, each with 2 x 1024 tokens of 4096 numbers of two bytes and 32 log-sum-exps of four."""
    full, saving = (
        memplan.estimate("llama-3-8b", gpu="a100-80gb", micro_batch=2, seq_len=1024, checkpointing=mode)
        for mode in ("full", "save-attention")
    )
    assert saving.kept_activation_bytes - full.kept_activation_bytes == 32 * 2 * 1024 * (4096 * 2 + 32 * 4)
    assert saving.step_time is not None
    assert full.step_time is not None
    assert saving.step_time.recompute_s < full.step_time.recompute_s


@pytest.mark.parametrize(
    ("choice", "says"), [({"reentrant": True}, "non-reentrant"), ({"offload": "activations"}, "not modelled")]
)
def test_what_it_does_not_go_with(choice: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Setup(activation_checkpointing="save-attention", **choice)
