"""Llama's relatives against the reference trace: the installed transformers' own models, storage by storage.

Configurations are small, but have every peculiarity of their family; the sequence is long enough for activations to
make the peak, and no multiple of 16, so that padded masks show.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from memplan.architectures.registry import read_architecture
from memplan.errors import ConfigError
from tests.support.compare import differences, run_both

if TYPE_CHECKING:
    from tests.support.compare import Pair

SEQ_LEN = 200
TOLERANCE = 1e-3
"""Relative, of peaks: the reference counts scratch memory that is rounded to the kernels' tiles."""

BASE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
GEMMA3 = BASE | {
    "model_type": "gemma3_text",
    "head_dim": 48,
    "sliding_window": 64,
    "sliding_window_pattern": 2,
    "num_key_value_heads": 4,
}

CONFIG_BY_NAME: dict[str, dict[str, Any]] = {
    "llama, heads that no kernel takes as they are": BASE
    | {"model_type": "llama", "head_dim": 50, "num_key_value_heads": 4},
    "llama, relu squared": BASE | {"model_type": "llama", "hidden_act": "relu2", "intermediate_size": 512},
    "llama, gelu written out": BASE | {"model_type": "llama", "hidden_act": "gelu_python", "intermediate_size": 512},
    "mistral, such heads under a window": BASE
    | {"model_type": "mistral", "head_dim": 50, "sliding_window": 64, "vocab_size": 3000},
    "mistral, window shorter than the sequence": BASE | {"model_type": "mistral", "sliding_window": 64},
    "mistral, window as long as the sequence": BASE | {"model_type": "mistral", "sliding_window": SEQ_LEN},
    "mistral, window longer than the sequence": BASE | {"model_type": "mistral", "sliding_window": SEQ_LEN + 1},
    "qwen2, window from the second layer on": BASE
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 1,
        "num_key_value_heads": 4,
    },
    "qwen3, biases": BASE
    | {"model_type": "qwen3", "head_dim": 48, "attention_bias": True, "tie_word_embeddings": True},
    "smollm3, windows without positions": BASE
    | {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 64,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gemma": BASE | {"model_type": "gemma", "head_dim": 48, "hidden_act": "gelu"},
    "gemma2": BASE | {"model_type": "gemma2", "head_dim": 48, "sliding_window": 64},
    "gemma3_text": GEMMA3,
    "gemma3, trained on text": {
        "model_type": "gemma3",
        "text_config": GEMMA3,
        "vision_config": VISION,
        "image_token_index": 7,
    },
    "gemma3, image token beyond the vocabulary": {
        "model_type": "gemma3",
        "text_config": GEMMA3,
        "vision_config": VISION | {"vision_use_head": False},
        "image_token_index": 500,
    },
    "cohere, q and k normalised": BASE | {"model_type": "cohere", "use_qk_norm": True, "attention_bias": True},
    "granite": BASE | {"model_type": "granite", "mlp_bias": True, "residual_multiplier": 0.5},
    "olmo, clipped": BASE | {"model_type": "olmo", "clip_qkv": 8.0},
    "olmo2": BASE | {"model_type": "olmo2"},
    "phi3, window": BASE | {"model_type": "phi3", "sliding_window": 64},
    "phi3, part of each head turned": BASE
    | {"model_type": "phi3", "partial_rotary_factor": 0.5, "num_key_value_heads": 4, "resid_pdrop": 0.1},
    "phi3, longrope": BASE
    | {
        "model_type": "phi3",
        "original_max_position_embeddings": 128,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    },
}

VARIANTS = (
    ("sdpa", "bf16", "none", 2),
    ("sdpa", "bf16", "every-2", 2),
    ("sdpa", "bf16-mixed", "full", 2),
    ("sdpa", "fp32", "none", 2),
    ("eager", "bf16", "full", 2),
    ("eager", "bf16-mixed", "none", 1),
    ("eager", "fp32", "every-2", 2),
    ("flash", "bf16", "none", 1),
)
CASES = [
    pytest.param(name, variant, id=f"{name}, {', '.join(map(str, variant))}")
    for name, config in CONFIG_BY_NAME.items()
    for variant in VARIANTS
    if not (config["model_type"] == "gemma2" and variant[0] == "sdpa")  # transformers refuses: scores are bent
]


def takes_a_mask(config: dict[str, Any]) -> bool:
    """Whether fused attention is given a mask in some layer."""
    return int(config.get("sliding_window") or SEQ_LEN + 1) <= SEQ_LEN


