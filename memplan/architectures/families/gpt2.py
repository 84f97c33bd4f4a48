"""GPT-2 and DistilGPT-2.

Modelled after transformers 5.23, models/gpt2/modeling_gpt2.py:

x = x + drop(c_proj(attention(split(c_attn(n(x))))));  x = x + drop(c_proj(act(c_fc(n(x)))))

Linear layers are ``Conv1D`` (weights stored transposed), positions are learned, the head is tied to the embedding.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, int64
from memplan.architectures.blocks import HIDDEN, causal_mask, counted_positions, merged, split_heads
from memplan.architectures.heads import causal_head
from memplan.errors import ConfigError
from memplan.operators.attention import attention
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, dropout
from memplan.operators.matrix import conv1d, embedding
from memplan.operators.normalisation import layer_norm
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class GPT2:
    """The numbers of a GPT-2."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    activation: str
    tied: bool
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float


def stem(m: GPT2, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Token and position embeddings."""
    with t.scope("transformer"):
        tokens = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "wte")
        position_ids = counted_positions(t)
        places = embedding(t, position_ids, m.max_positions, m.hidden_size, "wpe")
        x = add(t, tokens, places)
        shared = causal_mask(t, tokens)
        dropped = dropout(t, x, m.embedding_dropout)
        t.keep_alive(tokens, places)
        t.hold_in_model(places)
    return dropped, shared | {"position_ids": position_ids}


def self_attention(m: GPT2, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Multi-head attention on one joint projection; the softmax runs in the dtype of the scores."""
    q, k, v = split_heads(t, conv1d(t, x, 3 * m.hidden_size, "c_attn"), m.num_heads, m.head_dim)
    out = merged(t, attention(t, q, k, v, shared.get("mask"), p=m.attention_dropout, softmax_dtype=None))
    return dropout(t, conv1d(t, out, m.hidden_size, "c_proj"), m.residual_dropout)


def layer(m: GPT2, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One block."""
    normed = layer_norm(t, x, "ln_1")
    with t.scope("attn", normed):
        attended = self_attention(m, t, normed, shared)
    t.hold_in_piece(attended)
    x = add(t, attended, x)
    normed = layer_norm(t, x, "ln_2")
    with t.scope("mlp", normed):
        bent = ACTIVATION_BY_NAME[m.activation](t, conv1d(t, normed, m.intermediate_size, "c_fc"))
        fed = dropout(t, conv1d(t, bent, m.hidden_size, "c_proj"), m.residual_dropout)
    return add(t, x, fed)


def head(m: GPT2, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, logits, loss."""
    with t.scope("transformer"):
        x = layer_norm(t, x, "ln_f")
    return causal_head(t, x, m.vocab_size, tied_to="transformer.wte.weight" if m.tied else None)


def gpt2(config: Config) -> Architecture:
    """``GPT2LMHeadModel``."""
    hidden = config.integer("n_embd", "hidden_size", default=768)
    num_heads = config.integer("n_head", "num_attention_heads", default=12)
    for name in ("add_cross_attention", "reorder_and_upcast_attn"):
        if config.flag(name, default=False):
            raise ConfigError(f"{name} in {config.origin} is true, which is not modelled.", f"Set {name} to false.")
    m = GPT2(
        hidden_size=hidden,
        num_layers=config.integer("n_layer", "num_hidden_layers", default=12),
        num_heads=num_heads,
        head_dim=config.divided("n_embd", hidden, num_heads),
        intermediate_size=config.integer("n_inner", default=4 * hidden),
        vocab_size=config.integer("vocab_size", default=50257),
        max_positions=config.integer("n_positions", "max_position_embeddings", default=1024),
        activation=config.choice("activation_function", known=ACTIVATION_BY_NAME, default="gelu_new"),
        tied=config.flag("tie_word_embeddings", default=True),
        embedding_dropout=config.fraction("embd_pdrop", default=0.1),
        attention_dropout=config.fraction("attn_pdrop", default=0.1),
        residual_dropout=config.fraction("resid_pdrop", default=0.1),
    )
    return Architecture(
        model_type="gpt2",
        task="causal-lm",
        stem=partial(stem, m),
        layers=(partial(layer, m),) * m.num_layers,
        layer_prefix="transformer.h.{}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=m.max_positions,
        hidden_size=hidden,
    )
