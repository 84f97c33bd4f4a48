"""Gemma, Gemma 2 and Gemma 3, text and multimodal.

Modelled after transformers 5.23, models/gemma, models/gemma2 and models/gemma3.  What sets them apart from Llama: the
embedding is scaled by sqrt(hidden_size), norms multiply by (1 + weight) in fp32, GELU gates the MLP, heads are wide.

=========  ============================================================================================================
Gemma 2    norms after attention and MLP too; scores and logits are bent by c * tanh(x / c), so that there is no
           scaled_dot_product_attention; every second layer has a window
Gemma 3    the same norms, q and k normalised per head, no bent scores; five of six layers have a window and rotary
           tables of their own
=========  ============================================================================================================

The multimodal model is that of training on text: the vision tower and its projector are there, but take no part.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from memplan.architectures.architecture import Architecture, Buffer, Handed, int64
from memplan.architectures.blocks import (
    HIDDEN,
    gated_mlp,
    heads,
    merged,
    positions,
    rotary_tables,
)
from memplan.architectures.families.llama import layer_types, masks, needs_mask_beyond, numbers, sliding_window
from memplan.architectures.families.siglip import vision_buffer, vision_parameters
from memplan.architectures.heads import causal_head
from memplan.errors import ConfigError
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import rms_norm
from memplan.specs.values import dataclass, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from memplan.architectures.architecture import LayerKind
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Gemma:
    """The numbers of a Gemma model."""

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
    """All projections of the attention have biases."""
    dropout: float
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    """For each layer whether it has the window; empty where no layer has one."""
    post_norms: bool = False
    """Norms after attention and MLP as well as before."""
    qk_norm: bool = False
    scores_softcap: bool = False
    logits_softcap: bool = False
    tables_by_type: bool = False
    """Layers with a window have rotary tables of their own (Gemma 3)."""
    prefix: str = "model"
    """Module path of the text model."""
    ids_copied: bool = False
    """Image tokens lie beyond the vocabulary and are replaced in a copy of the ids."""


norm = partial(rms_norm, one_plus=True)
"""``GemmaRMSNorm``."""


def table_names(m: Gemma) -> dict[str, tuple[str, str]]:
    """The names of the rotary tables among the shared tensors, by type of layer."""
    if not m.tables_by_type:
        return {"all": ("cos", "sin")}
    kinds = sorted({"window" if slides else "full" for slides in m.sliding})
    return {kind: (f"{kind}_cos", f"{kind}_sin") for kind in kinds}


def stem(m: Gemma, unused: Callable[[Tape], None] | None, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Scaled embedding, masks and rotary tables; `unused` records parameters that take no part."""
    if unused is not None:
        unused(t)
    with t.scope(m.prefix):
        ids = int64(t, "input_ids", HIDDEN)
        if m.ids_copied:
            image_tokens = t.op("eq", (ids,), HIDDEN, dtype="bool")
            ids = t.op("clone", (ids,), HIDDEN)
            t.keep_alive(image_tokens)
        by = t.external("embed_scale", (), t.recipe.dtype(t.numerics.parameters), role="buffer")
        x = embedding(t, ids, m.vocab_size, m.hidden_size, "embed_tokens", scaled_by=by)
        shared = masks(t, x, full=True, window=m.window if m.sliding else None)
        position_ids = positions(t)
        with t.scope("rotary_emb"):
            for cos, sin in table_names(m).values():
                tables = rotary_tables(t, x, m.head_dim, position_ids=position_ids)
                shared |= {cos: tables["cos"], sin: tables["sin"], "position_ids": position_ids}
    return x, shared