@cache
def pair_of(name: str, variant: tuple[str, str, str, int]) -> Pair:
    """Both witnesses."""
    attention, precision, checkpointing, batch = variant
    config = CONFIG_BY_NAME[name]
    text = config.get("text_config", config)
    grouped = text["num_key_value_heads"] != text["num_attention_heads"]
    # In fp32 CUDA has a fused kernel for grouped heads only in forms that it does not choose; the formula's is fused.
    force = attention == "sdpa" and precision == "fp32" and grouped and not takes_a_mask(text)
    return run_both(
        config,
        sdpa_kernel="flash" if force else None,
        auto_class="AutoModelForImageTextToText" if "text_config" in config else "AutoModelForCausalLM",
        micro_batch_size=batch,
        seq_len=SEQ_LEN,
        precision=precision,
        attention=attention,
        activation_checkpointing=checkpointing,
    )


def number_of_parameters(pair: Pair) -> int:
    """Of the formula, tied ones once."""
    total = 0
    for row in pair.program.recording.parameters():
        product = 1
        for dim in row.shape:
            product *= dim
        total += product
    return total


def cached_keys(name: str, variant: tuple[str, str, str, int]) -> bool:
    """Whether the reference holds a key-value cache that the description names as left out (``unmodelled``)."""
    return "text_config" in CONFIG_BY_NAME[name] and variant[1:3] == ("bf16-mixed", "none")


PEAK_CASES = [
    pytest.param(
        *case.values,
        id=case.id,
        marks=[pytest.mark.xfail(strict=True, reason="Gemma 3's text model fills a key-value cache until the loss")]
        if cached_keys(*case.values)
        else [],
    )
    for case in CASES
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_what_is_kept_is_what_transformers_keeps(name: str, variant: tuple[str, str, str, int]) -> None:
    """Parameters and bytes kept for the backward pass are those of the reference exactly."""
    pair = pair_of(name, variant)
    assert number_of_parameters(pair) == pair.reference.num_parameters
    assert pair.formula.kept_activation_bytes == pair.reference.kept_allocated_bytes, differences(pair)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), PEAK_CASES)
def test_peaks_are_those_of_transformers(name: str, variant: tuple[str, str, str, int]) -> None:
    """Peaks of a first and of a later step are those of the reference up to rounding inside kernels."""
    pair = pair_of(name, variant)
    assert pair.formula.peak == pytest.approx(pair.reference.peak_allocated_bytes, rel=TOLERANCE)
    assert pair.formula_first.peak == pytest.approx(pair.reference.first_step_peak_allocated_bytes, rel=TOLERANCE)


WRONG_BY_NAME: dict[str, dict[str, Any]] = {
    "heads do not divide the width": BASE | {"model_type": "mistral", "num_attention_heads": 5},
    "key heads do not divide the heads": BASE | {"model_type": "olmo2", "num_key_value_heads": 3},
    "unknown activation": BASE | {"model_type": "granite", "hidden_act": "quick_silu"},
    "width that Gemma 2 refuses": BASE | {"model_type": "gemma2", "hidden_size": 130},
    "sliding layers without a window": BASE | {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
    "a layer type that is not modelled": BASE | {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
    "too few layer types": BASE | {"model_type": "qwen3", "layer_types": ["full_attention"]},
    "too few rotation flags": BASE | {"model_type": "smollm3", "no_rope_layers": [1]},
    "attention to both sides": GEMMA3 | {"use_bidirectional_attention": True},
    "an odd part of each head": BASE | {"model_type": "phi3", "partial_rotary_factor": 0.1},
}


@pytest.mark.parametrize("name", WRONG_BY_NAME)
def test_a_wrong_config_is_refused(name: str) -> None:
    """What transformers refuses, or what is not modelled, is a ConfigError."""
    with pytest.raises(ConfigError):
        read_architecture(WRONG_BY_NAME[name], "config.json")


def test_only_training_on_text_is_claimed_of_gemma3() -> None:
    """The vision tower's weights are counted, and images are named as left out."""
    architecture = read_architecture(CONFIG_BY_NAME["gemma3, trained on text"], "config.json")
    assert architecture.unmodelled[0][0] == "images"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adamw-fused", "adamw-foreach"])
@pytest.mark.parametrize("seq_len", [16, SEQ_LEN])
def test_a_step_agrees_to_the_last_block(optimizer: str, seq_len: int) -> None:
    """The loss and its gradient last as long as the backward pass; the clip's norms are one tensor."""
    pair = run_both(BASE | {"model_type": "llama"}, micro_batch_size=2, seq_len=seq_len, optimizer=optimizer)
    ours, theirs = pair.formula, pair.reference
    assert ours.peak == theirs.peak_allocated_bytes
    assert pair.formula_first.peak == theirs.first_step_peak_allocated_bytes
    assert ours.by_instant["gradient clip"] == theirs.phase_peaks["clip"]
