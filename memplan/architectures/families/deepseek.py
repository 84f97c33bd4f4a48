"""DeepSeek V2 and V3: latent attention, dense layers before layers of experts, shared experts.

Modelled after transformers 5.23, models/deepseek_v2 and models/deepseek_v3.

    q = q_b(norm(q_a(x)))  or  q(x);   c, r = kv_a(x);   k, v = kv_b(norm(c))
    attention over (k without positions | rotary(r), the same for all heads) and v;   y = shared(x) + experts(x)

What is written down for keys and values is short, what attention is given is not: k and v are made for every head.
Queries and keys are longer than values (192 to 128), which the flash kernel does not take: CUDA runs the
memory-efficient one.

======  ===============================================================================================================
V2      rotary by complex numbers, in fp32; softmax router, which may choose among the best groups of experts only
V3      rotary of interleaved pairs; sigmoid router with a bias on the choice, among the best groups of experts
======  ===============================================================================================================

Left out: the layers that predict further tokens (``num_nextn_predict_layers``), which transformers does not train.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from memplan.architectures.architecture import Architecture, Buffer, Handed, int64
from memplan.architectures.blocks import HIDDEN, causal_mask, gated_mlp, heads, merged, positions, rotary_tables
from memplan.architectures.experts import Experts, experts, spoken_of
from memplan.architectures.families import llama
from memplan.architectures.families.moe import read_experts
from memplan.errors import ConfigError
from memplan.operators.attention import attention, cached, softmax
from memplan.operators.elementwise import add, keeps_result, mul, scale, sub
from memplan.operators.fused_adapters import adapted_matrix
from memplan.operators.layout import cat, split, take, write_slice
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import rms_norm
from memplan.operators.products import project
from memplan.operators.routing import fill_where, gather, normalise_in_place, top_k
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memplan.architectures.architecture import LayerKind
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor

    Turn = Callable[[Tape, Tensor, Mapping[str, Tensor]], Tensor]
    Router = Callable[["DeepSeek", Tape, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class DeepSeek(llama.Llama):
    """The numbers of a DeepSeek; `head_dim` is the part of a head that turns, `intermediate_size` of dense layers."""

    q_rank: int | None
    """Width that queries go through; None where they are made of the hidden states."""
    kv_rank: int
    """Width that keys and values go through."""
    plain_dim: int
    """Of a query or key head, the part that has no positions."""
    value_dim: int
    """Of a value head."""
    experts: Experts
    num_shared: int
    """Experts that every token goes through, which are one MLP."""
    num_dense: int
    """Layers before the first with experts."""
    groups: tuple[int, int] | None
    """Groups of experts, and how many of them a token may choose from; None where they are not grouped."""


# -- attention ---------------------------------------------------------------------------------------------------------


def latent_attention(m: DeepSeek, turn: Turn, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Attention whose keys and values come out of one narrow projection."""
    length = m.plain_dim + m.head_dim
    q = heads(t, _queries(m, t, x, m.num_heads * length), m.num_heads, length)
    b, num, s, _ = q.shape
    q_plain, q_turned = split(t, q, ((b, num, s, m.plain_dim), (b, num, s, m.head_dim)))
    latent = linear(t, x, m.kv_rank + m.head_dim, "kv_a_proj_with_mqa", bias=m.qkv_bias)
    kv, k_turned = split(t, latent, ((b, s, m.kv_rank), (b, s, m.head_dim)))
    kv = rms_norm(t, kv, "kv_a_layernorm")
    k_turned = t.view(k_turned, (b, 1, s, m.head_dim))
    t.hold_in_module(q, latent, kv)
    q_turned, k_turned = turn(t, q_turned, shared), turn(t, k_turned, shared)
    kv, k_turned = cached(t, kv, k_turned)
    t.hold_in_module(q_turned, k_turned)
    q = cat(t, (q_plain, q_turned), q.shape)
    k, v = _expanded(m, t, kv, k_turned)
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout, by_head=True, caches=False))
    return linear(t, out, m.hidden_size, "o_proj", bias=m.out_bias)


def _queries(m: DeepSeek, t: Tape, x: Tensor, width: int) -> Tensor:
    if m.q_rank is None:
        return linear(t, x, width, "q_proj")
    narrow = rms_norm(t, linear(t, x, m.q_rank, "q_a_proj", bias=m.qkv_bias), "q_a_layernorm")
    return linear(t, narrow, width, "q_b_proj")


