"""Llama with experts in place of its MLP: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE.

Modelled after transformers 5.23, models/mixtral, qwen2_moe, qwen3_moe and olmoe.

=========  ============================================================================================================
Mixtral    weights of the chosen experts are divided by their sum and stay in fp32; may shake the router's input
Qwen2-MoE  a shared expert beside the others, weighted by a sigmoid of its own; some layers may be dense; the mask of a
           window is made even where no layer has one
Qwen3-MoE  q and k are normalised per head; some layers may be dense
OLMoE      q and k are normalised over their full width; q, k and v may be clipped in place
=========  ============================================================================================================
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from memplan.architectures.architecture import Handed
from memplan.architectures.blocks import gated_mlp, heads, merged
from memplan.architectures.experts import Experts, experts, router, spoken_of
from memplan.architectures.families import llama
from memplan.errors import ConfigError
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import add, clamp_in_place, keeps_result, mul, shaken
from memplan.operators.matrix import linear
from memplan.operators.normalisation import rms_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Architecture, LayerKind
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Mixture(llama.Llama):
    """The numbers of a Llama with experts; `intermediate_size` is that of its dense layers."""

    experts: Experts
    cast_back: bool = True
    """The weights of the experts are in the dtype of the hidden states, else in fp32."""
    shared_width: int | None = None
    """Of the MLP that every token goes through besides."""
    jitter: bool = False
    """The input of router and experts is multiplied by noise."""
    wide_norm: bool = False
    """q and k are normalised over their full width."""
    clipped: bool = False
    """q, k and v are clipped."""
    sparse: tuple[bool, ...] = ()
    """For each layer whether it has experts; empty where all have."""


def feed(m: Mixture, t: Tape, x: Tensor) -> Tensor:
    """The block of experts."""
    if m.jitter:
        x = shaken(t, x)
    together = None
    if m.shared_width is not None:
        with t.scope("shared_expert"):
            together = gated_mlp(t, x, m.shared_width, m.activation)
        t.hold_in_module(together)
    weights, numbers = router(t, x, m.experts, cast_back=m.cast_back)
    out = experts(t, x, weights, numbers, m.experts)
    if together is None:
        return out
    t.hold_in_module(out)
    gate = keeps_result(t, "sigmoid", linear(t, x, 1, "shared_expert_gate"))
    return add(t, out, mul(t, gate, together))


def wide_norm_attention(m: Mixture, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Attention of OLMoE."""
    projections = (("q", m.num_heads), ("k", m.num_kv_heads), ("v", m.num_kv_heads))
    made = []
    for name, num in projections:
        out = linear(t, x, num * m.head_dim, f"{name}_proj", bias=m.qkv_bias)
        made.append(out if name == "v" else rms_norm(t, out, f"{name}_norm"))
    if m.clipped:
        made = [clamp_in_place(t, y) for y in made]
    q, k, v = (heads(t, y, num, m.head_dim) for y, (_, num) in zip(made, projections, strict=True))
    q, k = rotary(t, q, shared["cos"], shared["sin"]), rotary(t, k, shared["cos"], shared["sin"])
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout))
    return linear(t, out, m.hidden_size, "o_proj", bias=m.out_bias)


