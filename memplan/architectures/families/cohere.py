"""Cohere's Command R and Aya: attention and MLP side by side behind one norm.

Modelled after transformers 5.23, models/cohere/modeling_cohere.py:

n = norm(x);  x = x + o(attention(rotary(q(n)), rotary(k(n)), v(n))) + down(act(gate(n)) * up(n));  logits * logit_scale

The norm is a LayerNorm without bias, written out in Python operators in fp32; rotary positions are applied in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.blocks import gated_mlp, heads, merged
from memplan.architectures.families import llama
from memplan.architectures.heads import causal_head
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import add
from memplan.operators.matrix import linear
from memplan.operators.normalisation import written_out_layer_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Architecture
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Cohere(llama.Llama):
    """The numbers of a Cohere model; `qk_norm` is over (heads, head_dim)."""


def projected(m: Cohere, t: Tape, x: Tensor, num: int, name: str, *, normed: bool) -> Tensor:
    """q, k or v of (b, s, num, head_dim), normalised where asked for, seen as (b, num, s, head_dim)."""
    out = linear(t, x, num * m.head_dim, f"{name}_proj", bias=m.qkv_bias)
    if normed:
        out = t.view(out, (*x.shape[:-1], num, m.head_dim))
        out = written_out_layer_norm(t, out, f"{name}_norm", weight_shape=(num, m.head_dim))
    return heads(t, out, num, m.head_dim)


def self_attention(m: Cohere, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Grouped-query attention with rotary positions in fp32."""
    q = projected(m, t, x, m.num_heads, "q", normed=m.qk_norm)
    k = projected(m, t, x, m.num_kv_heads, "k", normed=m.qk_norm)
    v = projected(m, t, x, m.num_kv_heads, "v", normed=False)
    q32, k32 = t.cast(q, "fp32"), t.cast(k, "fp32")
    turned_q = rotary(t, q32, shared["cos"], shared["sin"])
    turned_k = rotary(t, k32, shared["cos"], shared["sin"])
    t.keep_alive(q, k, q32, k32)
    q, k = t.cast(turned_q, q.dtype), t.cast(turned_k, k.dtype)
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout))
    return linear(t, out, m.hidden_size, "o_proj", bias=m.out_bias)


def layer(m: Cohere, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer."""
    normed = written_out_layer_norm(t, x, "input_layernorm")
    with t.scope("self_attn", normed):
        attended = self_attention(m, t, normed, shared)
    with t.scope("mlp", normed):
        fed = gated_mlp(t, normed, m.intermediate_size, m.activation)
    return add(t, add(t, x, attended), fed)


def head(m: Cohere, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, scaled logits, loss."""
    with t.scope("model"):
        x = written_out_layer_norm(t, x, "norm")
    return causal_head(t, x, m.vocab_size, tied_to="model.embed_tokens.weight" if m.tied else None, logits="scaled")


def cohere(config: Config) -> Architecture:
    """``CohereForCausalLM``."""
    defaults = {
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
    }
    bias = config.flag("attention_bias", default=False)
    m = Cohere(
        **llama.numbers(config, defaults, tied_default=True),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=config.flag("use_qk_norm", default=False),
    )
    one = partial(layer, m)
    return llama.build(m, config, "cohere", layers=(one,) * m.num_layers, head=partial(head, m))
