"""DeBERTa v2 and v3: content attends to content, content to relative position and position to content.

Modelled after transformers 5.23, models/deberta_v2/modeling_deberta_v2.py, with r rows of relative embeddings:

scores = q k' / c + gather(q p_k') / c + gather(k p_q') / c        p_k, p_q: projections of the r rows, once a layer

It has one implementation of attention, written out, whatever is asked for.  `gather` keeps the (s, r) scores that it
picks from.  The config names the head (``architectures``): ``DebertaV2ForMaskedLM``, else none (``AutoModel``), where
the mean of the last hidden states stands for a loss.

Left out: the gradient of the relative embeddings, one table that layers add to from last to first during the backward
pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, Buffer, int64
from memplan.architectures.blocks import HIDDEN, heads, lm_head, merged
from memplan.errors import ConfigError
from memplan.operators.attention import softmax
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, add_in_place, add_scalar, dropout, mul, scale
from memplan.operators.layout import copy
from memplan.operators.losses import masked_lm_loss
from memplan.operators.matrix import embedding, linear
from memplan.operators.normalisation import layer_norm
from memplan.operators.products import matmul
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Deberta:
    """The numbers of a DeBERTa."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    num_token_types: int
    has_positions: bool
    """Absolute position embeddings are added to the input."""
    num_relative: int
    """Rows of the relative embeddings, which all layers share."""
    normalised: bool
    """The relative embeddings are normalised before use."""
    kinds: tuple[str, ...]
    """``c2p``, ``p2c``: the relative scores."""
    shares_projections: bool
    """Relative rows go through the projections of q and k, else through their own."""
    activation: str
    dropout: float
    attention_dropout: float
    tied: bool
    body: str
    """Module path of everything but the head, with its dot."""


