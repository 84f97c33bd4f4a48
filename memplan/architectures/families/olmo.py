"""OLMo and OLMo 2.

Modelled after transformers 5.23, models/olmo and models/olmo2.  Both keep their rotary tables in fp32, so that q and k
are turned in fp32.

======  ===============================================================================================================
OLMo    LayerNorm without weight and bias, in fp32; q, k and v may be clipped in place (``clip_qkv``)
OLMo 2  norms after attention and MLP instead of before; q and k are normalised over their full width
======  ===============================================================================================================
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import int64
from memplan.architectures.blocks import (
    HIDDEN,
    causal_mask,
    gated_mlp,
    heads,
    merged,
    rotary_tables,
)
from memplan.architectures.families import llama
from memplan.architectures.heads import causal_head
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import add, clamp_in_place
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm, rms_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Architecture
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Olmo(llama.Llama):
    """The numbers of an OLMo; `qk_norm` is over the full width."""

    clipped: bool = False
    """q, k and v are clipped."""


def stem(m: Olmo, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, mask and fp32 rotary tables."""
    with t.scope("model"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_tokens")
        shared = causal_mask(t, x)
        with t.scope("rotary_emb"):
            shared |= rotary_tables(t, x, m.head_dim, dtype="fp32")
    return x, shared


def self_attention(m: Olmo, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Attention with rotary positions in fp32."""
    q, k, v = (projected(m, t, x, num, name) for num, name in _projections(m))
    if m.clipped:
        q, k, v = (clamp_in_place(t, y) for y in (q, k, v))
    q = heads(t, q, m.num_heads, m.head_dim)
    k, v = (heads(t, y, m.num_kv_heads, m.head_dim) for y in (k, v))
    turned_q = rotary(t, q, shared["cos"], shared["sin"])
    turned_k = rotary(t, k, shared["cos"], shared["sin"])
    t.keep_alive(q, k)
    q, k = t.cast(turned_q, q.dtype), t.cast(turned_k, k.dtype)
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout))
    return linear(t, out, m.hidden_size, "o_proj", bias=m.out_bias)


def _projections(m: Olmo) -> tuple[tuple[int, str], ...]:
    return ((m.num_heads, "q"), (m.num_kv_heads, "k"), (m.num_kv_heads, "v"))


def projected(m: Olmo, t: Tape, x: Tensor, num: int, name: str) -> Tensor:
    """q, k or v of (b, s, num * head_dim), q and k normalised where asked for."""
    out = linear(t, x, num * m.head_dim, f"{name}_proj", bias=m.qkv_bias)
    if m.qk_norm and name != "v":
        out = rms_norm(t, out, f"{name}_norm", gain_in_fp32=True)
    return out


def plain_norm(t: Tape, x: Tensor, name: str) -> Tensor:
    """``OlmoLayerNorm``: fp32, without weight and bias."""
    return t.cast(layer_norm(t, t.cast(x, "fp32"), name, affine=False), x.dtype)


def layer(m: Olmo, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One layer of the first OLMo."""
    normed = plain_norm(t, x, "input_layernorm")
    with t.scope("self_attn", normed):
        attended = self_attention(m, t, normed, shared)
    x = add(t, x, attended)
    normed = plain_norm(t, x, "post_attention_layernorm")
    with t.scope("mlp", normed):
        fed = gated_mlp(t, normed, m.intermediate_size, m.activation)
    return add(t, x, fed)


def layer2(m: Olmo, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One layer of OLMo 2."""
    with t.scope("self_attn"):
        attended = self_attention(m, t, x, shared)
    x = _added(t, x, attended, "post_attention_layernorm")
    with t.scope("mlp"):
        fed = gated_mlp(t, x, m.intermediate_size, m.activation)
    return _added(t, x, fed, "post_feedforward_layernorm")


def _added(t: Tape, x: Tensor, made: Tensor, norm: str) -> Tensor:
    """``x + norm(made)``; a variable of the layer holds what was made until it is normalised."""
    normed = rms_norm(t, made, norm, gain_in_fp32=True)
    t.keep_alive(made)
    return add(t, x, normed)


def head(m: Olmo, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss; the first OLMo's norm has no weight."""
    with t.scope("model"):
        x = rms_norm(t, x, "norm", gain_in_fp32=True) if m.qk_norm else plain_norm(t, x, "norm")
    return causal_head(t, x, m.vocab_size, tied_to="model.embed_tokens.weight" if m.tied else None)


_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def _read(config: Config, *, second: bool) -> Architecture:
    bias = config.flag("attention_bias", default=False)
    m = Olmo(
        **llama.numbers(config, _DEFAULTS),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=second,
        clipped=not second and config.has("clip_qkv"),
    )
    one = partial(layer2 if second else layer, m)
    return llama.build(
        m,
        config,
        "olmo2" if second else "olmo",
        stem=partial(stem, m),
        layers=(one,) * m.num_layers,
        head=partial(head, m),
    )


def olmo(config: Config) -> Architecture:
    """``OlmoForCausalLM``."""
    return _read(config, second=False)


def olmo2(config: Config) -> Architecture:
    """``Olmo2ForCausalLM``."""
    return _read(config, second=True)
