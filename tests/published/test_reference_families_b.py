"""The GPT-like families against the reference trace: the installed transformers' own models, storage by storage.

Configurations are small, but have every peculiarity of their family, dropout included; the sequence is long enough for
activations to make the peak.
"""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from memplan.architectures.registry import read_architecture
from memplan.errors import ConfigError
from tests.support.compare import differences, resized, run_both

SEQ_LEN = 128
TOLERANCE = 1e-3
"""Relative, of peaks: blocks of 512 bytes for numbers that live in the same block on one side only."""
TOLERANCE_OF_ONE = 1e-2
"""The same for eager attention on a micro-batch of one, where slices of a joint projection die together."""

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 256,
    "vocab_size": 300,
}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "vocab_size": 300,
    "attention_dropout": 0.1,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 128,
    "ffn_dim": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "vocab_size": 300,
}
PHI: dict[str, Any] = {
    "model_type": "phi",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "vocab_size": 300,
}
STABLELM: dict[str, Any] = {
    "model_type": "stablelm",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "vocab_size": 300,
}
GPTJ: dict[str, Any] = {
    "model_type": "gptj",
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 128,
    "rotary_dim": 16,
    "vocab_size": 300,
}
BLOOM: dict[str, Any] = {"model_type": "bloom", "hidden_size": 128, "n_head": 4, "n_layer": 3, "vocab_size": 300}
MPT: dict[str, Any] = {
    "model_type": "mpt",
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 256,
    "vocab_size": 300,
}

CONFIG_BY_NAME: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt_neox, side by side": NEOX,
    "gpt_neox, one after the other": NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True},
    "opt, norms first": OPT | {"attention_dropout": 0.1},
    "opt, norms last and a narrow embedding": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 64},
    "phi": PHI | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1},
    "phi, few key heads, q and k normalised": PHI | {"num_key_value_heads": 2, "qk_layernorm": True},
    "stablelm": STABLELM | {"use_qkv_bias": True, "hidden_dropout": 0.1},
    "stablelm, side by side, a norm for each head": STABLELM | {"use_parallel_residual": True, "qk_layernorm": True},
}
EAGER_ONLY_BY_NAME: dict[str, dict[str, Any]] = {
    "gptj": GPTJ | {"resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "bloom": BLOOM | {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "bloom, one head": BLOOM | {"n_head": 1},
    "bloom, residual after the norm": BLOOM | {"apply_residual_connection_post_layernorm": True},
    "mpt, q, k and v clamped": MPT | {"attn_config": {"clip_qkv": 3.0}},
}
FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
}
FALCON_BY_NAME: dict[str, dict[str, Any]] = {
    "falcon, one key head": FALCON,
    "falcon, key heads for groups": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, one after the other": FALCON
    | {"bias": True, "multi_query": False, "parallel_attn": False, "hidden_dropout": 0.1},
}
FALCON_VARIANTS = [
    ("sdpa", "bf16", "none", 2, None),
    ("sdpa", "fp32", "full", 2, None),
    ("eager", "bf16", "none", 2, None),
    ("eager", "bf16-mixed", "none", 2, None),
]

VARIANTS = [
    # attention, precision, checkpointing, batch, dropout (None: the config's)
    ("sdpa", "bf16", "none", 2, None),
    ("sdpa", "bf16-mixed", "full", 2, None),
    ("sdpa", "bf16", "every-2", 1, 0.0),
    ("eager", "bf16", "full", 2, 0.0),
    ("eager", "bf16-mixed", "none", 2, None),
    ("eager", "fp32", "every-2", 2, None),
    ("eager", "bf16", "none", 1, 0.0),
]
GROUPED = "phi, few key heads, q and k normalised"

CASES = [
    *((CONFIG_BY_NAME[name], variant) for name in CONFIG_BY_NAME for variant in VARIANTS),
    *((config, ("sdpa", "fp32", "none", 2, None)) for name, config in CONFIG_BY_NAME.items() if name != GROUPED),
    *((config, variant) for config in EAGER_ONLY_BY_NAME.values() for variant in VARIANTS if variant[0] == "eager"),
    *((config, variant) for config in FALCON_BY_NAME.values() for variant in FALCON_VARIANTS),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "variant"), CASES, ids=[f"{c['model_type']}-{'-'.join(map(str, v))}" for c, v in CASES]
)
def test_a_step_is_that_of_transformers(
    config: dict[str, Any], variant: tuple[str, str, str, int, float | None]
) -> None:
    """Parameters and kept bytes are those of the reference exactly; peaks of a first and of a later step nearly."""
    attention, precision, checkpointing, batch, dropout = variant
    pair = run_both(
        resized(config, dropout=dropout),
        micro_batch_size=batch,
        seq_len=SEQ_LEN,
        precision=precision,
        attention=attention,
        activation_checkpointing=checkpointing,
    )
    reference = pair.reference
    tolerance = TOLERANCE_OF_ONE if attention == "eager" and batch == 1 else TOLERANCE
    assert sum(prod(row.shape) for row in pair.program.recording.parameters()) == reference.num_parameters
    assert pair.formula.kept_activation_bytes == reference.kept_allocated_bytes, differences(pair)
    assert pair.formula.peak == pytest.approx(reference.peak_allocated_bytes, rel=tolerance)
    assert pair.formula_first.peak == pytest.approx(reference.first_step_peak_allocated_bytes, rel=tolerance)


WRONG_BY_NAME: dict[str, dict[str, Any]] = {
    "heads do not divide the width": GPT2 | {"n_head": 5},
    "unknown activation": OPT | {"activation_function": "swoosh"},
    "key heads do not divide the heads": PHI | {"num_key_value_heads": 3},
    "nothing to rotate": NEOX | {"rotary_pct": 0.0},
    "cross-attention": GPT2 | {"add_cross_attention": True},
    "sliced products": BLOOM | {"pretraining_tp": 2, "slow_but_exact": True},
}


@pytest.mark.parametrize("name", WRONG_BY_NAME)
def test_a_wrong_config_is_refused(name: str) -> None:
    """What transformers refuses, or what is not modelled, is a ConfigError."""
    with pytest.raises(ConfigError):
        read_architecture(WRONG_BY_NAME[name], "config.json")


def test_random_depth_is_named_as_left_out() -> None:
    """OPT's layerdrop cannot be planned for: the whole depth is counted, and said to be."""
    architecture = read_architecture(OPT | {"layerdrop": 0.1}, "config.json")
    assert [what for what, _ in architecture.unmodelled] == ["layerdrop"]
