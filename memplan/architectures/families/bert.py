"""BERT and what is BERT with other position ids: RoBERTa, XLM-RoBERTa; trained with the masked-language-model head.

Modelled after transformers 5.23, models/bert/modeling_bert.py and models/roberta/modeling_roberta.py:

x = n(x + drop(o(attention(q(x), k(x), v(x)))));  x = n(x + drop(down(act(up(x)))))        normalised after each sum

Both directions are attended to, so that no attention implementation is given a mask.  The loss is a plain mean over the
labelled tokens, taken in the dtype of the logits.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.architectures.architecture import Architecture, Buffer, int64
from memplan.architectures.blocks import HIDDEN, heads, merged
from memplan.architectures.classifiers import sequence_labels, token_labels
from memplan.operators.adapters import Base
from memplan.operators.attention import attention
from memplan.operators.elementwise import ACTIVATION_BY_NAME, add, dropout, keeps_result
from memplan.operators.layout import take
from memplan.operators.losses import cross_entropy, masked_lm_loss
from memplan.operators.matrix import embedding, linear, with_adapter
from memplan.operators.normalisation import layer_norm
from memplan.operators.preference import reward_loss
from memplan.operators.products import project
from memplan.specs.training import SCORED
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Bert:
    """The numbers of a BERT-like model, and where its checkpoints differ in names."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    num_token_types: int
    activation: str
    dropout: float
    """Of hidden states."""
    attention_dropout: float
    tied: bool
    body: str
    """Module path of everything but the head."""
    head_bias: str
    """Full name of the bias of the logits."""
    positions_from_ids: bool
    """Whether position ids are counted from the token ids, past the padding (RoBERTa), and not read off a buffer."""


def position_ids(m: Bert, t: Tape, input_ids: Tensor) -> Tensor:
    """Ids of the positions: (b, s) counted over the tokens that are no padding, else a slice of a buffer (1, s)."""
    if not m.positions_from_ids:
        return t.external("position_ids", (1, "s"), "int64", role="buffer")
    is_token = t.op("ne", (input_ids,), HIDDEN, dtype="bool")
    as_int = t.op("to", (is_token,), HIDDEN, dtype="int32")
    total = t.op("cumsum", (as_int,), HIDDEN, dtype="int64")
    total = t.op("to", (total,), HIDDEN, dtype="int32")
    masked = t.op("mul", (total, as_int), HIDDEN, dtype="int32")
    masked = t.op("to", (masked,), HIDDEN, dtype="int64")
    found = t.op("add", (masked,), HIDDEN, dtype="int64")
    t.keep_alive(is_token, as_int, masked)
    return found


