"""Llama and the families that are Llama with a difference: Mistral, Qwen2, Qwen3, SmolLM3, Yi, TinyLlama, SmolLM.

Modelled after transformers 5.23, models/llama/modeling_llama.py and its modular siblings:

x = x + o(attention(rotary(q(n(x))), rotary(k(n(x))), v(n(x))));  x = x + down(act(gate(n(x))) * up(n(x)))
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from memplan.architectures.architecture import Architecture, Buffer, Handed, int64
from memplan.architectures.blocks import (
    HIDDEN,
    causal_mask,
    gated_mlp,
    heads,
    merged,
    rotary_tables,
    window_mask,
)
from memplan.architectures.heads import causal_head
from memplan.errors import ConfigError
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, scale
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import rms_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from memplan.architectures.architecture import LayerKind
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The numbers of a Llama-like model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    activation: str
    tied: bool
    qkv_bias: bool = False
    """q, k and v have biases."""
    out_bias: bool = False
    """The attention's output projection has one."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """q and k are normalised per head (Qwen3)."""
    dropout: float = 0.0
    """Of the attention probabilities."""
    window: int | None = None
    """Tokens that a sliding layer attends to."""
    sliding: tuple[bool, ...] = ()
    """For each layer whether it has that window; empty where none has."""
    rotated: tuple[bool, ...] = ()
    """For each layer whether it turns q and k by their positions; empty where all do (SmolLM3 leaves some out)."""
    embedding_scaled: bool = False
    """The embedding is multiplied by a number (Granite)."""
    full_mask: bool = True
    """Whether the model makes the mask of layers without a window, be there any or not."""
    idle_window_mask: bool = False
    """It makes the mask of the window even where no layer has one (Qwen2-MoE)."""

    @property
    def masked_window(self) -> int | None:
        """The window that it makes a mask for."""
        return self.window if any(self.sliding) or self.idle_window_mask else None


