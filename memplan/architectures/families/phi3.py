"""Phi-3, Phi-3.5 and Phi-4: Llama with joint projections.

Modelled after transformers 5.23, models/phi3/modeling_phi3.py.  q, k and v are slices of one projection, gate and up of
another: what keeps a slice keeps the whole.  Rotary positions may turn a part of each head only; the rest is joined to
it again even where it is nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Buffer, int64
from memplan.architectures.blocks import HIDDEN, merged, rotary_tables
from memplan.architectures.families import llama
from memplan.errors import ConfigError
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, dropout, mul
from memplan.operators.layout import cat, split, take
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import rms_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Architecture
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Phi3(llama.Llama):
    """The numbers of a Phi-3."""

    rotary_dim: int
    """How many of a head's dimensions are turned."""
    residual_dropout: float = 0.0


def stem(m: Phi3, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, mask and rotary tables."""
    with t.scope("model"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_tokens")
        shared = llama.masks(t, x, full=m.full_mask, window=m.window)
        with t.scope("rotary_emb"):
            shared |= rotary_tables(t, x, m.rotary_dim)
    return x, shared


def turned(m: Phi3, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """The first `rotary_dim` dimensions turned, the others joined to them."""
    turning = take(t, x, (*x.shape[:-1], m.rotary_dim)) if m.rotary_dim < m.head_dim else x
    passing = take(t, x, (*x.shape[:-1], m.head_dim - m.rotary_dim))
    return cat(t, (rotary(t, turning, shared["cos"], shared["sin"]), passing), x.shape)


def self_attention(m: Phi3, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Grouped-query attention on slices of a joint projection."""
    b, s, _ = x.shape
    qkv = linear(t, x, (m.num_heads + 2 * m.num_kv_heads) * m.head_dim, "qkv_proj")
    t.hold_in_module(qkv)
    q, k, v = (take(t, qkv, (b, num, s, m.head_dim)) for num in (m.num_heads, m.num_kv_heads, m.num_kv_heads))
    q, k = turned(m, t, q, shared), turned(m, t, k, shared)
    t.keep_alive(qkv)
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout, by_head=True))
    return linear(t, out, m.hidden_size, "o_proj")


def mlp(m: Phi3, t: Tape, x: Tensor) -> Tensor:
    """``down(up * act(gate))`` with gate and up in one projection."""
    half = (*x.shape[:-1], m.intermediate_size)
    gate, up = split(t, linear(t, x, 2 * m.intermediate_size, "gate_up_proj"), (half, half))
    product = mul(t, up, ACTIVATION_BY_NAME[m.activation](t, gate))
    return linear(t, product, m.hidden_size, "down_proj")


def layer(m: Phi3, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer; `shared` has one mask, whichever the model makes."""
    normed = rms_norm(t, x, "input_layernorm")
    mask = shared.get("window_mask", shared.get("mask"))
    with t.scope("self_attn", normed):
        attended = self_attention(m, t, normed, shared if mask is None else {**shared, "mask": mask})
    x = add(t, x, dropout(t, attended, m.residual_dropout))
    normed = rms_norm(t, x, "post_attention_layernorm")
    with t.scope("mlp", normed):
        fed = mlp(m, t, normed)
    return add(t, x, dropout(t, fed, m.residual_dropout))


def phi3(config: Config) -> Architecture:
    """``Phi3ForCausalLM``: a window over all layers or none, and one mask."""
    defaults = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    common = llama.numbers(config, defaults)
    window = llama.sliding_window(config, None)
    head_dim = common["head_dim"]
    m = Phi3(
        **common,
        window=window,
        sliding=(window is not None,) * common["num_layers"],
        full_mask=window is None,
        rotary_dim=_rotary_dim(config, head_dim),
        residual_dropout=config.fraction("resid_pdrop", default=0.0),
    )
    buffers = ["inv_freq", "original_inv_freq"]
    if _is_longrope(config):
        buffers.append("long_inv_freq")
    one = partial(layer, m)
    return llama.build(
        m,
        config,
        "phi3",
        stem=partial(stem, m),
        layers=(one,) * m.num_layers,
        buffers=tuple(Buffer(f"model.rotary_emb.{name}", (m.rotary_dim // 2,), "fp32") for name in buffers),
    )


def _rope(config: Config) -> Config | None:
    """``rope_parameters``, or ``rope_scaling`` as it was called before."""
    for name in ("rope_parameters", "rope_scaling"):
        if config.has(name):
            return config.part(name)
    return None


def _rotary_dim(config: Config, head_dim: int) -> int:
    rope = _rope(config)
    whole = config.fraction("partial_rotary_factor", default=1.0)
    factor = whole if rope is None else rope.fraction("partial_rotary_factor", default=whole)
    dim = int(head_dim * factor)
    if dim < 2 or dim % 2:
        raise ConfigError(
            f"partial_rotary_factor in {config.origin} turns {dim} of {head_dim} dimensions of each head.",
            "It has to be an even number of at least two.",
        )
    return dim


def _is_longrope(config: Config) -> bool:
    """Longrope keeps the frequencies of long sequences beside those in use (modeling_rope_utils.py)."""
    rope = _rope(config)
    return rope is not None and rope.text("rope_type", "type", default="default") in ("longrope", "su", "yarn")