def stem(m: Deberta, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings times a mask of ones, the mask of all pairs, relative positions and their embeddings."""
    ones = t.op("ones", (), HIDDEN, dtype="fp32")
    token_types = t.op("zeros", (), HIDDEN, dtype="int64")
    with t.scope(f"{m.body}embeddings"):
        words = embedding(t, int64(t, "input_ids", HIDDEN), m.vocab_size, m.hidden_size, "word_embeddings")
        x = words
        if m.has_positions:
            ids = t.external("position_ids", (1, "s"), "int64", role="buffer")
            x = add(t, x, embedding(t, ids, m.max_positions, m.hidden_size, "position_embeddings"))
        else:
            unused = t.op("zeros", (), words.shape, dtype=words.dtype)
        if m.num_token_types:
            x = add(t, x, embedding(t, token_types, m.num_token_types, m.hidden_size, "token_type_embeddings"))
        x = layer_norm(t, x, "LayerNorm")
        x = mul(t, x, t.cast(t.view(ones, ("b", "s", 1)), x.dtype))
        x = dropout(t, x, m.dropout)
        if not m.has_positions:
            t.keep_alive(unused)
    with t.scope(f"{m.body}encoder"):
        pairs = t.op("mul", (ones, ones), ("b", 1, "s", "s"), dtype="fp32")
        relative = t.op("relative positions", (), (1, "s", "s"), dtype="int64")
        with t.scope("rel_embeddings"):
            rows = t.parameter("weight", (m.num_relative, m.hidden_size), of_embedding=True)
        if m.normalised:
            rows = layer_norm(t, rows, "LayerNorm")
    t.keep_alive(ones, token_types)
    t.hold_in_model(ones)
    t.hold_in_model(token_types)
    t.all_outputs_held = True  # output_hidden_states
    return x, {"pairs": pairs, "relative": relative, "rows": rows}


def per_head(m: Deberta, t: Tape, x: Tensor, name: str) -> Tensor:
    """A projection as a contiguous (b, heads, s, head_dim)."""
    projected = linear(t, x, m.hidden_size, name, bias=True)
    return copy(t, heads(t, projected, m.num_heads, m.hidden_size // m.num_heads))


def relative_score(
    m: Deberta, t: Tape, content: Tensor, positions: Tensor, relative: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(b, heads, s, s): of the products of `content` with all r `positions`, those at the relative positions.

    And what the model's variables still hold when both scores are summed.
    """
    b, num, s, head_dim = content.shape
    assert isinstance(head_dim, int)
    shifted = add_scalar(t, relative)
    index = t.op("clamp", (shifted,), shifted.shape)
    scores = matmul(t, content, positions, (b, num, s, m.num_relative), head_dim)
    picked = t.op(
        "gather",
        (scores, index),
        (b, num, s, s),
        keeps=(scores, index),
        reason="the derivative of gather needs the index, and the shape of what it picked from",
    )
    return scale(t, picked), (index, picked)


def repeated(m: Deberta, t: Tape, rows: Tensor, name: str) -> Tensor:
    """The relative rows projected, per head, once for every sequence of the micro-batch: (b, heads, r, head_dim)."""
    one = per_head(m, t, rows, name)
    return t.op("repeat", (one,), ("b", *one.shape[1:]))


def relative_scores(m: Deberta, t: Tape, q: Tensor, k: Tensor, rows: Tensor, relative: Tensor) -> Tensor:
    """The sum of the relative scores (``disentangled_attention_bias``)."""
    held: list[Tensor] = []
    scores: list[Tensor] = []
    rows = t.view(rows, (1, *rows.shape))
    query, key = ("query_proj", "key_proj") if m.shares_projections else ("pos_query_proj", "pos_key_proj")
    rows_q = repeated(m, t, rows, query) if m.shares_projections or "p2c" in m.kinds else None
    rows_k = repeated(m, t, rows, key) if m.shares_projections or "c2p" in m.kinds else None
    if "c2p" in m.kinds and rows_k is not None:
        score, variables = relative_score(m, t, q, rows_k, relative)
        scores.append(add_scalar(t, score))
        held += [rows_k, *variables]
    if "p2c" in m.kinds and rows_q is not None:
        score, variables = relative_score(m, t, k, rows_q, relative)
        scores.append(score)
        held += [rows_q, *variables]
    total = add_in_place(t, *scores) if len(scores) == 2 else scores[0]
    t.keep_alive(*held)
    return total


def attend(m: Deberta, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Disentangled self-attention."""
    q, k, v = (per_head(m, t, x, name) for name in ("query_proj", "key_proj", "value_proj"))
    b, num, s, head_dim = q.shape
    held = [q, k, v]
    scores = matmul(t, q, scale(t, k), (b, num, s, s), head_dim)
    if m.kinds:
        rows = dropout(t, shared["rows"], m.dropout)
        bias = relative_scores(m, t, q, k, rows, shared["relative"])
        scores = add(t, scores, bias)
        held += [rows, bias]
    allowed = t.op("to", (shared["pairs"],), shared["pairs"].shape, dtype="bool")
    hidden = t.op("not", (allowed,), allowed.shape)
    scores = t.op(
        "masked_fill", (scores, hidden), scores.shape, keeps=(hidden,), reason="masked scores have no gradient"
    )
    weights = dropout(t, softmax(t, scores), m.attention_dropout)
    context = copy(t, matmul(t, weights, v, (b, num, s, head_dim), s), (b, s, num, head_dim))
    t.keep_alive(*held, allowed, scores, weights)
    return merged(t, context)


def output(m: Deberta, t: Tape, x: Tensor, residual: Tensor) -> Tensor:
    """What closes both halves of a layer: project, drop, add, normalise."""
    with t.scope("output"):
        x = dropout(t, linear(t, x, m.hidden_size, "dense", bias=True), m.dropout)
        return layer_norm(t, add(t, x, residual), "LayerNorm")


def layer(m: Deberta, t: Tape, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """One encoder layer."""
    with t.scope("attention"):
        with t.scope("self"):
            attended = attend(m, t, x, shared)
        x = output(m, t, attended, x)
    with t.scope("intermediate"):
        fed = ACTIVATION_BY_NAME[m.activation](t, linear(t, x, m.intermediate_size, "dense", bias=True))
    return output(m, t, fed, x)


def masked_lm(m: Deberta, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Transform, logits, a plain mean over the labelled tokens."""
    with t.scope("cls.predictions.transform"):
        bent = ACTIVATION_BY_NAME[m.activation](t, linear(t, x, m.hidden_size, "dense", bias=True))
        last = layer_norm(t, bent, "LayerNorm")
    tied_to = f"{m.body}embeddings.word_embeddings.weight" if m.tied else None
    logits = lm_head(t, last, m.vocab_size, tied_to=tied_to, name="cls.predictions.decoder", bias=True)
    labels = int64(t, "labels", HIDDEN)
    t.external("num_items_in_batch", (), "int64", role="input")  # given, and not used
    with t.scope("loss"):
        loss = masked_lm_loss(t, logits, labels, None)
    t.keep_alive(x)
    return loss


def features(_: Deberta, t: Tape, x: Tensor, __: Mapping[str, Tensor]) -> Tensor:
    """No head: the mean of the hidden states stands for a loss."""
    with t.scope("loss"):
        return t.op("mean", (x,), ())


def numbers(config: Config, body: str) -> Deberta:
    """The keys of a DeBERTa's config."""
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    config.divided("hidden_size", hidden, num_heads)
    max_positions = config.integer("max_position_embeddings", default=512)
    reach = config.integer("max_relative_positions", default=-1, least=-1)
    buckets = config.integer("position_buckets", default=-1, least=-1)
    span = buckets if buckets > 0 else reach if reach > 0 else max_positions
    listed = config.raw("pos_att_type") or ()
    kinds = tuple(listed.lower().split("|")) if isinstance(listed, str) else tuple(listed)
    return Deberta(
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=max_positions,
        num_token_types=config.integer("type_vocab_size", default=0, least=0),
        has_positions=config.flag("position_biased_input", default=True),
        num_relative=2 * span,
        normalised="layer_norm" in config.text("norm_rel_ebd", default="none").lower().split("|"),
        kinds=kinds,
        shares_projections=config.flag("share_att_key", default=False),
        activation=config.choice("hidden_act", known=ACTIVATION_BY_NAME, default="gelu"),
        dropout=config.fraction("hidden_dropout_prob", default=0.1),
        attention_dropout=config.fraction("attention_probs_dropout_prob", default=0.1),
        tied=config.flag("tie_word_embeddings", default=True),
        body=body,
    )


def deberta_v2(config: Config) -> Architecture:
    """``DebertaV2ForMaskedLM`` where the config names it, else ``DebertaV2Model``."""
    named = "DebertaV2ForMaskedLM" in (config.raw("architectures") or ())
    m = numbers(config, "deberta." if named else "")
    unsupported = {
        "relative_attention": not config.flag("relative_attention", default=False),
        "conv_kernel_size": config.integer("conv_kernel_size", default=0, least=0) > 0,
        "embedding_size": config.integer("embedding_size", default=m.hidden_size) != m.hidden_size,
        "legacy": named and not config.flag("legacy", default=True),
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ConfigError(
                f"{name} in {config.origin} makes a DeBERTa that is not modelled.", "Only v3's shape of it is."
            )
    one = partial(layer, m)
    headless = (("loss head", "the config names no head; the mean of the hidden states stands for a loss"),)
    return Architecture(
        model_type="deberta-v2",
        task="masked-lm" if named else "features",
        stem=partial(stem, m),
        layers=(one,) * m.num_layers,
        layer_prefix=f"{m.body}encoder.layer.{{}}",
        head=partial(masked_lm if named else features, m),
        vocab_size=m.vocab_size,
        max_positions=m.max_positions if m.has_positions else None,
        usual_positions=m.max_positions,
        hidden_size=m.hidden_size,
        attentions=("eager",),
        buffers=(Buffer(f"{m.body}embeddings.position_ids", (1, m.max_positions), "int64"),),
        unmodelled=() if named else headless,
    )
