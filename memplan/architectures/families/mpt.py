"""MPT.

Modelled after transformers 5.23, models/mpt/modeling_mpt.py:

x = drop(out_proj(attention(n(x)))) + x;  x = drop(down(gelu(up(n(x))))) + x

No biases at all, not even in the norms.  Positions are a bias of the scores (ALiBi) in fp32, so that the scores are
fp32 from there on.  There is no fused attention.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, int64
from memplan.architectures.blocks import HIDDEN, additive_mask, merged, split_heads
from memplan.architectures.heads import causal_head
from memplan.operators.attention import cached, slices_batched, softmax
from memplan.operators.elementwise import add, dropout, keeps_input, scale
from memplan.operators.layout import copy
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm
from memplan.operators.products import matmul
from memplan.operators.tape import elements
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class MPT:
    """The numbers of an MPT."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool
    clipped: bool
    """q, k and v are clamped."""
    dropout: float


def stem(m: MPT, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, the bias of the scores for the longest sequence, and a boolean mask."""
    with t.scope("transformer"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "wte")
        alibi = t.op("mul", (), (m.num_heads, 1, m.max_positions), dtype="fp32")
        mask = t.cast(additive_mask(t, x.dtype), "bool")
    return x, {"alibi": alibi, "mask": mask}


def masked_fill(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """``x.masked_fill(mask, number)``: keeps the mask."""
    return t.op(
        "masked_fill",
        (x, mask),
        x.shape,
        keeps=(mask,),
        flops=elements(x),
        reason="the gradient is zero where the mask is set",
    )


def self_attention(m: MPT, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Multi-head attention on one joint projection."""
    joint = linear(t, x, 3 * m.hidden_size, "Wqkv")
    if m.clipped:
        joint = keeps_input(t, "clamp", joint)
    q, k, v = split_heads(t, joint, m.num_heads, m.head_dim)
    k, v = cached(t, k, v)
    batched = slices_batched(t, q, k, v)
    b, num, s, head_dim = q.shape
    scores = scale(t, matmul(t, next(batched), next(batched), (b, num, s, s), head_dim))
    bias = t.view(shared["alibi"], (num, 1, s))
    scores = masked_fill(t, add(t, scores, bias), shared["mask"])
    weights = dropout(t, t.cast(softmax(t, scores, dtype="fp32"), joint.dtype), m.dropout)
    t.hold_in_module(joint, scores)
    t.hold_into_next(weights)
    t.also_returns(weights)
    out = copy(t, matmul(t, weights, next(batched), (b, num, s, head_dim), s), (b, s, num, head_dim))
    return linear(t, merged(t, out), m.hidden_size, "out_proj")


def layer(m: MPT, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One block."""
    normed = layer_norm(t, x, "norm_1", bias=False)
    with t.scope("attn", normed):
        attended = self_attention(m, t, normed, shared)
    t.hold_in_piece(attended)
    x = add(t, dropout(t, attended, m.dropout), x)
    normed = layer_norm(t, x, "norm_2", bias=False)
    with t.scope("ffn", normed):
        bent = keeps_input(t, "gelu", linear(t, normed, 4 * m.hidden_size, "up_proj"))
        return add(t, dropout(t, linear(t, bent, m.hidden_size, "down_proj"), m.dropout), x)


def head(m: MPT, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("transformer"):
        x = layer_norm(t, x, "norm_f", bias=False)
    return causal_head(t, x, m.vocab_size, tied_to="transformer.wte.weight" if m.tied else None)


def mpt(config: Config) -> Architecture:
    """``MptForCausalLM``."""
    hidden = config.integer("d_model", "hidden_size", default=2048)
    num_heads = config.integer("n_heads", "num_attention_heads", default=16)
    inner = config.part("attn_config") if config.has("attn_config") else None
    m = MPT(
        hidden_size=hidden,
        num_layers=config.integer("n_layers", "num_hidden_layers", default=24),
        num_heads=num_heads,
        head_dim=config.divided("d_model", hidden, num_heads),
        vocab_size=config.integer("vocab_size", default=50368),
        max_positions=config.integer("max_seq_len", default=2048),
        tied=config.flag("tie_word_embeddings", default=True),
        clipped=inner is not None and bool(inner.raw("clip_qkv")),
        dropout=0.0 if inner is None else inner.fraction("attn_pdrop", default=0.0),
    )
    return Architecture(
        model_type="mpt",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="transformer.blocks.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=m.max_positions,
        hidden_size=hidden,
        attentions=("eager",),
    )
