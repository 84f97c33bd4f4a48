"""IBM's Granite: Llama with fixed multipliers on the embedding, both branches, the scores and the logits.

Modelled after transformers 5.23, models/granite/modeling_granite.py.  A multiplication by a number keeps nothing, but
its result is a new tensor.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.blocks import gated_mlp
from memplan.architectures.families import llama
from memplan.architectures.heads import causal_head
from memplan.operators.elementwise import add, scale
from memplan.operators.normalisation import rms_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Architecture
    from memplan.architectures.config import Config
    from memplan.architectures.families.llama import Llama
    from memplan.operators.tape import Tape, Tensor


def layer(m: Llama, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One decoder layer."""
    normed = rms_norm(t, x, "input_layernorm")
    with t.scope("self_attn", normed):
        attended = llama.self_attention(m, t, normed, shared)
    x = add(t, x, scale(t, attended))
    normed = rms_norm(t, x, "post_attention_layernorm")
    with t.scope("mlp", normed):
        fed = gated_mlp(t, normed, m.intermediate_size, m.activation, bias=m.mlp_bias)
    return add(t, x, scale(t, fed))


def head(m: Llama, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Final norm, divided logits, loss."""
    with t.scope("model"):
        x = rms_norm(t, x, "norm")
    return causal_head(t, x, m.vocab_size, tied_to="model.embed_tokens.weight" if m.tied else None, logits="scaled")


def granite(config: Config) -> Architecture:
    """``GraniteForCausalLM``."""
    defaults = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    bias = config.flag("attention_bias", default=False)
    m = llama.Llama(
        **llama.numbers(config, defaults),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        embedding_scaled=True,
    )
    one = partial(layer, m)
    return llama.build(m, config, "granite", layers=(one,) * m.num_layers, head=partial(head, m))
