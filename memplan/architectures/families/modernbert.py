"""ModernBERT: rotary positions, a gated MLP, layers that see all tokens and layers that see a window of them.

Modelled after transformers 5.23, models/modernbert/modeling_modernbert.py, which has no unpadded path any more:

x = x + drop(o(attention(rotary(q), rotary(k), v))) of qkv(n(x));  x = x + o(drop(act(a) * g)) of a, g = i(n(x))

The first layer has no norm before its attention.  A window of w tokens reaches w / 2 to either side; layers with one
need a mask once the sequence is not shorter than w / 2.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from memplan.architectures.architecture import Architecture, Buffer, Handed, int64
from memplan.architectures.blocks import (
    HIDDEN,
    additive_mask,
    boolean_mask,
    lm_head,
    merged,
    positions,
    rotary_tables,
    split_heads,
)
from memplan.errors import ConfigError
from memplan.operators.attention import attention, rotary
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, dropout, mul
from memplan.operators.layout import split
from memplan.operators.losses import masked_lm_loss
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class ModernBert:
    """The numbers of a ModernBERT."""

    hidden_size: int
    layer_types: tuple[str, ...]
    num_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    reach: int
    """Tokens that a window reaches to either side."""
    activation: str
    head_activation: str
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    head_bias: bool
    decoder_bias: bool
    tied: bool
    embedding_dropout: float
    attention_dropout: float
    mlp_dropout: float


def stem(m: ModernBert, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding, the window's mask, one pair of rotary tables for each type of layer."""
    shared: dict[str, Tensor] = {}
    with t.scope("model"):
        position_ids = positions(t)
        with t.scope("embeddings"):
            x = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "tok_embeddings")
            x = dropout(t, layer_norm(t, x, "norm", bias=m.norm_bias), m.embedding_dropout)
        if m.reach - 1 in t.exceeded and t.attention != "flash":
            shared["mask"] = additive_mask(t, x.dtype) if t.attention == "eager" else boolean_mask(t)
        with t.scope("rotary_emb"):
            for kind in sorted(set(m.layer_types)):
                tables = rotary_tables(t, x, m.head_dim, position_ids=position_ids)
                shared |= {f"{name} {kind}": tables[name] for name in ("cos", "sin")}
        t.keep_alive(position_ids)
    return x, shared


def turned(t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Rotary in fp32, whatever the dtype of `x`."""
    return t.cast(rotary(t, t.cast(x, "fp32"), shared["cos"], shared["sin"]), x.dtype)


def self_attention(m: ModernBert, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Attention in both directions on one joint projection."""
    qkv = linear(t, x, 3 * m.hidden_size, "Wqkv", bias=m.attention_bias)
    q, k, v = split_heads(t, qkv, m.num_heads, m.head_dim)
    q, k = turned(t, q, shared), turned(t, k, shared)
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.attention_dropout))
    return dropout(t, linear(t, out, m.hidden_size, "Wo", bias=m.attention_bias), m.attention_dropout)


def mlp(m: ModernBert, t: Tape, x: Tensor) -> Tensor:
    """Both factors come from one projection."""
    half = (*x.shape[:-1], m.intermediate_size)
    both = linear(t, x, 2 * m.intermediate_size, "Wi", bias=m.mlp_bias)
    fed, gate = split(t, both, (half, half))
    product = dropout(t, mul(t, ACTIVATION_BY_NAME[m.activation](t, fed), gate), m.mlp_dropout)
    return linear(t, product, m.hidden_size, "Wo", bias=m.mlp_bias)


def layer(m: ModernBert, t: Tape, x: Tensor, shared: Mapping[str, Tensor], *, first: bool) -> Tensor:
    """One encoder layer."""
    normed = x if first else layer_norm(t, x, "attn_norm", bias=m.norm_bias)
    with t.scope("attn", normed):
        attended = self_attention(m, t, normed, shared)
    x = add(t, x, attended)
    normed = layer_norm(t, x, "mlp_norm", bias=m.norm_bias)
    with t.scope("mlp", normed):
        fed = mlp(m, t, normed)
    return add(t, x, fed)


