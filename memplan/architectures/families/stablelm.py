"""StableLM.

Modelled after transformers 5.23, models/stablelm/modeling_stablelm.py:

x = x + o(attention(rotary(q(n(x))), rotary(k(n(x))), v(n(x))));  x = x + drop(down(act(gate(n(x))) * up(n(x))))

Llama with a LayerNorm, biases on q, k and v as an option, and only part of each head rotated.  Optional: q and k
normalised by one LayerNorm for each head; attention and MLP side by side on one norm.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, Buffer, int64
from memplan.architectures.blocks import (
    HIDDEN,
    causal_mask,
    gated_mlp,
    heads,
    merged,
    partial_rotary,
    rotary_dim,
    rotary_tables,
)
from memplan.architectures.heads import causal_head
from memplan.operators.attention import attention
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, dropout
from memplan.operators.layout import cat, split
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class StableLM:
    """The numbers of a StableLM."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    vocab_size: int
    activation: str
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    parallel: bool
    attention_dropout: float
    hidden_dropout: float


def stem(m: StableLM, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, causal mask and rotary tables."""
    with t.scope("model"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_tokens")
        shared = causal_mask(t, x)
        with t.scope("rotary_emb"):
            shared |= rotary_tables(t, x, m.rotary_dim)
    return x, shared


def norm_per_head(t: Tape, x: Tensor, name: str) -> Tensor:
    """One LayerNorm without bias for each head of (b, heads, s, head_dim)."""
    b, num, s, head_dim = x.shape
    assert isinstance(num, int)
    parts = split(t, x, [(b, 1, s, head_dim)] * num)
    with t.scope(name), t.scope("norms"):
        return cat(t, [layer_norm(t, part, str(i), bias=False) for i, part in enumerate(parts)], x.shape)


def self_attention(m: StableLM, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Grouped-query attention with partial rotary positions."""
    q = heads(t, linear(t, x, m.num_heads * m.head_dim, "q_proj", bias=m.qkv_bias), m.num_heads, m.head_dim)
    k = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "k_proj", bias=m.qkv_bias), m.num_kv_heads, m.head_dim)
    v = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "v_proj", bias=m.qkv_bias), m.num_kv_heads, m.head_dim)
    if m.qk_norm:
        q, k = norm_per_head(t, q, "q_layernorm"), norm_per_head(t, k, "k_layernorm")
    q, k = (partial_rotary(t, part, shared["cos"], shared["sin"], m.rotary_dim, held=True) for part in (q, k))
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.attention_dropout, by_head=True))
    return linear(t, out, m.hidden_size, "o_proj")


def feed_forward(m: StableLM, t: Tape, x: Tensor) -> Tensor:
    """Gated MLP and dropout."""
    with t.scope("mlp", x):
        fed = gated_mlp(t, x, m.intermediate_size, m.activation)
    return dropout(t, fed, m.hidden_dropout)


def layer(m: StableLM, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer."""
    normed = layer_norm(t, x, "input_layernorm")
    t.hold_in_piece(normed)
    with t.scope("self_attn", normed):
        attended = self_attention(m, t, normed, shared)
    t.hold_in_piece(attended)
    if m.parallel:
        fed = feed_forward(m, t, normed)
        return add(t, add(t, x, attended), fed)
    x = add(t, x, attended)
    return add(t, x, feed_forward(m, t, layer_norm(t, x, "post_attention_layernorm")))


def head(m: StableLM, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("model"):
        x = layer_norm(t, x, "norm")
    return causal_head(t, x, m.vocab_size, tied_to="model.embed_tokens.weight" if m.tied else None)


def stablelm(config: Config) -> Architecture:
    """``StableLmForCausalLM``."""
    hidden = config.integer("hidden_size", default=2560)
    num_heads = config.integer("num_attention_heads", default=32)
    num_kv_heads = config.integer("num_key_value_heads", default=32)
    config.divided("num_attention_heads", num_heads, num_kv_heads)
    head_dim = config.divided("hidden_size", hidden, num_heads)
    m = StableLM(
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", default=32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim(config, head_dim, "partial_rotary_factor", 0.25),
        intermediate_size=config.integer("intermediate_size", default=6912),
        vocab_size=config.integer("vocab_size", default=50304),
        activation=config.choice("hidden_act", known=ACTIVATION_BY_NAME, default="silu"),
        tied=config.flag("tie_word_embeddings", default=False),
        qkv_bias=config.flag("use_qkv_bias", default=False),
        qk_norm=config.flag("qk_layernorm", default=False),
        parallel=config.flag("use_parallel_residual", default=False),
        attention_dropout=config.fraction("attention_dropout", default=0.0),
        hidden_dropout=config.fraction("hidden_dropout", default=0.0),
    )
    return Architecture(
        model_type="stablelm",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="model.layers.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=config.integer("max_position_embeddings", default=4096),
        hidden_size=hidden,
        buffers=tuple(
            Buffer(f"model.rotary_emb.{name}", (m.rotary_dim // 2,), "fp32")
            for name in ("inv_freq", "original_inv_freq")
        ),
    )
