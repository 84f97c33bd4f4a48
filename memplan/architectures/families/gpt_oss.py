"""gpt-oss: experts with biases and a clamped gate, attention sinks, a window on every other layer.

Modelled after transformers 5.23, models/gpt_oss.  A sink is one more score a head that takes part in the softmax and is
dropped after it: the scores have a column more than there are keys.  No fused kernel of PyTorch knows sinks: what
transformers runs is eager attention (other kernels have to be installed), whose scores are kept in the dtype of the
model, not in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, Handed, int64
from memplan.architectures.blocks import HIDDEN, heads, merged, positions
from memplan.architectures.experts import Experts, experts, spoken_of
from memplan.architectures.families import llama
from memplan.architectures.families.moe import read_experts
from memplan.architectures.heads import causal_head
from memplan.errors import ConfigError
from memplan.operators.attention import cached, softmax
from memplan.operators.elementwise import add, dropout, mul, scale, sub
from memplan.operators.layout import cat, copy, repeat_heads, split, take
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import rms_norm
from memplan.operators.products import matmul, project
from memplan.operators.routing import largest, top_k
from memplan.specs.values import dataclass, replace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import LayerKind
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class GptOss(llama.Llama):
    """The numbers of a gpt-oss."""

    experts: Experts


def stem(m: GptOss, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, both masks and rotary tables."""
    with t.scope("model"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_tokens")
        shared = llama.masks(t, x, full=True, window=m.window)
        with t.scope("rotary_emb"):
            shared |= half_tables(t, x, m.head_dim)
    return x, shared


def half_tables(t: Tape, hidden: Tensor, dim: int) -> dict[str, Tensor]:
    """Cos and sin of (1, s, dim / 2)."""
    position_ids = positions(t)
    freqs = t.op("mul", (t.cast(position_ids, "fp32"),), (1, "s", dim // 2), dtype="fp32", gradients=())
    cos = scale(t, t.op("cos", (freqs,), freqs.shape))
    sin = scale(t, t.op("sin", (freqs,), freqs.shape))
    t.keep_alive(freqs, cos)
    return {"cos": t.cast(cos, hidden.dtype), "sin": t.cast(sin, hidden.dtype), "position_ids": position_ids}


def half_rotary(t: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`` of the two halves."""
    half = (*x.shape[:-1], cos.shape[-1])
    first, second = split(t, x, (half, half))
    left = sub(t, mul(t, first, cos), mul(t, second, sin))
    right = add(t, mul(t, second, cos), mul(t, first, sin))
    return cat(t, (left, right), x.shape)


def self_attention(m: GptOss, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Attention with sinks."""
    q, k, v = (
        heads(t, linear(t, x, num * m.head_dim, f"{name}_proj", bias=m.qkv_bias), num, m.head_dim)
        for name, num in (("q", m.num_heads), ("k", m.num_kv_heads), ("v", m.num_kv_heads))
    )
    sinks = t.parameter("sinks", (m.num_heads,))
    q, k = half_rotary(t, q, shared["cos"], shared["sin"]), half_rotary(t, k, shared["cos"], shared["sin"])
    k, v = cached(t, k, v)
    t.hold_in_module(q, k, v)
    out = merged(t, eager_with_sinks(t, q, k, v, shared["mask"], sinks, p=m.dropout))
    return linear(t, out, m.hidden_size, "o_proj", bias=m.out_bias)


def eager_with_sinks(t: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, *, p: float) -> Tensor:
    """``eager_attention_forward`` of gpt-oss: (b, heads, s, d) to (b, s, heads, d).

    The largest score of each row is taken off before the softmax, and a gradient flows through it.
    """
    b, num, s, head_dim = q.shape
    kv_heads = k.shape[1]
    assert isinstance(num, int)
    assert isinstance(kv_heads, int)
    with t.recomputable("attention", q, k, v):
        k, v = repeat_heads(t, k, num, num // kv_heads), repeat_heads(t, v, num, num // kv_heads)
        scores = add(t, scale(t, matmul(t, q, k, (b, num, s, s), head_dim)), mask)
        column = take(t, t.view(sinks, (1, num, 1, 1)), (b, num, s, 1))
        with_sink = cat(t, (scores, column), (b, num, s, "s+1"))
        shifted = sub(t, with_sink, largest(t, with_sink))
        probabilities = softmax(t, shifted, dtype=shifted.dtype)
        weights = dropout(t, take(t, probabilities, (b, num, s, s)), p)
        weights = t.cast(weights, v.dtype)
        t.keep_alive(scores)
        t.hold_in_piece(weights)
        out = matmul(t, weights, v, (b, num, s, head_dim), s)
        t.keep_alive(k, v, shifted, probabilities)
    return copy(t, out, (b, s, num, head_dim))


def feed(m: GptOss, t: Tape, x: Tensor) -> Tensor:
    """Experts that are chosen by their scores; the softmax is over the chosen ones."""
    e = m.experts
    with t.scope("router"):
        weight, bias = t.parameter("weight", (e.num, m.hidden_size)), t.parameter("bias", (e.num,))
        logits = project(t, x, weight, bias, e.num)
        values, numbers = top_k(t, logits, e.chosen)
        weights = softmax(t, values, dtype=values.dtype)
        t.hold_in_module(values)
    t.hold_in_module(logits, numbers)
    t.hold_in_piece(weights)
    return experts(t, x, weights, numbers, e)


def layer(m: GptOss, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer."""
    return llama.pre_norm_layer(
        t,
        x,
        attend=lambda normed: self_attention(m, t, normed, shared),
        feed=lambda normed: feed(m, t, normed),
        gain_in_fp32=True,
    )


def head(m: GptOss, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("model"):
        x = rms_norm(t, x, "norm", gain_in_fp32=True)
    return causal_head(t, x, m.vocab_size, tied_to="model.embed_tokens.weight" if m.tied else None)


def _layers(m: GptOss) -> tuple[LayerKind, ...]:
    def handed(*, sliding: bool) -> LayerKind:
        names = (("mask", llama.MASK_BY_SLIDING[sliding]), *((name, name) for name in llama.TABLES))
        return Handed(kind=partial(layer, m), names=names)

    windowed, full = handed(sliding=True), handed(sliding=False)
    return tuple(windowed if sliding else full for sliding in m.sliding)


def gpt_oss(config: Config) -> Architecture:
    """``GptOssForCausalLM``."""
    defaults = {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    common = llama.numbers(config, defaults)
    num_layers = common["num_layers"]
    window = llama.sliding_window(config, 128)
    if window is None:
        raise ConfigError(f"{config.origin} has no sliding_window, which gpt-oss needs.", "Give sliding_window.")
    found = read_experts(
        config,
        common,
        num=128,
        chosen=4,
        width=("intermediate_size", common["intermediate_size"]),
        normalised=False,
    )
    bias = config.flag("attention_bias", default=True)
    m = GptOss(
        **common,
        qkv_bias=bias,
        out_bias=bias,
        experts=replace(found, biased=True, transposed=True, clamped=True),
        window=window,
        sliding=llama.layer_types(config, num_layers, [i % 2 == 0 for i in range(num_layers)]),
        idle_window_mask=True,
    )
    return llama.build(
        m,
        config,
        "gpt_oss",
        stem=partial(stem, m),
        layers=_layers(m),
        head=partial(head, m),
        attentions=("eager",),
        cache_windows=None,  # sinks stand beside what the cache holds
        unmodelled=spoken_of(config),
    )
