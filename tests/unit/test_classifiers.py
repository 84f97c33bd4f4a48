"""Classifiers, worked out by hand: their parameters, what their heads keep, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.classifiers import Classes
from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.operators.sizes import allocated
from memplan.specs.adapter import Lora
from memplan.specs.recipe import ALL_LINEAR
from memplan.specs.training import Setup

WIDTH, WORDS, BATCH, LENGTH, CLASSES = 64, 1000, 4, 100, 5
TOKENS = BATCH * LENGTH
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": WORDS,
    "num_labels": CLASSES,
}
BERT = LLAMA | {"model_type": "bert", "max_position_embeddings": 128, "type_vocab_size": 2}
SEQUENCE, TOKEN = "sequence-classification", "token-classification"


def estimator(config: dict[str, Any]) -> Estimator:
    """Of a small model."""
    return Estimator(read_architecture(config, "config"), "model")


def head_keeps(config: dict[str, Any], objective: str) -> int:
    """Bytes that the head keeps: what is kept, less what a model of the same layers does without it."""
    found = estimator(config)
    setup = Setup(micro_batch_size=BATCH, seq_len=LENGTH, objective=objective)
    program, sizes = found.program(setup), found.sizes(setup)
    return int(sizes.extent(program.layout.head.forward).net)


def num_parameters(config: dict[str, Any], objective: str) -> int:
    """Of the whole model."""
    return estimator(config).program(Setup(seq_len=8, objective=objective)).states.num_parameters


def test_parameters_of_a_decoder() -> None:
    """The words' output layer goes; classes of sequences have no bias, those of tokens one."""
    body = num_parameters(LLAMA, "lm") - WORDS * WIDTH
    assert num_parameters(LLAMA, SEQUENCE) == body + CLASSES * WIDTH
    assert num_parameters(LLAMA, TOKEN) == body + CLASSES * WIDTH + CLASSES


def test_parameters_of_an_encoder() -> None:
    """BERT has a pooler for sequences alone."""
    tokens = num_parameters(BERT, TOKEN)
    assert num_parameters(BERT, SEQUENCE) == tokens + WIDTH * WIDTH + WIDTH


def test_what_the_head_of_sequences_keeps() -> None:
    """The norm's two halves, the last hidden states; of each sequence, where it ends and its log-probabilities."""
    hidden, scale = 2 * TOKENS * WIDTH, 4 * TOKENS
    # upcast (fp32), rsqrt (fp32), normalised (bf16), result (bf16), which the layer of the classes keeps, too
    norm = allocated(2 * hidden) + allocated(scale) + 2 * allocated(hidden)
    sequences = 2 * allocated(8 * BATCH) + allocated(2 * BATCH * CLASSES)  # rows, places, log-probabilities in bf16
    loss = 2 * allocated(2)  # the loss, its total weight
    freed = allocated(hidden)  # the layers' result goes
    assert head_keeps(LLAMA, SEQUENCE) == norm + sequences + loss - freed


def test_what_the_head_of_tokens_keeps() -> None:
    """The dropped hidden states and their mask in place of the plain ones; log-probabilities of all tokens in fp32."""
    hidden, scale = 2 * TOKENS * WIDTH, 4 * TOKENS
    norm = allocated(2 * hidden) + allocated(scale) + allocated(hidden)
    dropped = allocated(hidden) + allocated(TOKENS * WIDTH)
    tokens = allocated(4 * TOKENS * CLASSES)
    loss = 2 * allocated(4)
    assert head_keeps(LLAMA, TOKEN) == norm + dropped + tokens + loss - allocated(hidden)


def test_how_many_classes() -> None:
    """As many as the config names; two where it says nothing."""
    plain = {name: value for name, value in LLAMA.items() if name != "num_labels"}
    assert read_architecture(plain, "config").classes == Classes(2, 0.1)
    named = plain | {"id2label": {"0": "a", "1": "b", "2": "c"}, "classifier_dropout": 0.3}
    assert read_architecture(named, "config").classes == Classes(3, 0.3)
    assert read_architecture(named, "config", dropout=0.0).classes == Classes(3, 0.0)


def test_adapters_of_a_classifier() -> None:
    """A copy of the head is trained beside them, and the original stays: one more head, all in all."""
    rank, inner = 4, 128
    setup = Setup(seq_len=8, objective=SEQUENCE, lora=Lora(rank=rank))
    states = estimator(LLAMA).program(setup).states
    adapters = rank * (4 * 2 * WIDTH + 3 * (WIDTH + inner))
    assert states.num_trained == adapters + CLASSES * WIDTH
    assert states.num_parameters == num_parameters(LLAMA, SEQUENCE) + adapters + CLASSES * WIDTH


@pytest.mark.parametrize("targets", [(ALL_LINEAR,), ("q_proj", "score")])
def test_adapters_of_the_head_of_tokens(targets: tuple[str, ...]) -> None:
    """Peft fails on them."""
    with pytest.raises(UsageError, match="has the head of a classifier of tokens in it"):
        Setup(objective=TOKEN, lora=Lora(rank=4, targets=targets))


@pytest.mark.parametrize(
    ("config", "choices", "said"),
    [
        (LLAMA, {"loss": "tiled"}, "not modelled as --loss tiled"),
        (LLAMA | {"model_type": "opt", "ffn_dim": 128}, {}, "not modelled for opt"),
        (BERT | {"model_type": "gpt2"}, {"objective": TOKEN}, "not modelled for gpt2"),
    ],
)
def test_what_is_refused(config: dict[str, Any], choices: dict[str, Any], said: str) -> None:
    """By name."""
    with pytest.raises(UsageError, match=said):
        estimator(config).memory(Setup(**{"objective": SEQUENCE, "seq_len": 64} | choices))
