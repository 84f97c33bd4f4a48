"""Classes in place of words: the formula against transformers' own classes of models.

Kept bytes, parameters, gradients and optimizer states are the same to the byte, the peaks within 1 %.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from memplan.architectures.classifiers import CLASSIFIERS
from memplan.catalog.models import read_config
from memplan.specs.training import CLASSIFICATIONS, Setup
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE, EAGER_ONLY
from tests.support.witnesses import compare

PEAK_TOLERANCE = 0.01


def agree(config: dict[str, Any], **choices: Any) -> None:
    """Both witnesses on one setup."""
    both = compare(config, Setup(**choices))
    assert both.formula == both.trace
    assert abs(both.peak_error) <= PEAK_TOLERANCE


@pytest.mark.parametrize("objective", CLASSIFICATIONS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast", "bf16-mixed"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "bert", "roberta"])
def test_the_formula_is_the_trace(model_type: str, precision: str, checkpointing: str, objective: str) -> None:
    """GIVEN a classifier WHEN it is trained THEN formula and trace have the same bytes."""
    config = CONFIG_BY_MODEL_TYPE[model_type]
    choices = {"precision": precision, "activation_checkpointing": checkpointing, "objective": objective}
    agree(config, micro_batch_size=3, seq_len=128, **choices)


@pytest.mark.slow
@pytest.mark.parametrize("objective", CLASSIFICATIONS)
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("model_type", sorted(CLASSIFIERS))
def test_every_family(model_type: str, precision: str, objective: str) -> None:
    """The same law for all that are said to have these heads, with accumulation and more classes."""
    config = CONFIG_BY_MODEL_TYPE[model_type] | {"num_labels": 7}
    attention = "eager" if model_type in EAGER_ONLY else "sdpa"
    choices = {"precision": precision, "objective": objective, "attention": attention}
    agree(config, micro_batch_size=3, seq_len=128, gradient_accumulation_steps=2, **choices)


@pytest.mark.parametrize("objective", CLASSIFICATIONS)
def test_dropout_that_is_asked_for(objective: str) -> None:
    """It is that before the classes, too, where a config names none."""
    for model_type in ("llama", "bert"):
        agree(CONFIG_BY_MODEL_TYPE[model_type], micro_batch_size=3, seq_len=128, objective=objective, dropout=0.0)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(("model", "size"), [("bert-base", (32, 512)), ("roberta-base", (32, 128))])
def test_real_models_at_real_sizes(model: str, size: tuple[int, int], checkpointing: str) -> None:
    """Fine-tuning BERT in mixed precision, as everyone does."""
    config, _ = read_config(model)
    choices = {"precision": "bf16-mixed", "activation_checkpointing": checkpointing}
    agree(config, micro_batch_size=size[0], seq_len=size[1], objective="sequence-classification", **choices)
