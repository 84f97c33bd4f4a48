"""Phi-1, Phi-1.5 and Phi-2.

Modelled after transformers 5.23, models/phi/modeling_phi.py:

h = n(x);  x = drop(dense(attention(rotary(q(h)), rotary(k(h)), v(h)))) + drop(fc2(act(fc1(h)))) + x

Every linear layer has a bias, the head included; only part of each head is rotated.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, Buffer, int64
from memplan.architectures.blocks import (
    HIDDEN,
    causal_mask,
    heads,
    merged,
    partial_rotary,
    rotary_dim,
    rotary_tables,
)
from memplan.architectures.heads import causal_head
from memplan.operators.attention import attention
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, dropout
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Phi:
    """The numbers of a Phi."""

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
    qk_norm: bool
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float


def stem(m: Phi, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, causal mask and rotary tables."""
    with t.scope("model"):
        tokens = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_tokens")
        shared = causal_mask(t, tokens)
        x = dropout(t, tokens, m.embedding_dropout)
        with t.scope("rotary_emb"):
            shared |= rotary_tables(t, x, m.rotary_dim)
    return x, shared


def self_attention(m: Phi, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Attention with biases and partial rotary positions."""
    q = heads(t, linear(t, x, m.num_heads * m.head_dim, "q_proj", bias=True), m.num_heads, m.head_dim)
    k = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "k_proj", bias=True), m.num_kv_heads, m.head_dim)
    v = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "v_proj", bias=True), m.num_kv_heads, m.head_dim)
    if m.qk_norm:
        q, k = layer_norm(t, q, "q_layernorm"), layer_norm(t, k, "k_layernorm")
    q, k = (partial_rotary(t, part, shared["cos"], shared["sin"], m.rotary_dim, held=True) for part in (q, k))
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.attention_dropout, by_head=True))
    return linear(t, out, m.hidden_size, "dense", bias=True)


def layer(m: Phi, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer: attention and MLP side by side on one norm."""
    normed = layer_norm(t, x, "input_layernorm")
    t.hold_in_piece(normed)
    with t.scope("self_attn", normed):
        attended = self_attention(m, t, normed, shared)
    attended = dropout(t, attended, m.residual_dropout)
    with t.scope("mlp", normed):
        bent = ACTIVATION_BY_NAME[m.activation](t, linear(t, normed, m.intermediate_size, "fc1", bias=True))
        fed = linear(t, bent, m.hidden_size, "fc2", bias=True)
    return add(t, add(t, attended, dropout(t, fed, m.residual_dropout)), x)


def head(m: Phi, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits with a bias, loss."""
    with t.scope("model"):
        x = layer_norm(t, x, "final_layernorm")
    tied_to = "model.embed_tokens.weight" if m.tied else None
    return causal_head(t, x, m.vocab_size, tied_to=tied_to, bias=True)


def phi(config: Config) -> Architecture:
    """``PhiForCausalLM``."""
    hidden = config.integer("hidden_size", default=2048)
    num_heads = config.integer("num_attention_heads", default=32)
    num_kv_heads = config.integer("num_key_value_heads", default=num_heads)
    config.divided("num_attention_heads", num_heads, num_kv_heads)
    head_dim = config.divided("hidden_size", hidden, num_heads)
    m = Phi(
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", default=24),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim(config, head_dim, "partial_rotary_factor", 0.5),
        intermediate_size=config.integer("intermediate_size", default=8192),
        vocab_size=config.integer("vocab_size", default=51200),
        activation=config.choice("hidden_act", known=ACTIVATION_BY_NAME, default="gelu_new"),
        tied=config.flag("tie_word_embeddings", default=False),
        qk_norm=config.flag("qk_layernorm", default=False),
        embedding_dropout=config.fraction("embd_pdrop", default=0.0),
        attention_dropout=config.fraction("attention_dropout", default=0.0),
        residual_dropout=config.fraction("resid_pdrop", default=0.0),
    )
    return Architecture(
        model_type="phi",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="model.layers.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=config.integer("max_position_embeddings", default=2048),
        hidden_size=hidden,
        buffers=tuple(
            Buffer(f"model.rotary_emb.{name}", (m.rotary_dim // 2,), "fp32")
            for name in ("inv_freq", "original_inv_freq")
        ),
    )
