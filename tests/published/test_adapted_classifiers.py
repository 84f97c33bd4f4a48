"""Adapters of classifiers: the formula against peft's models of the task types SEQ_CLS and TOKEN_CLS.

They train a full copy of the head beside the adapters.  Everything agrees byte for byte, the peaks within 1 %.
"""

from __future__ import annotations

import warnings
from itertools import product

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from memplan.architectures.classifiers import CLASSIFIERS
from memplan.errors import UsageError
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from tests.published.test_adapters import agree, run
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE

SEQUENCE, TOKEN = "sequence-classification", "token-classification"
ENCODERS = ("bert", "roberta", "xlm-roberta")
DECODERS = tuple(sorted(CLASSIFIERS - set(ENCODERS)))


def named(model_type: str, **choices: object) -> Lora:
    """Adapters beside the queries and values."""
    targets = (
        ("query", "value")
        if model_type in ENCODERS
        else ("qkv_proj",)
        if model_type == "phi3"
        else ("q_proj", "v_proj")
    )
    return Lora(rank=8, targets=targets, **choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("model_type", ["llama", *ENCODERS])
def test_all_linear_of_sequences(model_type: str, precision: str, checkpointing: str) -> None:
    """BERT's pooler gets an adapter; of RoBERTa's head, which has two layers, all is copied."""
    setup = {"precision": precision, "activation_checkpointing": checkpointing, "objective": SEQUENCE}
    agree(run(model_type, lora=Lora(rank=8, dropout=0.05), **setup), 0.01)


@pytest.mark.parametrize("objective", [SEQUENCE, TOKEN])
@pytest.mark.parametrize("model_type", ["llama", *ENCODERS])
def test_named_layers(model_type: str, objective: str) -> None:
    """The same of layers that are named."""
    agree(run(model_type, lora=named(model_type), objective=objective), 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "precision", "checkpointing", "objective", "dtype"),
    list(
        product(
            (*DECODERS, *ENCODERS),
            ("bf16", "bf16-autocast", "fp32"),
            ("none", "full"),
            (SEQUENCE, TOKEN),
            ("fp32", "base"),
        )
    ),
)
def test_all_classifiers(model_type: str, precision: str, checkpointing: str, objective: str, dtype: str) -> None:
    """All families and precisions."""
    setup = {"precision": precision, "activation_checkpointing": checkpointing, "objective": objective}
    agree(run(model_type, lora=named(model_type, dtype=dtype, dropout=0.1), **setup), 0.01)


@pytest.mark.parametrize("model_type", ["llama", "bert", "roberta"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("objective", [SEQUENCE, TOKEN])
def test_quantised_bases(model_type: str, quantize: str, objective: str) -> None:
    """The head is not quantised."""
    pytest.importorskip("bitsandbytes")
    agree(run(model_type, lora=named(model_type), objective=objective, quantize=quantize), 0.01)


@pytest.mark.parametrize("targets", [("all-linear",), ("query", "classifier")])
def test_what_peft_cannot(targets: tuple[str, ...]) -> None:
    """GIVEN the head of a classifier of tokens among the targets THEN peft fails, and memplan says so before."""
    import peft
    import torch
    import transformers

    with pytest.raises(UsageError, match="peft fails on that"):
        Setup(objective=TOKEN, lora=Lora(rank=8, targets=targets))
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**CONFIG_BY_MODEL_TYPE["bert"])
        model = transformers.AutoModelForTokenClassification.from_config(config)
    given = targets[0] if len(targets) == 1 else list(targets)
    with warnings.catch_warnings(), pytest.raises(TypeError, match="cannot be applied to modules of type"):
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=given, task_type="TOKEN_CLS"))
