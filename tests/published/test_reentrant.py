"""Checkpointing by ``use_reentrant=True``, the default of transformers 4: the formula against the real modules."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, EAGER_ONLY
from tests.support.witnesses import compare

PEAK_TOLERANCE = 1e-3
SHARE_WITH_GRADIENTS = {"deberta-v2"}
PEFT_ASKS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def setup_of(**choices: Any) -> Setup:
    usual = {"micro_batch_size": 2, "seq_len": 128, "activation_checkpointing": "full", "reentrant": True}
    return Setup(**{**usual, **choices})


def agree(config: dict[str, Any], setup: Setup, tolerance: float = PEAK_TOLERANCE) -> None:
    both = compare(config, setup)
    assert both.formula.kept == both.trace.kept
    assert both.formula.gradients == both.trace.gradients
    assert both.formula_peak == pytest.approx(both.trace_peak, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("model_type", sorted(set(CONFIG_BY_MODEL_TYPE) - SHARE_WITH_GRADIENTS))
def test_every_family(model_type: str, precision: str) -> None:
    """GIVEN any family WHEN layers run again with a graph of their own THEN formula and trace agree, peak included."""
    mixed = precision == "bf16-mixed"
    attention = "eager" if mixed or model_type in EAGER_ONLY else "sdpa"
    setup = setup_of(precision=precision, attention=attention, gradient_accumulation_steps=1 + mixed)
    agree(CONFIG_BY_MODEL_TYPE[model_type], setup)


CASES: list[tuple[str, dict[str, Any]]] = [
    *(("llama", {"lora": Lora(rank=8), "quantize": quantize}) for quantize in (None, "nf4", "int8")),
    ("llama", {"lora": Lora(rank=8), "precision": "bf16-mixed", "activation_checkpointing": "every-2"}),
    ("llama", {"lora": Lora(rank=8, dora=True, dropout=0.1)}),
    ("llama", {"freeze": ("model.embed_tokens", "model.layers.0")}),
    ("gemma2", {"activation_checkpointing": "every-2", "precision": "bf16-mixed", "attention": "eager"}),
    ("olmo2", {"activation_checkpointing": "every-2", "precision": "bf16-mixed"}),
    *((model, {"padding": True, "attention": "eager"}) for model in ("llama", "gpt2", "gpt_neox")),
    *(("llama", {"optimizer": optimizer}) for optimizer in ("adamw-in-backward", "lomo")),
    ("gpt2", {"dropout": 0.1}),
    *(
        ("llama", {"offload": "activations", "activation_checkpointing": mode, "precision": precision})
        for mode, precision in product(("full", "every-2"), ("bf16", "bf16-mixed"))
    ),
]


@pytest.mark.slow
@PEFT_ASKS
@pytest.mark.parametrize(("model_type", "choices"), CASES, ids=str)
def test_with_other_choices(model_type: str, choices: dict[str, Any]) -> None:
    agree(CONFIG_BY_MODEL_TYPE[model_type], setup_of(**choices))


def test_shared_tensors_with_gradients_are_refused() -> None:
    """DeBERTa's layers share relative embeddings: PyTorch would go through their graph twice, and raises."""
    estimator = Estimator(read_architecture(CONFIG_BY_MODEL_TYPE["deberta-v2"], "config"), "deberta")
    with pytest.raises(UsageError, match="share tensors that have gradients"):
        estimator.memory(setup_of(attention="eager"))


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_no_layer_is_checkpointed(mode: str) -> None:
    with pytest.raises(UsageError, match="no layer is checkpointed"):
        Setup(activation_checkpointing=mode, reentrant=True)


@pytest.mark.slow
@PEFT_ASKS
def test_without_gradients_of_inputs_nothing_is_trained() -> None:
    """What the lint warns of, on the real module: the loss depends on no parameter."""
    import peft
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIG_BY_MODEL_TYPE["llama"])
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    ids = torch.zeros((1, 8), dtype=torch.int64)
    assert model(input_ids=ids, labels=ids).loss.requires_grad
    model.disable_input_require_grads()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert not model(input_ids=ids, labels=ids).loss.requires_grad
