"""Mixtures of experts against the reference trace: the installed transformers' own models, storage by storage.

Kept bytes have to agree exactly.  Peaks agree to the last block, too, but for what `TOLERANCE` names.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from memplan.architectures.registry import read_architecture
from memplan.errors import ConfigError
from memplan.estimation.replaying import replay
from memplan.estimation.step import Recordings
from memplan.memory.events import Sizes
from memplan.operators.sizes import Size, bind
from memplan.specs.training import Setup
from tests.support.compare import differences, run_both

if TYPE_CHECKING:
    from tests.support.compare import Pair

SEQ_LEN = 200
TOLERANCE = 3e-4
"""Relative, of peaks: a gradient that is summed and then cast is for a moment there twice (5 bytes a row here)."""

EMBEDDING_BYTES = 2 * 200 * 128 * 2
"""Bytes of the embedding of a micro-batch in bf16: transformers' models hold it until their last layer returns, and the
formula does not.  It shows where eager attention makes the forward pass the peak."""

SELECTIVE_TOLERANCE = 0.02
"""The same where eager attention is computed again by itself: as far off as for a dense Llama (1.3 %)."""

BASE = {
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
CONFIG_BY_NAME: dict[str, dict[str, Any]] = {
    "mixtral": BASE | {"model_type": "mixtral", "num_local_experts": 6},
    "mixtral, shaken, under a window": BASE
    | {"model_type": "mixtral", "num_local_experts": 6, "router_jitter_noise": 0.1, "sliding_window": 64},
    "qwen2_moe, a dense layer": BASE
    | {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "moe_intermediate_size": 72,
        "shared_expert_intermediate_size": 96,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
        "num_key_value_heads": 4,
    },
    "qwen2_moe, windows": BASE
    | {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "moe_intermediate_size": 72,
        "shared_expert_intermediate_size": 96,
        "use_sliding_window": True,
        "sliding_window": 64,
        "norm_topk_prob": True,
        "num_key_value_heads": 4,
    },
    "qwen3_moe, every other layer": BASE
    | {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "moe_intermediate_size": 72,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "head_dim": 48,
        "decoder_sparse_step": 2,
    },
    "olmoe, clipped": BASE | {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 4.0},
}

LATENT = BASE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 72,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "type": "yarn",
    "factor": 4,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 128,
}
CONFIG_BY_NAME |= {
    "deepseek_v2, queries made directly": LATENT
    | {"model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy", "rope_scaling": YARN},
    "deepseek_v2, groups of experts": LATENT
    | {
        "model_type": "deepseek_v2",
        "q_lora_rank": 40,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "deepseek_v2, heads that flash takes": LATENT
    | {"model_type": "deepseek_v2", "q_lora_rank": 40, "qk_nope_head_dim": 16},
    "deepseek_v3": LATENT
    | {"model_type": "deepseek_v3", "q_lora_rank": 40, "n_group": 4, "topk_group": 2, "rope_scaling": YARN},
    "deepseek_v3, not normalised": LATENT
    | {"model_type": "deepseek_v3", "q_lora_rank": None, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
}
GPT_OSS = BASE | {
    "model_type": "gpt_oss",
    "head_dim": 32,
    "intermediate_size": 72,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 64,
}
CONFIG_BY_NAME |= {
    "gpt_oss": GPT_OSS,
    "gpt_oss, without biases in attention": GPT_OSS
    | {"attention_bias": False, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
}
EAGER_ONLY = {"gpt_oss"}
"""transformers has one implementation of attention that needs no other package."""

Variant = tuple[str, str, str, int]
"""Attention, precision, checkpointing, accumulation."""
FEW: tuple[Variant, ...] = (
    ("sdpa", "bf16", "none", 1),
    ("sdpa", "bf16", "full", 2),
    ("flash", "bf16", "full", 1),
    ("sdpa", "bf16-mixed", "full", 1),
    ("eager", "bf16", "full", 1),
    ("eager", "fp32", "none", 1),
)
ALL = tuple(product(("sdpa", "eager"), ("bf16", "fp32", "bf16-mixed"), ("none", "selective", "full"), (1, 2)))
CASES = [
    pytest.param(name, variant, id=f"{name}, {', '.join(map(str, variant))}", marks=[pytest.mark.slow] * slow)
    for name, config in CONFIG_BY_NAME.items()
    for variant, slow in [*((v, False) for v in FEW), *((v, True) for v in ALL if v not in FEW)]
    if variant[0] == "eager" or config["model_type"] not in EAGER_ONLY
]


@cache
def pair_of(name: str, variant: Variant) -> Pair:
    """Both witnesses."""
    attention, precision, checkpointing, accumulation = variant
    config = CONFIG_BY_NAME[name]
    grouped = config["num_key_value_heads"] != config["num_attention_heads"]
    masked = 0 < (config.get("sliding_window") or 0) <= SEQ_LEN
    # CUDA has no fused kernel for grouped heads in fp32; the formula's is fused all the same (see `unmodelled`).
    force = (attention, precision) == ("sdpa", "fp32") and grouped and not masked
    return run_both(
        config,
        sdpa_kernel="flash" if force else None,
        micro_batch_size=2,
        seq_len=SEQ_LEN,
        precision=precision,
        attention=attention,
        activation_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
        optimizer="sgd",
    )


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_what_is_kept_is_what_transformers_keeps(name: str, variant: Variant) -> None:
    """Parameters and bytes kept for the backward pass are those of the reference exactly."""
    pair = pair_of(name, variant)
    assert sum(prod(row.shape) for row in pair.program.recording.parameters()) == pair.reference.num_parameters
    assert pair.formula.kept_activation_bytes == pair.reference.kept_allocated_bytes, differences(pair)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_peaks_are_those_of_transformers(name: str, variant: Variant) -> None:
    """Peaks of a first and of a later step are those of the reference."""
    pair = pair_of(name, variant)
    attention, precision, checkpointing, _ = variant
    tolerance = SELECTIVE_TOLERANCE if (attention, checkpointing) == ("eager", "selective") else TOLERANCE
    missing = EMBEDDING_BYTES if (attention, precision) == ("eager", "bf16") and checkpointing != "full" else 0
    for ours, theirs in (
        (pair.formula.peak, pair.reference.peak_allocated_bytes),
        (pair.formula_first.peak, pair.reference.first_step_peak_allocated_bytes),
    ):
        assert -tolerance * theirs - missing <= ours - theirs <= tolerance * theirs


@pytest.mark.parametrize("name", CONFIG_BY_NAME)
def test_steps_replay(name: str) -> None:
    """Whatever a step allocates it frees: several of them go through the allocator, which holds as much as is taken."""
    setup = Setup(micro_batch_size=2, seq_len=SEQ_LEN, attention="eager", gradient_accumulation_steps=2)
    program = Recordings(read_architecture(CONFIG_BY_NAME[name], "it")).program(setup)
    sizes = Sizes(bind(2, SEQ_LEN))
    replayed = replay(program, sizes, 2)
    assert replayed.reserved_bytes >= replayed.allocated_bytes >= program.peaks(sizes, 2).peak


# -- the experts' share of the work ------------------------------------------------------------------------------------


def test_flops_are_those_of_the_chosen_experts() -> None:
    """GIVEN 6 experts of which each token takes 2, THEN the products are those of 2: 3 matrices of width x hidden."""
    config = CONFIG_BY_NAME["mixtral"]
    tape = Recordings(read_architecture(config, "it")).recording(Setup(micro_batch_size=1, seq_len=8)).kinds[0].tape
    flops = sum(op.flops.factor for op in tape.ops if op.name == "grouped_mm")
    assert flops == 2 * 2 * 3 * config["hidden_size"] * config["intermediate_size"]
    assert {op.flops.dims for op in tape.ops if op.name == "grouped_mm"} == {("b", "s")}


def test_weights_are_those_of_all_experts() -> None:
    """GIVEN the same, THEN all 6 have weights and gradients."""
    config = CONFIG_BY_NAME["mixtral"]
    tape = Recordings(read_architecture(config, "it")).recording(Setup(micro_batch_size=1, seq_len=8)).kinds[0].tape
    (weight,) = [op.inputs[1] for op in tape.ops if op.name == "grouped_mm" and op.outputs[0].shape[-1] == 448]
    assert weight.shape == (6, 448, 128)
    assert weight.bytes == Size(6 * 448 * 128 * 2)


WRONG_BY_NAME: dict[str, dict[str, Any]] = {
    "more chosen than there are": BASE | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
    "layers without experts that are no list": BASE | {"model_type": "qwen3_moe", "mlp_only_layers": 1},
    "groups that do not divide the experts": LATENT | {"model_type": "deepseek_v3", "n_group": 3, "topk_group": 1},
    "fewer key heads than heads": LATENT | {"model_type": "deepseek_v2", "num_key_value_heads": 2},
    "no number of chosen experts": LATENT | {"model_type": "deepseek_v2", "num_experts_per_tok": None},
    "no window": GPT_OSS | {"sliding_window": None},
    "sliding layers without a window": BASE | {"model_type": "qwen2_moe", "layer_types": ["sliding_attention"] * 3},
}


@pytest.mark.parametrize("name", WRONG_BY_NAME)
def test_a_wrong_config_is_refused(name: str) -> None:
    """What transformers refuses, or what is not modelled, is a ConfigError."""
    with pytest.raises(ConfigError):
        read_architecture(WRONG_BY_NAME[name], "config.json")
