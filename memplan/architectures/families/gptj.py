"""GPT-J.

Modelled after transformers 5.23, models/gptj/modeling_gptj.py:

h = n(x);  x = drop(out(attention(rotary(q(h)), rotary(k(h)), v(h)))) + drop(fc_out(act(fc_in(h)))) + x

Rotary positions turn pairs of neighbours and come from a table that every layer holds; q and k go to fp32 before the
scores.  There is no
scaled_dot_product_attention here; the flash-attention package's kernel is not described.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from memplan.architectures.architecture import Architecture, Buffer, int64
from memplan.architectures.blocks import HIDDEN, causal_mask, counted_positions, heads, merged
from memplan.architectures.heads import causal_head
from memplan.operators.attention import attention, cached
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, dropout, mul, neg
from memplan.operators.layout import cat, split, take
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class GPTJ:
    """The numbers of a GPT-J."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    activation: str
    tied: bool
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float


def stem(m: GPTJ, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, position ids and the mask."""
    with t.scope("transformer"):
        tokens = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "wte")
        position_ids = counted_positions(t)
        shared = causal_mask(t, tokens)
        x = dropout(t, tokens, m.embedding_dropout)
    return x, shared | {"position_ids": position_ids}


def sine_and_cosine(m: GPTJ, t: Tape, position_ids: Tensor, dtype: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The rows of the table at these positions, (1, s, dim / 2) each, made anew in every layer; and what it takes."""
    table = t.op("repeat", (), (1, m.max_positions, m.rotary_dim), dtype="fp32")
    index = t.op("repeat", (position_ids,), (1, "s", m.rotary_dim))
    rows = t.cast(t.op("gather", (table, index), (1, "s", m.rotary_dim), dtype="fp32"), dtype)
    half = (1, "s", m.rotary_dim // 2)
    sine, cosine = split(t, rows, (half, half))
    return sine, cosine, (table, index, rows)


def turned(m: GPTJ, t: Tape, x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Rotary on the first dimensions of (b, s, heads, head_dim): pairs of neighbours turn, the rest passes."""
    b, s, num, _ = x.shape
    whole = (b, s, num, m.rotary_dim)
    half = (b, s, num, m.rotary_dim // 2)
    turning, passing = take(t, x, whole), take(t, x, (b, s, num, m.head_dim - m.rotary_dim))
    wide = (1, "s", 1, m.rotary_dim)
    sine, cosine = (t.op("repeat_interleave", (table,), wide) for table in (sine, cosine))
    straight = mul(t, turning, cosine)
    first, second = take(t, turning, half), take(t, turning, half)
    swapped = cat(t, (neg(t, second), first), whole)
    turned_part = add(t, straight, mul(t, swapped, sine))
    t.hold_in_module(turned_part, passing)
    return cat(t, (turned_part, passing), x.shape)


def self_attention(m: GPTJ, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Multi-head attention; scores and softmax are computed in fp32."""
    q, k, v = (linear(t, x, m.hidden_size, name) for name in ("q_proj", "k_proj", "v_proj"))
    by_token = ("b", "s", m.num_heads, m.head_dim)
    q, k, v = t.view(q, by_token), t.view(k, by_token), heads(t, v, m.num_heads, m.head_dim)
    sine, cosine, variables = sine_and_cosine(m, t, shared["position_ids"], k.dtype)
    k, q = turned(m, t, k, sine, cosine), turned(m, t, q, sine, cosine)
    by_head = ("b", m.num_heads, "s", m.head_dim)
    q, k = t.view(q, by_head), t.view(k, by_head)
    t.hold_in_module(q, k)
    k, v = cached(t, k, v)
    q, k = t.cast(q, "fp32"), t.cast(k, "fp32")
    mask = shared.get("mask")
    how: dict[str, Any] = {"softmax_dtype": None, "weights_dtype": v.dtype, "returned": True, "caches": False}
    out = attention(t, q, k, v, mask, p=m.attention_dropout, **how)
    out = dropout(t, linear(t, merged(t, out), m.hidden_size, "out_proj"), m.residual_dropout)
    t.keep_alive(*variables)
    return out


def layer(m: GPTJ, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One block: attention and MLP side by side on one norm."""
    normed = layer_norm(t, x, "ln_1")
    with t.scope("attn", normed):
        attended = self_attention(m, t, normed, shared)
    with t.scope("mlp", normed):
        bent = ACTIVATION_BY_NAME[m.activation](t, linear(t, normed, m.intermediate_size, "fc_in", bias=True))
        fed = dropout(t, linear(t, bent, m.hidden_size, "fc_out", bias=True), m.residual_dropout)
    return add(t, add(t, attended, fed), x)


def head(m: GPTJ, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits with a bias, loss."""
    with t.scope("transformer"):
        x = layer_norm(t, x, "ln_f")
    tied_to = "transformer.wte.weight" if m.tied else None
    return causal_head(t, x, m.vocab_size, tied_to=tied_to, bias=True)


def gptj(config: Config) -> Architecture:
    """``GPTJForCausalLM``."""
    hidden = config.integer("n_embd", "hidden_size", default=4096)
    num_heads = config.integer("n_head", "num_attention_heads", default=16)
    head_dim = config.divided("n_embd", hidden, num_heads)
    m = GPTJ(
        hidden_size=hidden,
        num_layers=config.integer("n_layer", "num_hidden_layers", default=28),
        num_heads=num_heads,
        head_dim=head_dim,
        rotary_dim=config.paired(config.integer("rotary_dim", default=64), "rotary_dim"),
        intermediate_size=config.integer("n_inner", default=4 * hidden),
        vocab_size=config.integer("vocab_size", default=50400),
        max_positions=config.integer("n_positions", "max_position_embeddings", default=2048),
        activation=config.choice("activation_function", known=ACTIVATION_BY_NAME, default="gelu_new"),
        tied=config.flag("tie_word_embeddings", default=False),
        embedding_dropout=config.fraction("embd_pdrop", default=0.0),
        attention_dropout=config.fraction("attn_pdrop", default=0.0),
        residual_dropout=config.fraction("resid_pdrop", default=0.0),
    )
    return Architecture(
        model_type="gptj",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="transformer.h.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=m.max_positions,
        hidden_size=hidden,
        buffers=tuple(
            Buffer(f"transformer.h.{n}.attn.embed_positions", (m.max_positions, m.rotary_dim), "fp32")
            for n in range(m.num_layers)
        ),
        attentions=("eager",),
    )