def _expanded(m: DeepSeek, t: Tape, kv: Tensor, k_turned: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of every head; the keys are written into a new tensor part by part."""
    made = heads(
        t, linear(t, kv, m.num_heads * (m.plain_dim + m.value_dim), "kv_b_proj"), m.num_heads, m.plain_dim + m.value_dim
    )
    b, num, s, _ = made.shape
    k_plain, v = split(t, made, ((b, num, s, m.plain_dim), (b, num, s, m.value_dim)))
    k_turned = take(t, k_turned, (b, num, s, m.head_dim))
    k = t.op("new_empty", (), (b, num, s, m.plain_dim + m.head_dim), dtype=made.dtype)
    return write_slice(t, write_slice(t, k, k_plain), k_turned), v


def complex_rotary(t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Pairs of dimensions as complex numbers in fp32 (here: tensors of fp32 as large), times those of the positions."""
    turned = mul(t, t.cast(x, "fp32"), shared["freqs"])
    return t.cast(turned, x.dtype)


def interleaved_rotary(t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """``cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`` of the even and the odd dimensions."""
    half = (*x.shape[:-1], _half(x))
    cos, sin = (t.view(shared[name], (1, "s", _half(x))) for name in ("cos", "sin"))
    first, second = take(t, x, half), take(t, x, half)
    left = sub(t, mul(t, first, cos), mul(t, second, sin))
    right = add(t, mul(t, second, cos), mul(t, first, sin))
    return cat(t, (left, right), x.shape)


def _half(x: Tensor) -> int:
    dim = x.shape[-1]
    assert isinstance(dim, int)
    return dim // 2


def complex_tables(t: Tape, dim: int) -> dict[str, Tensor]:
    """``freqs_cis`` of (1, s, dim / 2), complex64: as many bytes as fp32 of (1, s, dim)."""
    position_ids = positions(t)
    as_float = t.cast(position_ids, "fp32")
    freqs = t.op("mul", (as_float,), (1, "s", dim // 2), dtype="fp32", gradients=())
    ones = t.op("ones_like", (), freqs.shape, dtype="fp32")
    polar = t.op("polar", (ones, freqs), (1, "s", dim))
    scaled = scale(t, polar)
    t.keep_alive(freqs)
    return {"freqs": scaled, "position_ids": position_ids}


# -- routers -----------------------------------------------------------------------------------------------------------


def _logits(m: DeepSeek, t: Tape, x: Tensor) -> Tensor:
    """Scores of the experts, in fp32 but under autocast."""
    weight = adapted_matrix(t, t.parameter("weight", (m.experts.num, m.hidden_size)))
    logits = project(t, t.cast(x, "fp32"), t.cast(weight, "fp32"), None, m.experts.num)
    t.hold_in_module(logits)
    return logits


def softmax_router(m: DeepSeek, t: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """``DeepseekV2TopkRouter``."""
    with t.scope("gate"):
        logits = _logits(m, t, x)
        scores = softmax(t, logits, dtype="fp32")
        if m.groups is not None:
            best = _largest(t, scores, m.groups[0], 1)
            scores = fill_where(t, scores, _outside(m, t, scores, best))
        weights, numbers = top_k(t, scores, m.experts.chosen)
        weights = scale(t, weights)
        t.hold_in_module(scores)
    t.hold_in_module(logits, weights, numbers)
    return weights, numbers


def sigmoid_router(m: DeepSeek, t: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """``DeepseekV3TopkRouter``: what decides about the choice has no gradient."""
    with t.scope("gate"):
        logits = _logits(m, t, x)
        scores = keeps_result(t, "sigmoid", logits)
        bias = t.external("e_score_correction_bias", (m.experts.num,), "fp32", role="buffer")
        biased = add(t, scores._replace(requires_grad=False), bias)
        assert m.groups is not None
        two = _largest(t, biased, m.groups[0], 2)
        best = t.op("sum", (two,), (*two.shape[:-1],))
        choice = fill_where(t, biased, _outside(m, t, biased, best))
        _, numbers = top_k(t, choice, m.experts.chosen)
        weights = gather(t, scores, numbers)
        if m.experts.normalised:
            weights = normalise_in_place(t, weights, shifted=True)
        weights = scale(t, weights)
        t.hold_in_module(scores, choice)
    t.hold_in_module(logits, weights, numbers)
    return weights, numbers


def _largest(t: Tape, scores: Tensor, num_groups: int, k: int) -> Tensor:
    """The `k` largest scores of each group; where they were found is held as long as they are."""
    shape = (*scores.shape[:-1], num_groups) if k == 1 else (*scores.shape[:-1], num_groups, k)
    found = t.op("max", (scores._replace(requires_grad=False),), shape, extra_outputs=(("positions", shape, "int64"),))
    t.hold_in_module(*t.ops[-1].outputs)
    return found


def _outside(m: DeepSeek, t: Tape, scores: Tensor, best: Tensor) -> Tensor:
    """Which experts are in none of the groups that score highest."""
    assert m.groups is not None
    _, chosen = top_k(t, best, m.groups[1])
    mask = t.op("zeros_like", (), best.shape, dtype=best.dtype)
    wide = t.op("clone", (mask,), scores.shape)
    inside = t.op("to", (wide,), scores.shape, dtype="bool")
    outside = t.op("bitwise_not", (inside,), scores.shape)
    t.hold_in_module(best, chosen, mask, wide)
    return outside


# -- the model ---------------------------------------------------------------------------------------------------------


def feed(m: DeepSeek, route: Router, t: Tape, x: Tensor) -> Tensor:
    """Experts, and beside them an MLP for every token."""
    weights, numbers = route(m, t, x)
    out = experts(t, x, weights, numbers, m.experts)
    with t.scope("shared_experts"):
        together = gated_mlp(t, x, m.experts.width * m.num_shared, m.activation, bias=m.mlp_bias)
    return add(t, out, together)


def layer(m: DeepSeek, turn: Turn, route: Router | None, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer; without a router a dense one."""

    def dense(normed: Tensor) -> Tensor:
        return gated_mlp(t, normed, m.intermediate_size, m.activation, bias=m.mlp_bias)

    return llama.pre_norm_layer(
        t,
        x,
        attend=lambda normed: latent_attention(m, turn, t, normed, shared),
        feed=dense if route is None else lambda normed: feed(m, route, t, normed),
    )


def stem(m: DeepSeek, t: Tape, *, by_complex: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, mask and rotary tables."""
    with t.scope("model"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_tokens")
        shared = causal_mask(t, x)
        with t.scope("rotary_emb"):
            shared |= complex_tables(t, m.head_dim) if by_complex else rotary_tables(t, x, m.head_dim)
    return x, shared


def _build(m: DeepSeek, config: Config, model_type: str, *, turn: Turn, route: Router) -> Architecture:
    by_complex = turn is complex_rotary
    names = tuple((name, name) for name in ("mask", "freqs", "cos", "sin", "position_ids"))
    dense: LayerKind = Handed(kind=partial(layer, m, turn, None), names=names)
    sparse: LayerKind = Handed(kind=partial(layer, m, turn, route), names=names)
    experts_from = range(m.num_dense, m.num_layers) if route is sigmoid_router else ()
    rope = tuple(
        Buffer(f"model.rotary_emb.{name}", (m.head_dim // 2,), "fp32") for name in ("inv_freq", "original_inv_freq")
    )
    bias = "model.layers.{}.mlp.gate.e_score_correction_bias"
    return llama.build(
        m,
        config,
        model_type,
        stem=partial(stem, m, by_complex=by_complex),
        layers=tuple(dense if i < m.num_dense else sparse for i in range(m.num_layers)),
        buffers=(*rope, *(Buffer(bias.format(i), (m.experts.num,), "fp32") for i in experts_from)),
        unmodelled=spoken_of(config),
        cache_windows=None,  # the cache holds latents, not keys and values
    )


# -- configs -----------------------------------------------------------------------------------------------------------


def _numbers(config: Config, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that both have."""
    common = llama.numbers(config, defaults) | {
        "head_dim": config.paired(config.integer("qk_rope_head_dim", default=64), "qk_rope_head_dim")
    }
    if common["num_kv_heads"] != common["num_heads"]:
        raise ConfigError(
            f"num_key_value_heads in {config.origin} is not num_attention_heads, but keys are made for every head.",
            "Correct num_key_value_heads.",
        )
    bias = config.flag("attention_bias", default=False)
    q_rank = config.optional_integer("q_lora_rank") if config.mentions("q_lora_rank") else 1536
    return common | {
        "q_rank": q_rank,
        "kv_rank": config.integer("kv_lora_rank", default=512),
        "plain_dim": config.integer("qk_nope_head_dim", default=128),
        "value_dim": config.integer("v_head_dim", default=128),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _groups(config: Config, num: int, defaults: tuple[int | None, int | None]) -> tuple[int, int]:
    whole = config.integer("n_group", default=defaults[0])
    chosen = config.integer("topk_group", default=defaults[1])
    if num % whole or chosen > whole:
        raise ConfigError(
            f"{num} experts in {config.origin} do not fall into {whole} groups, {chosen} chosen.", "Correct n_group."
        )
    return whole, chosen


def deepseek_v2(config: Config) -> Architecture:
    """``DeepseekV2ForCausalLM``."""
    defaults = {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    common = _numbers(config, defaults)
    found = read_experts(config, common, num=64, chosen=None, width=("moe_intermediate_size", 1407), normalised=False)
    method = config.choice("topk_method", known=("greedy", "group_limited_greedy"), default="greedy")
    m = DeepSeek(
        **common,
        mlp_bias=config.flag("mlp_bias", default=False),
        experts=found,
        num_shared=config.integer("n_shared_experts", default=2),
        num_dense=config.integer("first_k_dense_replace", default=0, least=0),
        groups=None if method == "greedy" else _groups(config, found.num, (None, None)),
    )
    return _build(m, config, "deepseek_v2", turn=complex_rotary, route=softmax_router)


def deepseek_v3(config: Config) -> Architecture:
    """``DeepseekV3ForCausalLM``."""
    defaults = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
    }
    common = _numbers(config, defaults)
    found = read_experts(
        config,
        common,
        num=256,
        chosen=8,
        width=("moe_intermediate_size", 2048),
        normalised=config.flag("norm_topk_prob", default=True),
    )
    m = DeepSeek(
        **common,
        experts=found,
        num_shared=config.integer("n_shared_experts", default=1),
        num_dense=config.integer("first_k_dense_replace", default=3, least=0),
        groups=_groups(config, found.num, (8, 4)),
    )
    return _build(m, config, "deepseek_v3", turn=interleaved_rotary, route=sigmoid_router)
