"""OPT.

Modelled after transformers 5.23, models/opt/modeling_opt.py:

x = x + drop(out(attention(q(n(x)) / sqrt(d), k(n(x)), v(n(x)))));  x = x + drop(fc2(act(fc1(n(x)))))

The 350m model normalises after each sum instead of before, and has a narrower embedding with a projection on either
side.  Positions are learned, two rows more than the longest sequence.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, int64
from memplan.architectures.blocks import HIDDEN, causal_mask, heads, merged
from memplan.architectures.heads import causal_head
from memplan.operators.attention import attention
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, add_scalar, dropout, mul, scale
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor

POSITION_OFFSET = 2
"""Rows of the position table that no position uses."""


@dataclass(frozen=True, kw_only=True)
class OPT:
    """The numbers of an OPT."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    embedding_size: int
    vocab_size: int
    max_positions: int
    activation: str
    tied: bool
    norm_first: bool
    final_norm: bool
    affine: bool
    bias: bool
    dropout: float
    attention_dropout: float


def stem(m: OPT, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Token and position embeddings; positions are counted from a mask of ones."""
    with t.scope("model"), t.scope("decoder"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.embedding_size, "embed_tokens")
        ones = t.op("ones", (), HIDDEN, dtype="fp32")
        counted = add_scalar(t, mul(t, t.op("cumsum", (ones,), HIDDEN), ones))
        position_ids = t.cast(counted, "int64")
        shared = causal_mask(t, x)
        rows = m.max_positions + POSITION_OFFSET
        places = embedding(t, add_scalar(t, position_ids), rows, m.hidden_size, "embed_positions")
        if m.embedding_size != m.hidden_size:
            x = linear(t, x, m.hidden_size, "project_in")
        t.hold_in_model(places)
        t.hold_in_model(ones)
        x = add(t, x, places)
    return x, shared | {"position_ids": position_ids}


def self_attention(m: OPT, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Multi-head attention; q is scaled before, and in the eager form the scores once more, by one."""
    q = heads(t, scale(t, linear(t, x, m.hidden_size, "q_proj", bias=m.bias)), m.num_heads, m.head_dim)
    k = heads(t, linear(t, x, m.hidden_size, "k_proj", bias=m.bias), m.num_heads, m.head_dim)
    v = heads(t, linear(t, x, m.hidden_size, "v_proj", bias=m.bias), m.num_heads, m.head_dim)
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.attention_dropout))
    return linear(t, out, m.hidden_size, "out_proj", bias=m.bias)


def layer(m: OPT, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer."""
    normed = layer_norm(t, x, "self_attn_layer_norm", affine=m.affine) if m.norm_first else x
    with t.scope("self_attn", normed):
        attended = self_attention(m, t, normed, shared)
    x = add(t, x, dropout(t, attended, m.dropout))
    if not m.norm_first:
        x = layer_norm(t, x, "self_attn_layer_norm", affine=m.affine)
    normed = layer_norm(t, x, "final_layer_norm", affine=m.affine) if m.norm_first else x
    bent = ACTIVATION_BY_NAME[m.activation](t, linear(t, normed, m.intermediate_size, "fc1", bias=m.bias))
    x = add(t, x, dropout(t, linear(t, bent, m.hidden_size, "fc2", bias=m.bias), m.dropout))
    return x if m.norm_first else layer_norm(t, x, "final_layer_norm", affine=m.affine)


def head(m: OPT, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, projection to the embedding's width, logits, loss."""
    with t.scope("model"), t.scope("decoder"):
        if m.final_norm:
            x = layer_norm(t, x, "final_layer_norm", affine=m.affine)
        if m.embedding_size != m.hidden_size:
            x = linear(t, x, m.embedding_size, "project_out")
    return causal_head(t, x, m.vocab_size, tied_to="model.decoder.embed_tokens.weight" if m.tied else None)


def opt(config: Config) -> Architecture:
    """``OPTForCausalLM``."""
    hidden = config.integer("hidden_size", default=768)
    num_heads = config.integer("num_attention_heads", default=12)
    norm_first = config.flag("do_layer_norm_before", default=True)
    m = OPT(
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", default=12),
        num_heads=num_heads,
        head_dim=config.divided("hidden_size", hidden, num_heads),
        intermediate_size=config.integer("ffn_dim", default=3072),
        embedding_size=config.integer("word_embed_proj_dim", default=hidden),
        vocab_size=config.integer("vocab_size", default=50272),
        max_positions=config.integer("max_position_embeddings", default=2048),
        activation=config.choice("activation_function", known=ACTIVATION_BY_NAME, default="relu"),
        tied=config.flag("tie_word_embeddings", default=True),
        norm_first=norm_first,
        final_norm=norm_first and not config.flag("_remove_final_layer_norm", default=False),
        affine=config.flag("layer_norm_elementwise_affine", default=True),
        bias=config.flag("enable_bias", default=True),
        dropout=config.fraction("dropout", default=0.1),
        attention_dropout=config.fraction("attention_dropout", default=0.0),
    )
    dropped = config.fraction("layerdrop", default=0.0) > 0
    return Architecture(
        model_type="opt",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="model.decoder.layers.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=m.max_positions,
        hidden_size=hidden,
        unmodelled=(("layerdrop", "which layers a step skips is random; none is taken to be skipped"),) * dropped,
    )