def sparse_layer(m: Mixture, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One layer with experts."""
    attend = wide_norm_attention if m.wide_norm else llama.self_attention
    return llama.pre_norm_layer(
        t, x, attend=lambda normed: attend(m, t, normed, shared), feed=lambda normed: feed(m, t, normed)
    )


def layers(m: Mixture) -> tuple[LayerKind, ...]:
    """The layers, one object for each combination of window and experts."""
    kinds: dict[tuple[bool, bool], LayerKind] = {}
    ordered = []
    for i in range(m.num_layers):
        key = (bool(m.sliding) and m.sliding[i], not m.sparse or m.sparse[i])
        if key not in kinds:
            names = (("mask", llama.MASK_BY_SLIDING[key[0]]), *((name, name) for name in llama.TABLES))
            kinds[key] = Handed(kind=partial(sparse_layer if key[1] else llama.layer, m), names=names)
        ordered.append(kinds[key])
    return tuple(ordered)


def build(m: Mixture, config: Config, model_type: str) -> Architecture:
    """The architecture of these numbers."""
    return llama.build(m, config, model_type, layers=layers(m), unmodelled=spoken_of(config))


# -- configs -----------------------------------------------------------------------------------------------------------


def read_experts(
    config: Config, common: Mapping[str, Any], *, num: int, chosen: int | None, width: tuple[str, int], normalised: bool
) -> Experts:
    """The experts of a layer.

    `num`, `chosen` and `width` (its key and its value) are the values of transformers' config class.
    """
    key, default_width = width
    total = config.integer(*NAMES_OF_NUM, default=num)
    taken = config.integer("num_experts_per_tok", **({} if chosen is None else {"default": chosen}))
    if taken > total:
        raise ConfigError(
            f"num_experts_per_tok in {config.origin} is {taken}, and there are {total} experts.", "Correct one of them."
        )
    return Experts(
        num=total,
        chosen=taken,
        width=config.integer(key, default=default_width),
        activation=common["activation"],
        normalised=normalised,
    )


NAMES_OF_NUM = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys that say how many experts there are."""


def _normalised(config: Config) -> bool:
    return config.flag("norm_topk_prob", default=False)


def _sparse(config: Config, num_layers: int) -> tuple[bool, ...]:
    """Qwen's layers with experts: every ``decoder_sparse_step``-th, but for ``mlp_only_layers``."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = config.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise ConfigError(f"mlp_only_layers in {config.origin} is no list of layer numbers.", "Correct it.")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))


def mixtral(config: Config) -> Architecture:
    """``MixtralForCausalLM``: a window over all layers or none, and one mask."""
    defaults = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    common = llama.numbers(config, defaults)
    window = llama.sliding_window(config, None)
    m = Mixture(
        **common,
        experts=read_experts(
            config, common, num=8, chosen=2, width=("intermediate_size", common["intermediate_size"]), normalised=True
        ),
        cast_back=False,
        jitter=config.fraction("router_jitter_noise", default=0.0) > 0,
        window=window,
        sliding=(window is not None,) * common["num_layers"],
        full_mask=window is None,
    )
    return build(m, config, "mixtral")


def qwen2_moe(config: Config) -> Architecture:
    """``Qwen2MoeForCausalLM``."""
    defaults = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    common = llama.numbers(config, defaults)
    num_layers = common["num_layers"]
    used = config.flag("use_sliding_window", default=False)
    window = llama.sliding_window(config, 4096) if used else 0
    first = config.integer("max_window_layers", default=28, least=0)
    every_other = [used and i % 2 == 0 and i < first for i in range(num_layers)]
    sliding = llama.layer_types(config, num_layers, every_other)
    if window is None or (any(sliding) and not window):
        raise ConfigError(f"{config.origin} has sliding layers, but there is no window.", llama.GIVE_WINDOW)
    m = Mixture(
        **common,
        experts=read_experts(
            config, common, num=60, chosen=4, width=("moe_intermediate_size", 1408), normalised=_normalised(config)
        ),
        shared_width=config.integer("shared_expert_intermediate_size", default=5632),
        qkv_bias=config.flag("qkv_bias", default=True),
        sparse=_sparse(config, num_layers),
        window=window,
        sliding=sliding,
        idle_window_mask=True,
    )
    return build(m, config, "qwen2_moe")


def qwen3_moe(config: Config) -> Architecture:
    """``Qwen3MoeForCausalLM``: a window over all layers or none, and one mask."""
    defaults = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    common = llama.numbers(config, defaults)
    bias = config.flag("attention_bias", default=False)
    used = config.flag("use_sliding_window", default=False)
    window = llama.sliding_window(config, 4096) if used else None
    m = Mixture(
        **common,
        experts=read_experts(
            config, common, num=128, chosen=8, width=("moe_intermediate_size", 768), normalised=_normalised(config)
        ),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        sparse=_sparse(config, common["num_layers"]),
        window=window,
        sliding=(window is not None,) * common["num_layers"],
        full_mask=window is None,
    )
    return build(m, config, "qwen3_moe")


def olmoe(config: Config) -> Architecture:
    """``OlmoeForCausalLM``."""
    defaults = {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
    }
    common = llama.numbers(config, defaults)
    bias = config.flag("attention_bias", default=False)
    m = Mixture(
        **common,
        experts=read_experts(
            config,
            common,
            num=64,
            chosen=8,
            width=("intermediate_size", common["intermediate_size"]),
            normalised=_normalised(config),
        ),
        qkv_bias=bias,
        out_bias=bias,
        wide_norm=True,
        clipped=config.has("clip_qkv"),
    )
    return build(m, config, "olmoe")