def stem(m: Bert, t: Tape) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens, token types and positions, summed, normalised."""
    with t.scope(m.body), t.scope("embeddings"):
        input_ids = int64(t, "input_ids", HIDDEN)
        positions = position_ids(m, t, input_ids)
        token_types = t.op("gather", (positions,), positions.shape, dtype="int64")
        words = embedding(t, input_ids, m.vocab_size, m.hidden_size, "word_embeddings")
        expanded = t.view(token_types, HIDDEN)
        types = embedding(t, expanded, m.num_token_types, m.hidden_size, "token_type_embeddings")
        x = add(t, words, types)
        places = embedding(t, positions, m.max_positions, m.hidden_size, "position_embeddings")
        x = layer_norm(t, add(t, x, places), "LayerNorm")
        x = dropout(t, x, m.dropout)
        t.keep_alive(words, types, places)
        t.holds_output = True  # embedding_output
    return x, {}


def output(m: Bert, t: Tape, x: Tensor, residual: Tensor) -> Tensor:
    """What closes both halves of a layer: project, drop, add, normalise."""
    with t.scope("output"):
        x = dropout(t, linear(t, x, m.hidden_size, "dense", bias=True), m.dropout)
        normed = layer_norm(t, add(t, x, residual), "LayerNorm")
        t.keep_alive(x)
        return normed


def layer(m: Bert, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """One encoder layer."""
    before, head_dim = x, m.hidden_size // m.num_heads
    with t.scope("attention"):
        with t.scope("self"):
            q, k, v = (
                heads(t, linear(t, x, m.hidden_size, name, bias=True), m.num_heads, head_dim)
                for name in ("query", "key", "value")
            )
            attended = merged(t, attention(t, q, k, v, None, p=m.attention_dropout, softmax_dtype=None))
            t.keep_alive(q, k, v)
        x = attention_output = output(m, t, attended, x)
        t.keep_alive(attended)
    with t.scope("intermediate"):
        fed = ACTIVATION_BY_NAME[m.activation](t, linear(t, x, m.intermediate_size, "dense", bias=True))
    x = output(m, t, fed, x)
    t.keep_alive(before, attention_output, fed)
    return x


def head(m: Bert, t: Tape, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
    """Transform, logits, loss; or classes of the sequence, or of its tokens."""
    if t.objective in SCORED:
        return (token_head if t.objective == "token-classification" else sequence_head)(m, t, x)
    scope, inner, norm = (
        ("lm_head", "", "layer_norm") if m.positions_from_ids else ("cls.predictions", "transform", "LayerNorm")
    )
    bias = t.parameter(m.head_bias, (m.vocab_size,), absolute=True, trainable=m.tied)
    with t.scope(scope):
        if not m.tied:  # the decoder has a bias of its own, and the other one is never used: it has no gradient
            bias = t.parameter("decoder.bias", (m.vocab_size,))
        weight = (
            t.parameter(f"{m.body}.embeddings.word_embeddings.weight", (m.vocab_size, m.hidden_size), absolute=True)
            if m.tied
            else t.parameter("decoder.weight", (m.vocab_size, m.hidden_size))
        )
        transformed = transform(m, t, x, inner, norm)
        with t.scope("decoder"):
            logits = project(t, transformed, weight, bias, m.vocab_size)
            logits = with_adapter(t, Base(transformed, logits, weight, bias), makes_logits=True)
    labels = int64(t, "labels", HIDDEN)
    t.external("num_items_in_batch", (), "int64", role="input")  # given, and not used
    with t.scope("loss"):
        loss = masked_lm_loss(t, logits, labels, None)
    t.keep_alive(x)
    return loss


def sequence_head(m: Bert, t: Tape, x: Tensor) -> Tensor:
    """A class of the sequence, from the first token: ``BertForSequenceClassification``, ``RobertaClassificationHead``.

    BERT's pooler is part of the model, and has no dropout before it.
    """
    first = take(t, x, ("b", m.hidden_size))
    if m.positions_from_ids:
        first = dropout(t, first, t.classes.dropout)
    name = "classifier.dense" if m.positions_from_ids else f"{m.body}.pooler.dense"
    pooled = keeps_result(t, "tanh", linear(t, first, m.hidden_size, name, bias=True))
    dropped = dropout(t, pooled, t.classes.dropout)
    name = "classifier.out_proj" if m.positions_from_ids else "classifier"
    logits = linear(t, dropped, t.classes.num, name, bias=True, makes_logits=True)
    with t.scope("loss"):
        if t.objective == "reward":
            t.keep_alive(x)
            return reward_loss(t, logits)
        loss = cross_entropy(t, logits, sequence_labels(t))
        t.keep_alive(x, logits)
    return loss


def token_head(m: Bert, t: Tape, x: Tensor) -> Tensor:
    """A class of each token, taken in the dtype of the logits: ``BertForTokenClassification``."""
    dropped = dropout(t, x, t.classes.dropout)
    logits = linear(t, dropped, t.classes.num, "classifier", bias=True, makes_logits=True)
    with t.scope("loss"):
        loss = cross_entropy(t, logits, token_labels(t))
        t.keep_alive(x, dropped, logits)
    return loss


def transform(m: Bert, t: Tape, x: Tensor, scope: str, norm: str) -> Tensor:
    """The layer before the logits; RoBERTa's activation is GELU whatever the config says."""
    activation = "gelu" if m.positions_from_ids else m.activation
    prefix = f"{scope}." if scope else ""
    x = ACTIVATION_BY_NAME[activation](t, linear(t, x, m.hidden_size, f"{prefix}dense", bias=True))
    return layer_norm(t, x, f"{prefix}{norm}")


def build(config: Config, model_type: str, **names: object) -> Architecture:
    """The architecture that a config describes."""
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    config.divided("hidden_size", hidden, num_heads)
    m = Bert(
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings"),
        num_token_types=config.integer("type_vocab_size", default=2),
        activation=config.choice("hidden_act", known=ACTIVATION_BY_NAME, default="gelu"),
        dropout=config.fraction("hidden_dropout_prob", default=0.1),
        attention_dropout=config.fraction("attention_probs_dropout_prob", default=0.1),
        tied=config.flag("tie_word_embeddings", default=True),
        **names,  # type: ignore[arg-type]
    )
    one = partial(layer, m)
    padding = config.integer("pad_token_id", default=1, least=0) + 1 if m.positions_from_ids else 0
    return Architecture(
        model_type=model_type,
        task="masked-lm",
        stem=partial(stem, m),
        layers=(one,) * m.num_layers,
        layer_prefix=f"{m.body}.encoder.layer.{{}}",
        head=partial(head, m),
        vocab_size=m.vocab_size,
        max_positions=m.max_positions - padding,
        hidden_size=hidden,
        buffers=tuple(
            Buffer(f"{m.body}.embeddings.{name}", (1, m.max_positions), "int64")
            for name in ("position_ids", "token_type_ids")
        ),
    )


def bert(config: Config) -> Architecture:
    """``BertForMaskedLM``."""
    return build(config, "bert", body="bert", head_bias="cls.predictions.bias", positions_from_ids=False)


def roberta(config: Config) -> Architecture:
    """``RobertaForMaskedLM``: positions start after the padding id."""
    return build(config, "roberta", body="roberta", head_bias="lm_head.bias", positions_from_ids=True)


def xlm_roberta(config: Config) -> Architecture:
    """``XLMRobertaForMaskedLM``: the same computation."""
    return build(config, "xlm-roberta", body="roberta", head_bias="lm_head.bias", positions_from_ids=True)
