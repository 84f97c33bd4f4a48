"""A class for each sequence, or for each token, in place of the next word.

    sequence    logits of all tokens, of which those of the last one are taken; a mean over the sequences
    rewards     the same of one number, compared within pairs (`memplan.operators.preference.reward_loss`)
    token       dropout, logits in fp32, a mean over the tokens

Source: transformers 5.23, modeling_layers.py (``GenericForSequenceClassification``, ``GenericForTokenClassification``),
loss/loss_utils.py (``ForSequenceClassificationLoss``, ``ForTokenClassification``).  Encoders have heads of their own
(`memplan.architectures.families.bert`).  Left out: regression and several classes at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.architectures.blocks import HIDDEN
from memplan.operators.elementwise import dropout
from memplan.operators.losses import cross_entropy
from memplan.operators.matrix import linear
from memplan.operators.preference import reward_loss
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor

DEFAULT_DROPOUT = 0.1
"""Before the classes of tokens where a config names none."""

GENERIC_MODEL_TYPES = frozenset(
    {"gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"}
)
"""Decoders that have these heads."""
CLASSIFIERS = GENERIC_MODEL_TYPES | {"bert", "roberta", "xlm-roberta"}
SEQUENCE_CLASSIFIERS = CLASSIFIERS | {"gpt2"}
"""Those that have a head for sequences, which is what gives rewards, too."""


def classifiers_for(objective: str) -> frozenset[str]:
    """The model types that have what an objective needs."""
    return CLASSIFIERS if objective == "token-classification" else SEQUENCE_CLASSIFIERS


class Classes(NamedTuple):
    """What a config says about the classes."""

    num: int = 2
    dropout: float = DEFAULT_DROPOUT
    """Before the layer that tells them apart."""


def classes_of(config: Config) -> Classes:
    """The classes of a config: their number, or as many as it names."""
    named = config.raw("id2label")
    default = len(named) if isinstance(named, dict) and named else 2
    p = config.fraction("classifier_dropout", "hidden_dropout_prob", "hidden_dropout", default=DEFAULT_DROPOUT)
    return Classes(config.integer("num_labels", default=default), p)


def sequence_labels(t: Tape) -> Tensor:
    """One class each; how many items the step has is given, and not used."""
    t.external("num_items_in_batch", (), "int64", role="input")
    return t.external("labels", ("b",), "int64", role="input")


def token_labels(t: Tape) -> Tensor:
    """One class a token."""
    t.external("num_items_in_batch", (), "int64", role="input")
    return t.external("labels", HIDDEN, "int64", role="input")


def generic_head(t: Tape, hidden: Tensor) -> Tensor:
    """The loss from the last hidden states of a decoder."""
    return (_token if t.objective == "token-classification" else _sequence)(t, hidden)


def _sequence(t: Tape, hidden: Tensor) -> Tensor:
    logits = linear(t, hidden, t.classes.num, "score", makes_logits=True)
    ids = t.external("input_ids", HIDDEN, "int64", role="input")
    is_token = t.cast(t.op("ne", (ids,), HIDDEN, dtype="bool"), "int32")
    places = t.op("arange", (), ("s",), dtype="int32")
    last = t.op("argmax", (t.op("mul", (places, is_token), HIDDEN, dtype="int32"),), ("b",), dtype="int64")
    rows = t.op("arange", (), ("b",), dtype="int64")
    pooled = t.op("index", (logits, rows, last), ("b", t.classes.num), keeps=(rows, last))
    with t.scope("loss"):
        if t.objective == "reward":
            t.keep_alive(hidden, logits, is_token, places)
            return reward_loss(t, pooled)
        loss = cross_entropy(t, pooled, sequence_labels(t))
        t.keep_alive(hidden, logits, is_token, places, pooled)
    return loss


def _token(t: Tape, hidden: Tensor) -> Tensor:
    dropped = dropout(t, hidden, t.classes.dropout)
    logits = linear(t, dropped, t.classes.num, "score", bias=True, makes_logits=True)
    with t.scope("loss"):
        upcast = t.cast(logits, "fp32")
        loss = cross_entropy(t, upcast, token_labels(t))
        t.keep_alive(hidden, dropped, logits, upcast)
    return loss