def head(m: ModernBert, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, transform, logits, loss."""
    with t.scope("model"):
        last = layer_norm(t, x, "final_norm", bias=m.norm_bias)
    with t.scope("head"):
        bent = ACTIVATION_BY_NAME[m.head_activation](t, linear(t, last, m.hidden_size, "dense", bias=m.head_bias))
        x = layer_norm(t, bent, "norm", bias=m.norm_bias)
    tied_to = "model.embeddings.tok_embeddings.weight" if m.tied else None
    logits = lm_head(t, x, m.vocab_size, tied_to=tied_to, name="decoder", bias=m.decoder_bias)
    labels = int64(t, "labels", HIDDEN)
    num_items = t.external("num_items_in_batch", (), "int64", role="input")
    with t.scope("loss"):
        loss = masked_lm_loss(t, logits, labels, num_items)
    t.keep_alive(last)
    return loss


def layer_types(config: Config) -> tuple[str, ...]:
    """One type a layer: as listed, else every n-th layer sees all tokens."""
    num_layers = config.integer("num_hidden_layers")
    listed: Any = config.raw("layer_types")
    if listed is None:
        every = config.integer("global_attn_every_n_layers", default=3)
        return tuple(SLIDING if i % every else FULL for i in range(num_layers))
    if not isinstance(listed, list) or len(listed) != num_layers or not set(map(str, listed)) <= {FULL, SLIDING}:
        raise ConfigError(
            f"layer_types in {config.origin} does not say {FULL} or {SLIDING} once a layer.", "Correct layer_types."
        )
    return tuple(listed)


def modernbert(config: Config) -> Architecture:
    """``ModernBertForMaskedLM``."""
    if config.flag("sparse_prediction", default=False):
        raise ConfigError(
            f"sparse_prediction in {config.origin} is true: logits then depend on how many tokens are masked.",
            "Set sparse_prediction to false.",
        )
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    m = ModernBert(
        hidden_size=hidden,
        layer_types=layer_types(config),
        num_heads=num_heads,
        head_dim=config.paired(config.divided("hidden_size", hidden, num_heads)),
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        reach=config.integer("local_attention", default=128, least=2) // 2,
        activation=config.choice("hidden_activation", known=ACTIVATION_BY_NAME, default="gelu"),
        head_activation=config.choice("classifier_activation", known=ACTIVATION_BY_NAME, default="gelu"),
        norm_bias=config.flag("norm_bias", default=False),
        attention_bias=config.flag("attention_bias", default=False),
        mlp_bias=config.flag("mlp_bias", default=False),
        head_bias=config.flag("classifier_bias", default=False),
        decoder_bias=config.flag("decoder_bias", default=True),
        tied=config.flag("tie_word_embeddings", default=True),
        embedding_dropout=config.fraction("embedding_dropout", default=0.0),
        attention_dropout=config.fraction("attention_dropout", default=0.0),
        mlp_dropout=config.fraction("mlp_dropout", default=0.0),
    )

    def kind(layer_type: str, *, first: bool) -> Handed:
        names = [("cos", f"cos {layer_type}"), ("sin", f"sin {layer_type}")]
        if layer_type == SLIDING:
            names.append(("mask", "mask"))
        return Handed(kind=partial(layer, m, first=first), names=tuple(names))

    others = {layer_type: kind(layer_type, first=False) for layer_type in set(m.layer_types)}
    return Architecture(
        model_type="modernbert",
        task="masked-lm",
        stem=partial(stem, m),
        layers=(kind(m.layer_types[0], first=True), *(others[layer_type] for layer_type in m.layer_types[1:])),
        layer_prefix="model.layers.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=config.optional_integer("max_position_embeddings"),
        hidden_size=hidden,
        buffers=tuple(
            Buffer(f"model.rotary_emb.{layer_type}_{name}", (m.head_dim // 2,), "fp32")
            for layer_type in sorted(set(m.layer_types))
            for name in ("inv_freq", "original_inv_freq")
        ),
        windows=frozenset({m.reach - 1}) if SLIDING in m.layer_types else frozenset(),
    )
