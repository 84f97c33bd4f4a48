"""Llama and the families that are Llama with a difference: Mistral, Qwen2, Qwen3, SmolLM3, Yi, TinyLlama, SmolLM.

Modelled after transformers 5.23, models/llama/modeling_llama.py and its modular siblings:

x = x + o(attention(rotary(q(n(x))), rotary(k(n(x))), v(n(x))));  x = x + down(act(gate(n(x))) * up(n(x)))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, Buffer, int64
from memplan.architectures.blocks import (
    HIDDEN,
    causal_loss,
    causal_mask,
    gated_mlp,
    heads,
    lm_head,
    merged,
    rotary_tables,
)
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import rms_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The numbers of a Llama-like model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    activation: str
    tied: bool
    qkv_bias: bool = False
    """q, k and v have biases."""
    out_bias: bool = False
    """The attention's output projection has one."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """q and k are normalised per head (Qwen3)."""
    dropout: float = 0.0
    """Of the attention probabilities."""
    window: int | None = None
    """Sliding window of every layer, in tokens."""


def stem(m: Llama, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, causal mask and rotary tables."""
    with t.scope("model"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_tokens")
        shared = causal_mask(t, x)
        with t.scope("rotary_emb"):
            shared |= rotary_tables(t, x, m.head_dim)
    return x, shared


def self_attention(m: Llama, t: Tape, x: Tensor, shared: Mapping[str, Tensor], *, rotated: bool = True) -> Tensor:
    """Grouped-query attention with rotary positions."""
    q = heads(t, linear(t, x, m.num_heads * m.head_dim, "q_proj", bias=m.qkv_bias), m.num_heads, m.head_dim)
    if m.qk_norm:
        q = rms_norm(t, q, "q_norm")
    k = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "k_proj", bias=m.qkv_bias), m.num_kv_heads, m.head_dim)
    if m.qk_norm:
        k = rms_norm(t, k, "k_norm")
    v = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "v_proj", bias=m.qkv_bias), m.num_kv_heads, m.head_dim)
    if rotated:
        q, k = rotary(t, q, shared["cos"], shared["sin"]), rotary(t, k, shared["cos"], shared["sin"])
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout))
    return linear(t, out, m.hidden_size, "o_proj", bias=m.out_bias)


def layer(m: Llama, t: Tape, x: Tensor, shared: Mapping[str, Tensor], *, rotated: bool = True) -> Tensor:
    """One decoder layer."""
    normed = rms_norm(t, x, "input_layernorm")
    with t.scope("self_attn"):
        attended = self_attention(m, t, normed, shared, rotated=rotated)
    x = add(t, x, attended)
    normed = rms_norm(t, x, "post_attention_layernorm")
    with t.scope("mlp"):
        fed = gated_mlp(t, normed, m.intermediate_size, m.activation, bias=m.mlp_bias)
    return add(t, x, fed)


def head(m: Llama, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("model"):
        x = rms_norm(t, x, "norm")
    logits = lm_head(t, x, m.vocab_size, tied_to="model.embed_tokens.weight" if m.tied else None)
    return causal_loss(t, logits)


def build(m: Llama, config: Config, model_type: str, **changes: object) -> Architecture:
    """The architecture of these numbers."""
    one = partial(layer, m)
    values: dict[str, object] = {
        "model_type": model_type,
        "task": "causal-lm",
        "stem": partial(stem, m),
        "layers": (one,) * m.num_layers,
        "layer_prefix": "model.layers.{}",
        "head": partial(head, m),
        "vocab_size": m.vocab_size,
        "max_positions": config.optional_integer("max_position_embeddings"),
        "hidden_size": m.hidden_size,
        "buffers": tuple(
            Buffer(f"model.rotary_emb.{name}", (m.head_dim // 2,), "fp32") for name in ("inv_freq", "original_inv_freq")
        ),
        "windows": frozenset() if m.window is None else frozenset({m.window}),
    }
    return Architecture(**(values | changes))  # type: ignore[arg-type]


def numbers(config: Config, *, tied_default: bool = False) -> dict[str, object]:
    """The keys that all of these families have under the same names."""
    hidden = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", default=num_heads)
    config.divided("num_attention_heads", num_heads, num_kv_heads)
    head_dim = config.optional_integer("head_dim")
    return {
        "hidden_size": hidden,
        "num_layers": config.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim or config.divided("hidden_size", hidden, num_heads),
        "intermediate_size": config.integer("intermediate_size"),
        "vocab_size": config.integer("vocab_size"),
        "activation": config.choice("hidden_act", known=ACTIVATION_BY_NAME, default="silu"),
        "tied": config.flag("tie_word_embeddings", default=tied_default),
        "dropout": config.fraction("attention_dropout", default=0.0),
    }


def llama(config: Config) -> Architecture:
    """``LlamaForCausalLM``."""
    bias = config.flag("attention_bias", default=False)
    m = Llama(
        **numbers(config),  # type: ignore[arg-type]
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )
    return build(m, config, "llama")


def qwen2(config: Config) -> Architecture:
    """``Qwen2ForCausalLM``: biases on q, k and v."""
    return build(Llama(**numbers(config), qkv_bias=True), config, "qwen2")  # type: ignore[arg-type]
