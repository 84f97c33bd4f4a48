"""Falcon.

Modelled after transformers 5.23, models/falcon/modeling_falcon.py:

x = drop(mlp(n(x)) + attention(n(x))) + x        (7B: one norm; 40B: one norm for each)
y = drop(attention(n(x))) + x;  x = drop(mlp(n(y))) + y        (the models without ``parallel_attn``)

Keys and values have one head (7B), one for each group (40B) or as many as queries; the model repeats grouped ones by
copying and always makes a mask.  With one key head scaled_dot_product_attention has no kernel but the written-out one.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, Buffer, int64
from memplan.architectures.blocks import (
    HIDDEN,
    additive_mask,
    boolean_mask,
    merged,
    positions,
    rotary_tables,
)
from memplan.architectures.heads import causal_head
from memplan.errors import ConfigError
from memplan.operators.adapters import Base
from memplan.operators.attention import cached, fused, rotary, slices_batched, softmax
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, add_into, add_scalar, dropout, scale
from memplan.operators.layout import copy, repeat_heads, take
from memplan.operators.matrix import embedding, with_adapter
from memplan.operators.normalisation import layer_norm
from memplan.operators.products import matmul, project
from memplan.operators.sizes import count
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.sizes import Dim, Shape
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Falcon:
    """The numbers of a Falcon."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    activation: str
    tied: bool
    bias: bool
    grouped: bool
    """The new decoder architecture."""
    parallel: bool
    two_norms: bool
    """Attention and MLP, side by side, have a norm each."""
    attention_dropout: float
    hidden_dropout: float


