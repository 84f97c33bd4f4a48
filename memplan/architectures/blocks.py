"""Parts that many families share, each recorded in the order in which transformers runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import ConfigError
from memplan.operators.adapters import Base
from memplan.operators.attention import rotary
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add_scalar, mul, scale
from memplan.operators.layout import cat, split, take
from memplan.operators.matrix import linear, with_adapter
from memplan.operators.products import project
from memplan.operators.tape import MODULES_TO_SAVE

if TYPE_CHECKING:
    from memplan.architectures.config import Config
    from memplan.operators.sizes import Shape
    from memplan.operators.tape import Tape, Tensor


HIDDEN = ("b", "s")
"""Leading dimensions of hidden states."""


def positions(t: Tape) -> Tensor:
    """``torch.arange(s).unsqueeze(0)``, or what is passed in its place: int64 of shape (1, s).

    ``generate`` hands in those of every sequence.
    """
    if t.generating:
        return t.external("position_ids", HIDDEN, "int64", role="input")
    if t.batch.flattened:
        return given_positions(t)
    arange = t.op("arange", (), ("s",), dtype="int64")
    return t.view(arange, (1, "s"))


def counted_positions(t: Tape) -> Tensor:
    """``torch.arange(s) + past_seen_tokens``, a copy, where none are passed."""
    return positions(t) if t.batch.flattened else add_scalar(t, positions(t))


def given_positions(t: Tape) -> Tensor:
    """``position_ids`` that start again with every sequence, and what else says where: inputs of the step.

    ``DataCollatorForLanguageModeling(padding_free=True)`` of TRL 1.16 (trainer/sft_trainer.py); its two
    ``cu_seq_lens`` are one tensor on the host and two on the device.
    """
    t.external("seq_idx", (1, "s"), "int32", role="input")
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        t.external(name, ("sequences+1",), "int32", role="input")
    return t.external("position_ids", (1, "s"), "int64", role="input")


def rotary_tables(
    t: Tape, hidden: Tensor, dim: int, *, position_ids: Tensor | None = None, dtype: str | None = None
) -> dict[str, Tensor]:
    """Cos and sin of (1, s, dim), computed in fp32 (``LlamaRotaryEmbedding``).

    They are handed on in `dtype`, by default that of the hidden states.
    """
    if position_ids is None:
        position_ids = positions(t)
    as_float = t.cast(position_ids, "fp32")
    half: Shape = (position_ids.shape[0], "s", dim // 2)
    freqs = t.op("mul", (as_float,), half, dtype="fp32", gradients=())
    both = cat(t, (freqs, freqs), (position_ids.shape[0], "s", dim))
    cos = scale(t, t.op("cos", (both,), both.shape))
    sin = scale(t, t.op("sin", (both,), both.shape))
    t.keep_alive(freqs, both, cos)
    cos, sin = t.cast(cos, dtype or hidden.dtype), t.cast(sin, dtype or hidden.dtype)
    return {"cos": cos, "sin": sin, "position_ids": position_ids}


def causal_mask(t: Tape, hidden: Tensor) -> dict[str, Tensor]:
    """The additive mask of (b, 1, s, s) that eager attention is given; fused kernels need none without padding.

    With padding, or several sequences in a row, scaled_dot_product_attention is given a boolean mask; flash attention
    unpads by itself, and is told where sequences end.
    """
    padding_mask(t)
    if t.attention == "eager":
        return {"mask": additive_mask(t, hidden.dtype)}
    return {"mask": boolean_mask(t)} if t.batch.masked and t.attention == "sdpa" else {}


def padding_mask(t: Tape) -> None:
    """The ``attention_mask`` of (b, s) that comes with a padded micro-batch (with pairs of ORPO's it always does)."""
    t.minds_padding = True
    if t.batch.padded and t.objective != "orpo":
        t.external("attention_mask", HIDDEN, "int64", role="input")


def window_mask(t: Tape, hidden: Tensor, window: int) -> dict[str, Tensor]:
    """The mask of layers that attend to the last `window` tokens (``create_sliding_window_causal_mask``).

    Fused attention needs none while the sequence is shorter than the window; flash attention knows windows by itself.
    """
    keys = f"in {window}" if t.generating else ""
    if t.attention == "eager":
        return {"window_mask": additive_mask(t, hidden.dtype, keys)}
    padding_mask(t)
    if t.attention == "sdpa" and (t.batch.masked or window - 1 in t.exceeded):
        return {"window_mask": boolean_mask(t, keys)}
    return {}


def additive_mask(t: Tape, dtype: str, keys: str = "") -> Tensor:
    """``eager_mask``: a boolean (b, 1, s, s) turned into 0 and the lowest number of `dtype`."""
    mask = boolean_mask(t, keys)
    return t.op("where", (mask,), mask.shape, dtype=dtype)


def boolean_mask(t: Tape, keys: str = "") -> Tensor:
    """The boolean (b, 1, s, s) that fused attention is given where is_causal does not say it all (windows).

    Without padding it depends on positions alone: it is one (s, s), shown b times (``expand`` in ``sdpa_mask``).  Of a
    row that holds several sequences (``find_packed_sequence_indices`` in masking_utils.py) there is one anyway.
    """
    keys = keys or t.keys
    if t.batch.masked:
        return t.op("mask", (), ("b", 1, "s", keys), dtype="bool")
    mask = t.op("mask", (), (1, 1, "s", keys), dtype="bool")
    return t.view(mask, ("b", 1, "s", keys))


def heads(t: Tape, x: Tensor, num: int, head_dim: int) -> Tensor:
    """(b, s, num * head_dim) seen as (b, num, s, head_dim)."""
    return t.view(x, (x.shape[0], num, x.shape[1], head_dim))


def split_heads(t: Tape, qkv: Tensor, num: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of (b, num, s, head_dim) as slices of one joint projection (b, s, 3 * num * head_dim)."""
    shape = (qkv.shape[0], num, qkv.shape[1], head_dim)
    q, k, v = split(t, qkv, (shape, shape, shape))
    return q, k, v


def merged(t: Tape, x: Tensor) -> Tensor:
    """(b, s, heads, head_dim) seen as (b, s, heads * head_dim)."""
    b, s, num, head_dim = x.shape
    assert isinstance(num, int)
    assert isinstance(head_dim, int)
    return t.view(x, (b, s, num * head_dim))


def partial_rotary(t: Tape, x: Tensor, cos: Tensor, sin: Tensor, dim: int, *, held: bool = False) -> Tensor:
    """Rotary on the first `dim` of the head's dimensions, the rest passed through.

    `held`: variables of the module hold both parts.
    """
    head_dim = x.shape[-1]
    assert isinstance(head_dim, int)
    if dim == head_dim:
        return rotary(t, x, cos, sin)
    turning = take(t, x, (*x.shape[:-1], dim))
    passing = take(t, x, (*x.shape[:-1], head_dim - dim))
    turned = rotary(t, turning, cos, sin)
    if held:
        t.hold_in_module(passing, turned)
    return cat(t, (turned, passing), x.shape)


def rotary_dim(config: Config, head_dim: int, key: str, default: float) -> int:
    """How many of the head's dimensions turn: a fraction under `key`, or within ``rope_parameters``."""
    name = next((n for n in ("rope_scaling", "rope_parameters") if isinstance(config.raw(n), dict)), None)
    inside = config.part(name) if name is not None else config
    fraction = inside.fraction("partial_rotary_factor", default=config.fraction(key, default=default))
    dim = int(head_dim * fraction)
    if dim < 2:
        raise ConfigError(f"{key} in {config.origin} leaves no dimension to rotate.", f"Correct {key}.")
    return config.paired(dim, key)


def gated_mlp(t: Tape, x: Tensor, width: int, activation: str, *, bias: bool = False) -> Tensor:
    """``down(act(gate(x)) * up(x))``: keeps four tensors of the MLP's width."""
    hidden = x.shape[-1]
    assert isinstance(hidden, int)
    gate = ACTIVATION_BY_NAME[activation](t, linear(t, x, width, "gate_proj", bias=bias))
    up = linear(t, x, width, "up_proj", bias=bias)
    return linear(t, mul(t, gate, up), hidden, "down_proj", bias=bias)


def lm_head(
    t: Tape, hidden: Tensor, vocab_size: int, *, tied_to: str | None, name: str = "lm_head", bias: bool = False
) -> Tensor:
    """Logits; `tied_to` is the full name of the embedding whose weight it shares."""
    if tied_to is None:
        return linear(t, hidden, vocab_size, name, bias=bias, makes_logits=True)
    weight, offset = output_parameters(t, hidden, vocab_size, tied_to=tied_to, name=name, bias=bias)
    with t.scope(name):
        logits = project(t, hidden, weight, offset, vocab_size)
        return with_adapter(t, Base(hidden, logits, weight, offset), makes_logits=True)


def output_parameters(
    t: Tape, hidden: Tensor, vocab_size: int, *, tied_to: str | None, name: str, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the output layer, for a loss that uses them without calling the layer."""
    width = hidden.shape[-1]
    assert isinstance(width, int)
    shape = (vocab_size, width)
    tied = None if tied_to is None else t.parameter(tied_to, shape, absolute=True)
    with t.scope(name):
        weight = t.parameter("weight", shape) if tied is None else tied
        if tied is not None and t.ask("copies", t.module):  # the copy has a weight of its own
            weight = t.parameter(f"{MODULES_TO_SAVE}.weight", shape, of_adapter=True)
        return weight, t.parameter("bias", (vocab_size,)) if bias else None
