"""GPT-NeoX and Pythia.

Modelled after transformers 5.23, models/gpt_neox/modeling_gpt_neox.py:

x = drop(mlp(n2(x))) + drop(attention(n1(x))) + x        (parallel residual)
y = drop(attention(n1(x))) + x;  x = drop(mlp(n2(y))) + y        (else)

q, k and v are slices of one projection, so that keeping v keeps all three; only part of each head is rotated.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, Buffer, int64
from memplan.architectures.blocks import (
    HIDDEN,
    causal_mask,
    merged,
    partial_rotary,
    rotary_dim,
    rotary_tables,
    split_heads,
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
class GPTNeoX:
    """The numbers of a GPT-NeoX."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    vocab_size: int
    activation: str
    tied: bool
    bias: bool
    parallel: bool
    attention_dropout: float
    hidden_dropout: float


def stem(m: GPTNeoX, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, causal mask and rotary tables."""
    with t.scope("gpt_neox"):
        tokens = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_in")
        shared = causal_mask(t, tokens)
        x = dropout(t, tokens, m.hidden_dropout)
        with t.scope("rotary_emb"):
            shared |= rotary_tables(t, x, m.rotary_dim)
    return x, shared


def self_attention(m: GPTNeoX, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Multi-head attention on one joint projection."""
    q, k, v = split_heads(t, linear(t, x, 3 * m.hidden_size, "query_key_value", bias=m.bias), m.num_heads, m.head_dim)
    q, k = (partial_rotary(t, part, shared["cos"], shared["sin"], m.rotary_dim) for part in (q, k))
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.attention_dropout, by_head=True))
    return linear(t, out, m.hidden_size, "dense", bias=m.bias)


def feed_forward(m: GPTNeoX, t: Tape, x: Tensor) -> Tensor:
    """Norm, two layers and dropout."""
    normed = layer_norm(t, x, "post_attention_layernorm")
    with t.scope("mlp", normed):
        bent = ACTIVATION_BY_NAME[m.activation](t, linear(t, normed, m.intermediate_size, "dense_h_to_4h", bias=True))
        fed = linear(t, bent, m.hidden_size, "dense_4h_to_h", bias=True)
    return dropout(t, fed, m.hidden_dropout)


def layer(m: GPTNeoX, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One layer."""
    normed = layer_norm(t, x, "input_layernorm")
    with t.scope("attention", normed):
        attended = self_attention(m, t, normed, shared)
    attended = dropout(t, attended, m.hidden_dropout)
    if m.parallel:
        fed = feed_forward(m, t, x)
        t.keep_alive(result := add(t, add(t, fed, attended), x), fed, attended)
        return result
    attended = add(t, attended, x)
    return add(t, feed_forward(m, t, attended), attended)


def head(m: GPTNeoX, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("gpt_neox"):
        x = layer_norm(t, x, "final_layer_norm")
    return causal_head(t, x, m.vocab_size, tied_to="gpt_neox.embed_in.weight" if m.tied else None)


def gpt_neox(config: Config) -> Architecture:
    """``GPTNeoXForCausalLM``."""
    hidden = config.integer("hidden_size", default=6144)
    num_heads = config.integer("num_attention_heads", default=64)
    head_dim = config.divided("hidden_size", hidden, num_heads)
    m = GPTNeoX(
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", default=44),
        num_heads=num_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim(config, head_dim, "rotary_pct", 0.25),
        intermediate_size=config.integer("intermediate_size", default=24576),
        vocab_size=config.integer("vocab_size", default=50432),
        activation=config.choice("hidden_act", known=ACTIVATION_BY_NAME, default="gelu"),
        tied=config.flag("tie_word_embeddings", default=False),
        bias=config.flag("attention_bias", default=True),
        parallel=config.flag("use_parallel_residual", default=True),
        attention_dropout=config.fraction("attention_dropout", default=0.0),
        hidden_dropout=config.fraction("hidden_dropout", default=0.0),
    )
    return Architecture(
        model_type="gpt_neox",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="gpt_neox.layers.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=config.integer("max_position_embeddings", default=2048),
        hidden_size=hidden,
        buffers=tuple(
            Buffer(f"gpt_neox.rotary_emb.{name}", (m.rotary_dim // 2,), "fp32")
            for name in ("inv_freq", "original_inv_freq")
        ),
    )
