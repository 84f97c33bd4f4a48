"""Configs that are refused by name rather than estimated as something that they are not."""

from __future__ import annotations

import json
import os

import pytest

from memplan.architectures.registry import READER_BY_MODEL_TYPE, read_architecture
from memplan.catalog.models import read_config, read_models
from memplan.errors import ConfigError, MemplanError, UnknownModelError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("changes", "cause", "cure"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "quantised bases are not modelled yet", "quantised"),
        ({"num_local_experts": 8}, "num_local_experts in it is 8, and llama has no experts", "num_local_experts"),
        ({"num_experts": 2}, "num_experts in it is 2, and llama has no experts", "num_experts"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers in it is 10001", "between 1 and 10,000"),
        ({"num_key_value_heads": 3}, "num_attention_heads in it is 4, which 3 does not divide", "num_key_value_heads"),
        ({"head_dim": 17}, "head_dim in it comes to 17", "even"),
        ({"hidden_size": 60}, "head_dim in it comes to 15", "even"),
        ({"hidden_size": "9" * 5000}, "...", "hidden_size"),
    ],
)
def test_refused_by_name(changes: dict, cause: str, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_architecture({**LLAMA, **changes}, "it")
    assert cause in caught.value.cause
    assert cure in caught.value.cure
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("changes", [{"num_experts": 1}, {"num_local_experts": None}, {"quantization_config": None}])
def test_dense_and_unquantised_configs_that_say_so(changes: dict) -> None:
    assert read_architecture({**LLAMA, **changes}, "it").model_type == "llama"


def test_partial_rotary_of_an_odd_number() -> None:
    values = {**LLAMA, "model_type": "gpt_neox", "hidden_size": 80, "rotary_pct": 0.25}
    with pytest.raises(ConfigError, match="comes to 5"):
        read_architecture(values, "it")


def test_models_of_the_catalogue_without_a_formula_say_what_they_are() -> None:
    """GIVEN any model of the catalogue that is not modelled, THEN the fault says what kind it is."""
    missing = [model.id for model in read_models() if model.model_type not in READER_BY_MODEL_TYPE]
    assert missing
    for name in missing:
        values, origin = read_config(name)
        with pytest.raises(UnknownModelError, match=r" is an? .*, which is not modelled yet\."):
            read_architecture(values, origin)


def test_a_number_of_thousands_of_digits(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA).replace("64", "6" * 4500, 1))
    with pytest.raises(ConfigError, match="4,500 digits") as caught:
        read_config(str(path))
    assert len(caught.value.cause) < 300


def test_a_pipe_is_not_read(tmp_path) -> None:
    """A FIFO without a writer would wait for ever, a device never ends."""
    path = tmp_path / "config.json"
    os.mkfifo(path)
    for model in (str(path), str(tmp_path), "/dev/zero"):
        with pytest.raises(MemplanError, match="no regular file"):
            read_config(model)
