"""BLOOM.

Modelled after transformers 5.23, models/bloom/modeling_bloom.py:

x = n(embedding);  x = x + drop(dense(attention(n(x))));  x = x + drop(dense_4h_to_h(gelu(dense_h_to_4h(n(x)))))

Positions are a bias of the scores (ALiBi).  GELU is a function with a backward of its own, which keeps its input only.
There is no fused attention.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, int64
from memplan.architectures.blocks import HIDDEN, causal_mask, merged
from memplan.architectures.heads import causal_head
from memplan.errors import ConfigError
from memplan.operators.attention import cached, slices_batched, softmax
from memplan.operators.elementwise import add, dropout
from memplan.operators.layout import copy, take
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm
from memplan.operators.products import matmul
from memplan.operators.sizes import count
from memplan.operators.tape import Gradient, elements
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Bloom:
    """The numbers of a BLOOM."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    residual_after_norm: bool
    attention_dropout: float
    hidden_dropout: float


def stem(m: Bloom, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, its norm, and the bias of the scores: (b * heads, 1, s)."""
    with t.scope("transformer"):
        tokens = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "word_embeddings")
        x = layer_norm(t, tokens, "word_embeddings_layernorm")
        slopes = t.op("slopes", (), (m.num_heads,), dtype="fp32")
        t.hold_in_model(slopes)
        arange = t.op("arange", (), ("s",), dtype="int64")
        one = t.op("mul", (slopes, arange), (m.num_heads, 1, "s"), dtype="fp32")
        alibi = t.cast(t.op("repeat", (one,), ("b", m.num_heads, 1, "s")), x.dtype)
        shared = causal_mask(t, tokens)
        t.keep_alive(tokens)
    return x, shared | {"alibi": alibi}


def scores_with_bias(t: Tape, q: Tensor, k: Tensor, alibi: Tensor) -> Tensor:
    """``baddbmm``: bias + scale * q k^T; each gradient is computed, then scaled into a new tensor."""
    alibi, q, k = t.autocast(alibi), t.autocast(q), t.autocast(k)
    b, num, s, head_dim = q.shape
    shape = (b, num, s, s)
    return t.op(
        "baddbmm",
        (alibi, q, k),
        shape,
        dtype=q.dtype,
        keeps=(q, k),
        gradients=[Gradient(x, scratch=(x.bytes,)) for x in (q, k)],
        flops=count((*shape, head_dim)).times(2),
        reason="a product keeps each factor for the gradient of the other",
    )


def gelu(t: Tape, x: Tensor) -> Tensor:
    """GELU by tanh with a backward written by hand: three temporaries beside the result, four beside the gradient."""
    return t.op(
        "gelu",
        (x,),
        x.shape,
        keeps=(x,),
        scratch=[x.bytes] * 3,
        backward_scratch=[x.bytes] * 4,
        flops=elements(x).times(8),
        reason="the derivative of gelu needs its input",
    )


def self_attention(m: Bloom, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Multi-head attention on one joint projection, batch and heads in one dimension."""
    joint = linear(t, x, 3 * m.hidden_size, "query_key_value", bias=True)
    by_head = ("b", m.num_heads, "s", m.head_dim)
    q, k, v = (take(t, joint, by_head) for _ in range(3))
    q, k, v = slices_batched(t, q, *cached(t, k, v))
    unbiased = scores_with_bias(t, q, k, shared["alibi"])
    scores = add(t, unbiased, shared["mask"])
    weights = dropout(t, t.cast(softmax(t, scores, dtype="fp32"), q.dtype), m.attention_dropout)
    t.hold_in_module(joint, q, k, v, unbiased, scores)
    t.hold_into_next(weights)
    t.also_returns(weights)
    out = copy(t, matmul(t, weights, v, by_head, "s"), ("b", "s", m.num_heads, m.head_dim))
    return dropout(t, linear(t, merged(t, out), m.hidden_size, "dense", bias=True), m.hidden_dropout)


def layer(m: Bloom, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One block."""
    normed = layer_norm(t, x, "input_layernorm")
    with t.scope("self_attention", normed):
        x = add(t, normed if m.residual_after_norm else x, self_attention(m, t, normed, shared))
    normed = layer_norm(t, x, "post_attention_layernorm")
    with t.scope("mlp", normed):
        bent = gelu(t, linear(t, normed, 4 * m.hidden_size, "dense_h_to_4h", bias=True))
        fed = dropout(t, linear(t, bent, m.hidden_size, "dense_4h_to_h", bias=True), m.hidden_dropout)
    return add(t, normed if m.residual_after_norm else x, fed)


def head(m: Bloom, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("transformer"):
        x = layer_norm(t, x, "ln_f")
    tied_to = "transformer.word_embeddings.weight" if m.tied else None
    return causal_head(t, x, m.vocab_size, tied_to=tied_to)


def bloom(config: Config) -> Architecture:
    """``BloomForCausalLM``."""
    hidden = config.integer("n_embed", "hidden_size", default=64)
    num_heads = config.integer("n_head", "num_attention_heads", default=8)
    if config.integer("pretraining_tp", default=1) > 1 and config.flag("slow_but_exact", default=False):
        raise ConfigError(
            f"slow_but_exact in {config.origin} is true, which is not modelled.", "Set slow_but_exact to false."
        )
    m = Bloom(
        hidden_size=hidden,
        num_layers=config.integer("n_layer", "num_hidden_layers", default=2),
        num_heads=num_heads,
        head_dim=config.divided("hidden_size", hidden, num_heads),
        vocab_size=config.integer("vocab_size", default=250880),
        tied=config.flag("tie_word_embeddings", default=True),
        residual_after_norm=config.flag("apply_residual_connection_post_layernorm", default=False),
        attention_dropout=config.fraction("attention_dropout", default=0.0),
        hidden_dropout=config.fraction("hidden_dropout", default=0.0),
    )
    return Architecture(
        model_type="bloom",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="transformer.h.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=None,
        hidden_size=hidden,
        attentions=("eager",),
    )
