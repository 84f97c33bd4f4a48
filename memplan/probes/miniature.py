"""The config of a model, made small: two layers of 64 features, of the same family and with the same odds and ends.

Every number that has a name of the tables below is made smaller, never larger; what was the same stays the same (as
many key-value heads as heads).  What is left of a model is its code path: norms, attention, experts, tied weights, how
it takes its loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTH, INNER, LAYERS, HEADS, WORDS = 64, 128, 2, 4, 256
POSITIONS, PIXELS = 128, 64

SMALLER = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("decoder_hidden_size", "encoder_hidden_size", "q_lora_rank", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_expert_intermediate_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_kv_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"), WIDTH // HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "sliding_window"), POSITIONS),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), POSITIONS),
    "image_size": PIXELS,
    "num_conv_pos_embeddings": 16,
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "moe_intermediate_size": WIDTH,
    "vocab_size": WORDS,
    "vocab_size_per_layer_input": WORDS,
    "query_pre_attn_scalar": WIDTH // HEADS,
}
"""Name in a config -> what it is made at most."""

SMALLER_LISTS = {"depths": 1, "hidden_sizes": WIDTH, "conv_dim": WIDTH // 2}
"""The same of every number of a list."""

HEAD_NAMES = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KEY_VALUE_NAMES = ("num_key_value_heads",)
DROPPED = ("rope_scaling", "rope_parameters", "quantization_config", "auto_map", "layer_types", "torch_dtype", "dtype")
"""Left to their defaults: their lists are as long as a head or as the depth."""


def miniature(values: Mapping[str, Any], seq_len: int = POSITIONS) -> dict[str, Any]:
    """The config of a small model of the same family; `seq_len`: positions that it has to have."""
    small = {name: _smaller(name, value) for name, value in values.items() if name not in DROPPED}
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(small.get(name), int):
            small[name] = min(max(small[name], seq_len), max(int(values[name]), 1))
    heads = next((values[name] for name in HEAD_NAMES if isinstance(values.get(name), int)), None)
    for name in KEY_VALUE_NAMES:
        if isinstance(values.get(name), int):
            small[name] = HEADS if values[name] == heads else min(values[name], 2)
    if "head_dim" in small and small["head_dim"] is not None:
        small["head_dim"] = WIDTH // HEADS
    if "num_channels" in small:
        small.setdefault("image_size", PIXELS)  # of networks of convolutions, which take any
    if "vocab_size" in small:
        small.setdefault("pad_token_id", 0)  # the default of a class may be beyond the words that are left
    return {name: _token(name, value, small.get("vocab_size")) for name, value in small.items()}


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return miniature(value)
    if name in SMALLER and isinstance(value, int) and not isinstance(value, bool):
        return min(value, SMALLER[name])
    if name in SMALLER_LISTS and isinstance(value, list):
        return [min(one, SMALLER_LISTS[name]) for one in value]
    return value


def _token(name: str, value: Any, num_words: Any) -> Any:
    """An id that the vocabulary still has."""
    if name.endswith("_token_id") and isinstance(num_words, int):
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(one, int) and one >= num_words for one in ids):
            return 0
    return value
