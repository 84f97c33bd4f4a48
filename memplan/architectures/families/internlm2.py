"""InternLM2: Llama with q, k and v in one projection, under names of its own.

Modelled after modeling_internlm2.py as published with the model (it is not part of transformers): ``wqkv`` gives, for
each key and value head, its query heads, its key and its value; q is a copy gathered from the groups, k and v are
slices.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import int64
from memplan.architectures.blocks import HIDDEN, causal_mask, merged, rotary_tables
from memplan.architectures.families import llama
from memplan.architectures.heads import causal_head
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, mul
from memplan.operators.layout import copy, take
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import rms_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Architecture
    from memplan.architectures.config import Config
    from memplan.architectures.families.llama import Llama
    from memplan.operators.tape import Tape, Tensor


def stem(m: Llama, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, mask and rotary tables."""
    with t.scope("model"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "tok_embeddings")
        shared = causal_mask(t, x)
        shared |= rotary_tables(t, x, m.head_dim)
    return x, shared


def self_attention(m: Llama, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Grouped-query attention on slices of a joint projection."""
    b, s, _ = x.shape
    wqkv = linear(t, x, (m.num_heads + 2 * m.num_kv_heads) * m.head_dim, "wqkv", bias=m.qkv_bias)
    q, k, v = (take(t, wqkv, (b, num, s, m.head_dim)) for num in (m.num_heads, m.num_kv_heads, m.num_kv_heads))
    if m.num_heads != m.num_kv_heads:
        q = copy(t, q)
    q, k = rotary(t, q, shared["cos"], shared["sin"]), rotary(t, k, shared["cos"], shared["sin"])
    t.keep_alive(wqkv)
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout))
    return linear(t, out, m.hidden_size, "wo", bias=m.out_bias)


def layer(m: Llama, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer."""
    normed = rms_norm(t, x, "attention_norm")
    with t.scope("attention", normed):
        attended = self_attention(m, t, normed, shared)
    x = add(t, x, attended)
    normed = rms_norm(t, x, "ffn_norm")
    with t.scope("feed_forward", normed):
        gate = ACTIVATION_BY_NAME[m.activation](t, linear(t, normed, m.intermediate_size, "w1"))
        up = linear(t, normed, m.intermediate_size, "w3")
        fed = linear(t, mul(t, gate, up), m.hidden_size, "w2")
    return add(t, x, fed)


def head(m: Llama, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("model"):
        x = rms_norm(t, x, "norm")
    tied_to = "model.tok_embeddings.weight" if m.tied else None
    return causal_head(t, x, m.vocab_size, tied_to=tied_to, name="output")


def internlm2(config: Config) -> Architecture:
    """``InternLM2ForCausalLM``."""
    bias = config.flag("bias", default=False)
    m = llama.Llama(**llama.numbers(config), qkv_bias=bias, out_bias=bias)
    one = partial(layer, m)
    return llama.build(
        m,
        config,
        "internlm2",
        stem=partial(stem, m),
        layers=(one,) * m.num_layers,
        head=partial(head, m),
        cache_windows=None,  # a cache of its own
        unmodelled=(
            (
                "differences between versions of the published code",
                "the model is not part of transformers; its kept activations are derived from the operators, but "
                "compared with no run",
            ),
        ),
    )