def stem(m: Falcon, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, mask and rotary tables."""
    with t.scope("transformer"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "word_embeddings")
        position_ids = add_scalar(t, positions(t))
        shared: dict[str, Tensor] = {}
        mask = additive_mask(t, x.dtype) if t.attention == "eager" else boolean_mask(t)
        with t.scope("rotary_emb"):
            shared |= rotary_tables(t, x, m.head_dim, position_ids=position_ids)
    return x, shared | {"mask": mask}


def projection(m: Falcon, t: Tape, x: Tensor, width: int, name: str) -> Tensor:
    """``FalconLinear``: ``x @ weight.T``, of whose view autocast caches no copy; the bias is an operator of its own."""
    in_features = x.shape[-1]
    assert isinstance(in_features, int)
    with t.scope(name):
        weight = t.view(t.parameter("weight", (width, in_features)), (in_features, width))
        y = project(t, x, weight, None, width)
        bias = t.parameter("bias", (width,)) if m.bias else None
        y = y if bias is None else add(t, y, bias)
        return with_adapter(t, Base(x, y, weight._replace(shape=(width, in_features)), bias))


def picked(t: Tape, joint: Tensor, num: int, head_dim: int) -> Tensor:
    """``joint[..., [i], :]``: a copy (the one number that its index keeps is not counted)."""
    return t.op("index", (joint,), ("b", "s", num, head_dim))


def queries_keys_values(m: Falcon, t: Tape, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of (b, heads, s, head_dim)."""
    whole = ("b", "s", m.num_heads, m.head_dim)
    by_head = ("b", m.num_heads, "s", m.head_dim)
    if m.grouped:
        q = take(t, joint, whole)
        k, v = picked(t, joint, m.num_kv_heads, m.head_dim), picked(t, joint, m.num_kv_heads, m.head_dim)
        if m.num_kv_heads < m.num_heads:
            q, k, v = copy(t, q), t.op("broadcast_to", (k,), whole), t.op("broadcast_to", (v,), whole)
        return t.view(q, by_head), t.view(k, by_head), t.view(v, by_head)
    if m.num_kv_heads == 1:
        one = ("b", 1, "s", m.head_dim)
        q = t.view(take(t, joint, whole), by_head)
        k, v = picked(t, joint, 1, m.head_dim), picked(t, joint, 1, m.head_dim)
        return q, t.view(k, one), t.view(v, one)
    q, k, v = (take(t, joint, by_head) for _ in range(3))
    return q, k, v


def factors(m: Falcon, t: Tape, *parts: Tensor) -> tuple[Tensor, ...]:
    """`parts` as a batched product takes them: a single head shown for every head, slices copied."""
    return tuple(slices_batched(t, *(repeat_heads(t, x, m.num_heads, m.num_heads // _heads(x)) for x in parts)))


def written_out(
    m: Falcon, t: Tape, q: Tensor, k: Tensor, v: Tensor, shared: Mapping[str, Tensor], dtype: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The eager form, with the softmax in the dtype of the hidden states; and what its variables hold."""
    single = _heads(v) < m.num_heads
    if single:
        q, k = factors(m, t, q, k)
    else:
        q, k, v = factors(m, t, q, k, v)
    product = matmul(t, q, k, ("b", m.num_heads, "s", "s"), m.head_dim)
    weights = softmax(t, add(t, product, shared["mask"]), dtype=dtype)
    t.also_returns(weights)
    if single:
        (v,) = factors(m, t, v)
    out = matmul(t, weights, v, ("b", m.num_heads, "s", m.head_dim), "s")
    return copy(t, out, ("b", "s", m.num_heads, m.head_dim)), (product, weights)


def _heads(x: Tensor) -> int:
    assert isinstance(x.shape[1], int)
    return x.shape[1]


def matmul_as_is(t: Tape, a: Tensor, b: Tensor, shape: Shape, inner: Dim) -> Tensor:
    """`matmul` inside a kernel, where autocast has nothing to say."""
    flops = count((*shape, inner)).times(2)
    return t.op("bmm", (a, b), shape, keeps=(a, b), flops=flops, reason="a product keeps each factor")


def math_kernel(m: Falcon, t: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``_scaled_dot_product_attention_math``: in fp32, with keys and values repeated for every head."""
    q, k, v = t.autocast(q), t.autocast(k), t.autocast(v)
    dtype = q.dtype
    mask = t.op("additive mask", (mask,), mask.shape, dtype=dtype)
    q, k, v = t.cast(q, "fp32"), t.cast(k, "fp32"), t.cast(v, "fp32")
    q, k = scale(t, q), scale(t, k)
    q, k = factors(m, t, q, k)
    scores = matmul_as_is(t, q, k, ("b", m.num_heads, "s", "s"), m.head_dim)
    weights = softmax(t, add_into(t, scores, mask), dtype="fp32")
    (v,) = factors(m, t, v)
    out = matmul_as_is(t, weights, v, q.shape, "s")
    return copy(t, t.cast(out, dtype), ("b", "s", m.num_heads, m.head_dim))


def self_attention(m: Falcon, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Attention on one joint projection."""
    joint = projection(m, t, x, (m.num_heads + 2 * m.num_kv_heads) * m.head_dim, "query_key_value")
    q, k, v = queries_keys_values(m, t, joint)
    q, k = rotary(t, q, shared["cos"], shared["sin"]), rotary(t, k, shared["cos"], shared["sin"])
    k, v = cached(t, k, v)
    variables: tuple[Tensor, ...] = ()
    if t.attention == "eager":
        out, variables = written_out(m, t, q, k, v, shared, x.dtype)
    elif m.num_kv_heads == 1 and m.num_heads > 1 and not m.grouped:
        out = math_kernel(m, t, q, k, v, shared["mask"])
    else:
        out = fused(t, q, k, v, t.autocast(shared["mask"]))
    out = projection(m, t, merged(t, out), m.hidden_size, "dense")
    t.keep_alive(*variables)
    return out


def feed_forward(m: Falcon, t: Tape, x: Tensor) -> Tensor:
    """Two layers."""
    with t.scope("mlp", x):
        bent = ACTIVATION_BY_NAME[m.activation](t, projection(m, t, x, m.intermediate_size, "dense_h_to_4h"))
        return projection(m, t, bent, m.hidden_size, "dense_4h_to_h")


def layer(m: Falcon, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer."""
    normed = layer_norm(t, x, "ln_attn" if m.two_norms else "input_layernorm")
    for_mlp = layer_norm(t, x, "ln_mlp") if m.two_norms else normed
    with t.scope("self_attention", normed):
        attended = self_attention(m, t, normed, shared)
    if m.parallel:
        fed = add_into(t, feed_forward(m, t, for_mlp), attended)
        return add(t, x, dropout(t, fed, m.hidden_dropout))
    x = add(t, x, dropout(t, attended, m.attention_dropout))
    fed = feed_forward(m, t, layer_norm(t, x, "post_attention_layernorm"))
    out = add(t, x, dropout(t, fed, m.hidden_dropout))
    t.keep_alive(attended)
    return out


def head(m: Falcon, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("transformer"):
        x = layer_norm(t, x, "ln_f")
    tied_to = "transformer.word_embeddings.weight" if m.tied else None
    return causal_head(t, x, m.vocab_size, tied_to=tied_to)


def falcon(config: Config) -> Architecture:
    """``FalconForCausalLM``."""
    hidden = config.integer("n_embed", "hidden_size", default=4544)
    num_heads = config.integer("num_attention_heads", default=71)
    head_dim = config.paired(config.divided("hidden_size", hidden, num_heads))
    grouped = config.flag("new_decoder_architecture", default=False)
    parallel = config.flag("parallel_attn", default=True)
    num_kv_heads = config.integer("num_kv_heads", default=num_heads)
    if not grouped:
        num_kv_heads = 1 if config.flag("multi_query", default=True) else num_heads
    config.divided("num_attention_heads", num_heads, num_kv_heads)
    norms = config.integer("num_ln_in_parallel_attn", default=2 if grouped else 1)
    m = Falcon(
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", default=32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("ffn_hidden_size", default=4 * hidden),
        vocab_size=config.integer("vocab_size", default=65024),
        activation=config.choice("activation", known=ACTIVATION_BY_NAME, default="gelu"),
        tied=config.flag("tie_word_embeddings", default=True),
        bias=config.flag("bias", default=False),
        grouped=grouped,
        parallel=parallel,
        two_norms=grouped and parallel and norms == 2,
        attention_dropout=config.fraction("attention_dropout", default=0.0),
        hidden_dropout=config.fraction("hidden_dropout", default=0.0),
    )
    if config.flag("alibi", default=False):
        raise ConfigError(
            f"alibi in {config.origin} is not modelled for Falcon.", "Falcon models with rotary positions are."
        )
    if grouped and not parallel:
        raise ConfigError(
            f"new_decoder_architecture without parallel_attn in {config.origin} is not modelled.",
            "Give a config.json as a Falcon was published with.",
        )
    return Architecture(
        model_type="falcon",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="transformer.h.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=config.integer("max_position_embeddings", default=2048),
        hidden_size=hidden,
        buffers=tuple(
            Buffer(f"transformer.rotary_emb.{name}", (head_dim // 2,), "fp32")
            for name in ("inv_freq", "original_inv_freq")
        ),
        attentions=("eager", "sdpa"),
    )