def stem(m: Llama, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, causal mask and rotary tables."""
    with t.scope("model"):
        x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "embed_tokens")
        if m.embedding_scaled:
            x = scale(t, x)
        shared = masks(t, x, full=m.full_mask, window=m.masked_window)
        with t.scope("rotary_emb"):
            shared |= rotary_tables(t, x, m.head_dim)
    return x, shared


def masks(t: Tape, x: Tensor, *, full: bool, window: int | None) -> dict[str, Tensor]:
    """The masks that the layers of a model need: ``mask`` of those that attend to everything, ``window_mask``."""
    made = causal_mask(t, x) if full else {}
    return made if window is None else made | window_mask(t, x, window)


def self_attention(m: Llama, t: Tape, x: Tensor, shared: Mapping[str, Tensor], *, rotated: bool = True) -> Tensor:
    """Grouped-query attention with rotary positions."""
    q = heads(t, linear(t, x, m.num_heads * m.head_dim, "q_proj", bias=m.qkv_bias), m.num_heads, m.head_dim)
    if m.qk_norm:
        q = rms_norm(t, q, "q_norm")
    k = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "k_proj", bias=m.qkv_bias), m.num_kv_heads, m.head_dim)
    if m.qk_norm:
        k = rms_norm(t, k, "k_norm")
    v = heads(t, linear(t, x, m.num_kv_heads * m.head_dim, "v_proj", bias=m.qkv_bias), m.num_kv_heads, m.head_dim)
    if rotated:
        q, k = rotary(t, q, shared["cos"], shared["sin"]), rotary(t, k, shared["cos"], shared["sin"])
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.dropout))
    return linear(t, out, m.hidden_size, "o_proj", bias=m.out_bias)


def layer(m: Llama, t: Tape, x: Tensor, shared: Mapping[str, Tensor], *, rotated: bool = True) -> Tensor:
    """One decoder layer."""
    return pre_norm_layer(
        t,
        x,
        attend=lambda normed: self_attention(m, t, normed, shared, rotated=rotated),
        feed=lambda normed: gated_mlp(t, normed, m.intermediate_size, m.activation, bias=m.mlp_bias),
    )


def pre_norm_layer(
    t: Tape,
    x: Tensor,
    *,
    attend: Callable[[Tensor], Tensor],
    feed: Callable[[Tensor], Tensor],
    gain_in_fp32: bool = False,
) -> Tensor:
    """``x = x + attend(norm(x)); x = x + feed(norm(x))``."""
    normed = rms_norm(t, x, "input_layernorm", gain_in_fp32=gain_in_fp32)
    with t.scope("self_attn", normed):
        attended = attend(normed)
    x = add(t, x, attended)
    normed = rms_norm(t, x, "post_attention_layernorm", gain_in_fp32=gain_in_fp32)
    with t.scope("mlp", normed):
        fed = feed(normed)
    return add(t, x, fed)


def head(m: Llama, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("model"):
        x = rms_norm(t, x, "norm")
    return causal_head(t, x, m.vocab_size, tied_to="model.embed_tokens.weight" if m.tied else None)


MASK_BY_SLIDING = {False: "mask", True: "window_mask"}
"""Which of the shared masks a layer is handed as its ``mask``."""

TABLES = ("cos", "sin", "position_ids")
"""What it is handed besides."""


def layers(m: Llama) -> tuple[LayerKind, ...]:
    """The layers, one object for each combination of window and rotation."""
    kinds: dict[tuple[bool, bool], LayerKind] = {}
    ordered = []
    for i in range(m.num_layers):
        key = (bool(m.sliding) and m.sliding[i], not m.rotated or m.rotated[i])
        if key not in kinds:
            names = (("mask", MASK_BY_SLIDING[key[0]]), *((name, name) for name in TABLES))
            kinds[key] = Handed(kind=partial(layer, m, rotated=key[1]), names=names)
        ordered.append(kinds[key])
    return tuple(ordered)


def needs_mask_beyond(window: int | None) -> frozenset[int]:
    """`Architecture.windows` of a model with this window."""
    return frozenset() if window is None else frozenset({window - 1})


def cache_windows(m: Llama) -> tuple[int | None, ...]:
    """`Architecture.cache_windows` of such a model."""
    return tuple(m.window if m.sliding and m.sliding[i] else None for i in range(m.num_layers))


def build(m: Llama, config: Config, model_type: str, **changes: object) -> Architecture:
    """The architecture of these numbers."""
    values: dict[str, object] = {
        "model_type": model_type,
        "task": "causal-lm",
        "stem": partial(stem, m),
        "layers": layers(m),
        "layer_prefix": "model.layers.{}",
        "head": partial(head, m),
        "vocab_size": m.vocab_size,
        "max_positions": config.optional_integer("max_position_embeddings"),
        "hidden_size": m.hidden_size,
        "buffers": tuple(
            Buffer(f"model.rotary_emb.{name}", (m.head_dim // 2,), "fp32") for name in ("inv_freq", "original_inv_freq")
        ),
        "windows": needs_mask_beyond(m.masked_window),
        "cache_windows": cache_windows(m),
    }
    return Architecture(**(values | changes))  # type: ignore[arg-type]


def numbers(
    config: Config, defaults: Mapping[str, Any] = MappingProxyType({}), *, tied_default: bool = False
) -> dict[str, Any]:
    """The keys that all of these families have under the same names.

    `defaults`: the values of transformers' config class for keys that a config.json may leave out.
    """

    def whole(name: str) -> int:
        return config.integer(name, default=defaults[name]) if name in defaults else config.integer(name)

    hidden, num_heads = whole("hidden_size"), whole("num_attention_heads")
    kv_default = num_heads
    if "num_key_value_heads" in defaults and not config.mentions("num_key_value_heads"):
        kv_default = defaults["num_key_value_heads"]
    num_kv_heads = config.integer("num_key_value_heads", default=kv_default)
    config.divided("num_attention_heads", num_heads, num_kv_heads)
    head_dim = config.optional_integer("head_dim", least=2) or defaults.get("head_dim")
    return {
        "hidden_size": hidden,
        "num_layers": whole("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": config.paired(head_dim or config.divided("hidden_size", hidden, num_heads)),
        "intermediate_size": whole("intermediate_size"),
        "vocab_size": whole("vocab_size"),
        "activation": config.choice("hidden_act", known=ACTIVATION_BY_NAME, default=defaults.get("hidden_act", "silu")),
        "tied": config.flag("tie_word_embeddings", default=tied_default),
        "dropout": config.fraction("attention_dropout", default=0.0),
    }


def layer_types(config: Config, num_layers: int, default: Sequence[bool]) -> tuple[bool, ...]:
    """For each layer whether it is a ``sliding_attention`` layer; `default` where the config does not list types."""
    listed = config.raw("layer_types")
    if listed is None:
        return tuple(default)
    names = ("full_attention", "sliding_attention")
    if not isinstance(listed, list) or any(name not in names for name in listed) or len(listed) != num_layers:
        raise ConfigError(
            f"layer_types in {config.origin} is not a list of {num_layers} layer types that are modelled.",
            f"Known: {', '.join(names)}.",
        )
    return tuple(name == "sliding_attention" for name in listed)


def sliding_window(config: Config, default: int | None) -> int | None:
    """``sliding_window``: `default` where it is left out, None where it is null."""
    return config.optional_integer("sliding_window") if config.mentions("sliding_window") else default


def llama(config: Config) -> Architecture:
    """``LlamaForCausalLM``."""
    bias = config.flag("attention_bias", default=False)
    m = Llama(
        **numbers(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )
    return build(m, config, "llama")


def mistral(config: Config) -> Architecture:
    """``MistralForCausalLM``: a window over all layers or none, and one mask."""
    defaults = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    common = numbers(config, defaults)
    window = sliding_window(config, 4096)
    sliding = (window is not None,) * common["num_layers"]
    return build(Llama(**common, window=window, sliding=sliding, full_mask=window is None), config, "mistral")


def _late_window(config: Config, num_layers: int) -> dict[str, Any]:
    """Qwen's window: only with ``use_sliding_window``, from layer ``max_window_layers`` on."""
    used = config.flag("use_sliding_window", default=False)
    window = sliding_window(config, 4096) if used else None
    first = config.integer("max_window_layers", default=28, least=0)
    sliding = layer_types(config, num_layers, [window is not None and i >= first for i in range(num_layers)])
    if any(sliding) and window is None:
        raise ConfigError(f"layer_types in {config.origin} has sliding layers, but there is no window.", GIVE_WINDOW)
    return {"window": window, "sliding": sliding}


GIVE_WINDOW = "Give sliding_window and, for Qwen and SmolLM3, use_sliding_window."

_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def qwen2(config: Config) -> Architecture:
    """``Qwen2ForCausalLM``: biases on q, k and v."""
    common = numbers(config, _QWEN_DEFAULTS)
    return build(Llama(**common, qkv_bias=True, **_late_window(config, common["num_layers"])), config, "qwen2")


def qwen3(config: Config) -> Architecture:
    """``Qwen3ForCausalLM``: q and k are normalised per head."""
    common = numbers(config, _QWEN_DEFAULTS | {"head_dim": 128})
    bias = config.flag("attention_bias", default=False)
    window = _late_window(config, common["num_layers"])
    return build(Llama(**common, qkv_bias=bias, out_bias=bias, qk_norm=True, **window), config, "qwen3")


def smollm3(config: Config) -> Architecture:
    """``SmolLM3ForCausalLM``: every fourth layer (``no_rope_layer_interval``) has no positions."""
    defaults = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    common = numbers(config, defaults, tied_default=True)
    num_layers = common["num_layers"]
    rotated = _rotated(config, num_layers)
    window = sliding_window(config, None) if config.flag("use_sliding_window", default=False) else None
    sliding = layer_types(config, num_layers, [window is not None and not turns for turns in rotated])
    if any(sliding) and window is None:
        raise ConfigError(f"layer_types in {config.origin} has sliding layers, but there is no window.", GIVE_WINDOW)
    bias = config.flag("attention_bias", default=False)
    m = Llama(
        **common,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        rotated=rotated,
        window=window,
        sliding=sliding,
    )
    return build(m, config, "smollm3")


def _rotated(config: Config, num_layers: int) -> tuple[bool, ...]:
    listed = config.raw("no_rope_layers")
    if listed is None:
        interval = config.integer("no_rope_layer_interval", default=4)
        return tuple((i + 1) % interval != 0 for i in range(num_layers))
    if not isinstance(listed, list) or any(x not in (0, 1) for x in listed) or len(listed) < num_layers:
        raise ConfigError(
            f"no_rope_layers in {config.origin} is not a list of {num_layers} zeros and ones.",
            "Give 1 for a layer with rotary positions and 0 for one without.",
        )
    return tuple(bool(x) for x in listed[:num_layers])