def self_attention(m: Gemma, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Grouped-query attention with rotary positions."""
    q = heads(t, linear(t, x, m.num_heads * m.head_dim, "q_proj", bias=m.bias), m.num_heads, m.head_dim)
    k = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "k_proj", bias=m.bias), m.num_kv_heads, m.head_dim)
    v = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "v_proj", bias=m.bias), m.num_kv_heads, m.head_dim)
    if m.qk_norm:
        q, k = norm(t, q, "q_norm"), norm(t, k, "k_norm")
    q, k = rotary(t, q, shared["cos"], shared["sin"]), rotary(t, k, shared["cos"], shared["sin"])
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout, softcap=m.scores_softcap))
    return linear(t, out, m.hidden_size, "o_proj", bias=m.bias)


def layer(m: Gemma, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer."""
    normed = norm(t, x, "input_layernorm")
    with t.scope("self_attn", normed):
        attended = self_attention(m, t, normed, shared)
    if m.post_norms:
        attended = norm(t, attended, "post_attention_layernorm")
    x = add(t, x, attended)
    normed = norm(t, x, "pre_feedforward_layernorm" if m.post_norms else "post_attention_layernorm")
    with t.scope("mlp", normed):
        fed = gated_mlp(t, normed, m.intermediate_size, m.activation)
    if m.post_norms:
        fed = norm(t, fed, "post_feedforward_layernorm")
    return add(t, x, fed)


def layers(m: Gemma) -> tuple[LayerKind, ...]:
    """The layers, one object for each type."""
    by_type: dict[bool, LayerKind] = {}
    tables = table_names(m)
    for slides in set(m.sliding) or {False}:
        cos, sin = tables.get("all") or tables["window" if slides else "full"]
        mask = "window_mask" if slides else "mask"
        names = (("mask", mask), ("cos", cos), ("sin", sin), ("position_ids", "position_ids"))
        by_type[slides] = Handed(kind=partial(layer, m), names=names)
    return tuple(by_type[slides] for slides in m.sliding or (False,) * m.num_layers)


def head(m: Gemma, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits (bent in Gemma 2), loss."""
    with t.scope(m.prefix):
        x = norm(t, x, "norm")
    logits = "softcapped" if m.logits_softcap else ""
    return causal_head(t, x, m.vocab_size, tied_to=f"{m.prefix}.embed_tokens.weight" if m.tied else None, logits=logits)


def build(
    m: Gemma,
    config: Config,
    model_type: str,
    *,
    unused: Callable[[Tape], None] | None = None,
    max_positions: int,
    more_buffers: tuple[Buffer, ...] = (),
    **changes: Any,
) -> Architecture:
    """The architecture of these numbers."""
    prefix_of = {"all": "", "window": "sliding_attention_", "full": "full_attention_"}
    buffers = [Buffer(f"{m.prefix}.embed_tokens.embed_scale", (), "fp32")]
    for kind in table_names(m):
        for name in ("inv_freq", "original_inv_freq"):
            buffers.append(Buffer(f"{m.prefix}.rotary_emb.{prefix_of[kind]}{name}", (m.head_dim // 2,), "fp32"))
    values: dict[str, Any] = {
        "model_type": model_type,
        "task": "causal-lm",
        "stem": partial(stem, m, unused),
        "layers": layers(m),
        "layer_prefix": f"{m.prefix}.layers.{{}}",
        "head": partial(head, m),
        "vocab_size": m.vocab_size,
        "max_positions": config.integer("max_position_embeddings", default=max_positions),
        "hidden_size": m.hidden_size,
        "buffers": (*buffers, *more_buffers),
        "windows": needs_mask_beyond(m.window if m.sliding else None),
    }
    return Architecture(**(values | changes))


def gemma(config: Config) -> Architecture:
    """``GemmaForCausalLM``; its configs say ``gelu`` and mean the approximation by tanh."""
    defaults = {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
    }
    m = Gemma(**numbers(config, defaults, tied_default=True), bias=config.flag("attention_bias", default=False))
    return build(m, config, "gemma", max_positions=8192)


_SECOND_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
}


def _newer(config: Config, defaults: Mapping[str, Any], pattern: int, *, tied: bool = True) -> Gemma:
    """What Gemma 2 and 3 have in common: post-norms, windows, another name for the activation."""
    values = numbers(config, defaults, tied_default=tied)
    config.divided("hidden_size", values["hidden_size"], values["num_heads"])
    values["activation"] = config.choice("hidden_activation", known=ACTIVATION_BY_NAME, default="gelu_pytorch_tanh")
    by_pattern = [(i + 1) % pattern != 0 for i in range(values["num_layers"])]
    window = sliding_window(config, 4096)
    if window is None:
        raise ConfigError(f"{config.origin} has no sliding_window.", "Give the window of its sliding layers.")
    return Gemma(
        **values,
        bias=config.flag("attention_bias", default=False),
        window=window,
        sliding=layer_types(config, values["num_layers"], by_pattern),
        post_norms=True,
    )


def gemma2(config: Config) -> Architecture:
    """``Gemma2ForCausalLM``."""
    m = replace(
        _newer(config, _SECOND_DEFAULTS, 2),
        scores_softcap=_caps(config, "attn_logit_softcapping", default=True),
        logits_softcap=_caps(config, "final_logit_softcapping", default=True),
    )
    return build(m, config, "gemma2", max_positions=8192, attentions=("eager", "flash"))


def _caps(config: Config, name: str, *, default: bool) -> bool:
    """Whether there is a soft cap: a number, or null for none."""
    return config.has(name) if config.mentions(name) else default


def _third(config: Config) -> Gemma:
    if config.flag("use_bidirectional_attention", default=False):
        raise ConfigError(
            f"use_bidirectional_attention in {config.origin} is true.", "Only causal attention is modelled for Gemma 3."
        )
    pattern = config.integer("sliding_window_pattern", default=6)
    m = _newer(config, _SECOND_DEFAULTS | {"vocab_size": 262208}, pattern)
    return replace(
        m,
        qk_norm=True,
        tables_by_type=True,
        logits_softcap=_caps(config, "final_logit_softcapping", default=False),
    )


def gemma3_text(config: Config) -> Architecture:
    """``Gemma3ForCausalLM``."""
    return build(_third(config), config, "gemma3_text", max_positions=131072)


def gemma3(config: Config) -> Architecture:
    """``Gemma3ForConditionalGeneration`` trained on text: its logits are never bent."""
    text = config.part("text_config")
    m = _third(text)
    tied = config.flag("tie_word_embeddings", default=True)
    image_token = config.integer("image_token_index", "image_token_id", default=262144)
    m = replace(
        m,
        tied=tied,
        logits_softcap=False,
        prefix="model.language_model",
        ids_copied=image_token >= m.vocab_size,
    )
    return build(
        m,
        text,
        "gemma3",
        more_buffers=(vision_buffer(config),),
        unused=partial(unused_parameters, vision_parameters(config, m.hidden_size)),
        max_positions=131072,
        unmodelled=(
            (
                "images",
                "the micro-batch is text only: the vision tower and its projector hold their weights, but make no "
                "activations and get no gradients or optimizer states",
            ),
            (
                "the key-value cache of a step under autocast without checkpointing",
                "use_cache is switched off in the outer config only (transformers/trainer.py): the text model fills a "
                "cache; its fp32 keys and values live until the loss, and a peak there is predicted too low",
            ),
        ),
    )


def unused_parameters(rows: tuple[tuple[str, tuple[int, ...]], ...], t: Tape) -> None:
    """Parameters that no operator uses, and that therefore never get a gradient."""
    for name, shape in rows:
        t.parameter(name, shape, trainable=False)
