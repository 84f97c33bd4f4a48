"""Rewards, odds ratios and smoothed labels, worked out by hand: what is kept, what is there, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.export.trainer import trainer_arguments
from memplan.memory.events import Sizes
from memplan.operators.sizes import allocated, bind
from memplan.planner.goal import target_from_tokens
from memplan.planner.levers import _changes
from memplan.specs.adapter import Lora
from memplan.specs.choices import setup_fields
from memplan.specs.evaluation import Evaluation
from memplan.specs.records import parse_setup, setup_record
from memplan.specs.training import TRAINER_BY_OBJECTIVE, Setup

WIDTH, WORDS, LENGTH, PAIRS = 64, 1000, 100, 3
SEQUENCES = 2 * PAIRS
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": WORDS,
    "num_labels": 5,
}
TAUGHT = {"objective": "distillation", "teacher": "another"}
SCALAR = 512
INT64 = 8


def estimator() -> Estimator:
    """A small Llama."""
    return Estimator(read_architecture(LLAMA, "config"), "llama")


def setup_of(**choices: Any) -> Setup:
    """Three pairs, or sequences."""
    return Setup(**{"micro_batch_size": PAIRS, "seq_len": LENGTH} | choices)


def head_keeps(setup: Setup) -> int:
    """Bytes that all of the head keeps beyond its norm, with the hidden states that come in let go."""
    found = estimator()
    program, sizes = found.program(setup), found.sizes(setup)
    layout = program.layout
    rest = layout.head.after_pause
    tokens = setup.sequences_per_micro_batch * LENGTH
    hidden = 2 * tokens * WIDTH
    norm = allocated(2 * hidden) + allocated(4 * tokens) + 2 * allocated(hidden) - allocated(hidden)
    after = 0 if rest is None else sizes.extent(rest).net
    return int(sizes.extent(layout.head.forward).net + after) - norm


def test_what_rewards_keep() -> None:
    """Where each sequence ends; of each pair the difference of its scores; the loss."""
    rows = 2 * allocated(INT64 * SEQUENCES)
    assert head_keeps(setup_of(objective="reward")) == rows + allocated(2 * PAIRS) + SCALAR


def test_a_model_of_rewards_gives_one_score() -> None:
    """Whatever number of classes its config names."""
    body = estimator().program(setup_of()).states.num_parameters - WORDS * WIDTH
    assert estimator().program(setup_of(objective="reward")).states.num_parameters == body + WIDTH


def test_what_odds_keep() -> None:
    """All logits, the log-probabilities of the chosen half, three numbers a token, and some a pair."""
    logits = allocated(2 * SEQUENCES * LENGTH * WORDS)
    chosen = allocated(2 * PAIRS * (LENGTH - 1) * WORDS) + allocated(INT64 * PAIRS * (LENGTH - 1))
    tokens = SEQUENCES * (LENGTH - 1)
    of_tokens = 2 * allocated(4 * tokens) + allocated(INT64 * tokens) + allocated(tokens)
    of_sequences = allocated(INT64 * SEQUENCES)  # how many tokens have a label
    of_pairs = 2 * 5 * SCALAR + SCALAR  # log(1 - exp(x)) twice, the log odds
    loss = 2 * SCALAR  # its total weight
    assert head_keeps(setup_of(objective="orpo")) == logits + chosen + of_tokens + of_sequences + of_pairs + loss


def test_ids_of_pairs_are_put_together() -> None:
    """Six tensors come in; the ids of both in one tensor are kept by the embedding."""
    found = estimator()
    setup = setup_of(objective="orpo")
    program, sizes = found.program(setup), found.sizes(setup)
    one = allocated(INT64 * PAIRS * LENGTH)
    assert program.inputs(2).total(sizes) == 2 * 6 * one
    assert sizes[next(e for e in program.layout.stem.forward.events if e.sign > 0).size] == allocated(
        INT64 * SEQUENCES * LENGTH
    )


def test_what_smoothed_labels_keep() -> None:
    """Log-probabilities and their negative, the labels, which are ignored; the loss, what one sum is divided by."""
    tokens = PAIRS * (LENGTH - 1)
    of_words = 2 * allocated(2 * tokens * WORDS)
    assert (
        head_keeps(setup_of(label_smoothing=0.1))
        == of_words + allocated(INT64 * tokens) + allocated(tokens) + 2 * SCALAR
    )


def test_a_gradient_that_is_shown_takes_no_other() -> None:
    """In fp32 the sum's gradient is one number a token, to which nothing of all words is added in place."""
    found = estimator()
    setup = setup_of(label_smoothing=0.1, precision="fp32")
    words = 4 * PAIRS * (LENGTH - 1) * WORDS
    sizes = Sizes(bind(PAIRS, LENGTH))
    segment = found.program(setup).layout.head.backward()[0]
    made = [e for e in segment.events if e.sign > 0 and sizes[e.size] == allocated(words)]
    assert [e.row.tensor for e in made] == [
        "gradient from gather",
        "sum of gradients",
        "gradient from neg",
        "gradient from log_softmax",
    ]


@pytest.mark.parametrize("objective", ["orpo", "reward"])
def test_defaults(objective: str) -> None:
    """TRL's trainers of pairs switch dropout off and have one loss."""
    assert setup_fields({"objective": objective}) == {"objective": objective, "loss": "full", "dropout": 0.0}


def test_a_setup_with_smoothing_is_read_back() -> None:
    """A record says how labels were smoothed; one of before says nothing and means none."""
    setup = setup_of(label_smoothing=0.2)
    record = setup_record(setup)
    assert parse_setup(record) == setup
    del record["label_smoothing"]
    assert parse_setup(record).label_smoothing == 0.0


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        ("dpo", "DPOConfig"),
        ("orpo", "ORPOConfig"),
        ("reward", "RewardConfig"),
        ("distillation", "GKDConfig"),
        ("lm", "TrainingArguments"),
    ],
)
def test_the_class_of_arguments(objective: str, config: str) -> None:
    """Each trainer of TRL has its own; its sequences are not cut at 1024 tokens, and dropout is as asked for."""
    loss = "tiled" if objective == "dpo" else "full"
    teacher = "another" if objective == "distillation" else None
    found = trainer_arguments(setup_of(objective=objective, loss=loss, dropout=0.0, teacher=teacher))
    assert found is not None
    assert found["config"] == config
    assert ("max_length" in found["arguments"]) == (objective != "lm")
    assert "disable_dropout" not in found["arguments"]
    kept = trainer_arguments(setup_of(objective=objective, loss=loss, teacher=teacher))
    assert kept is not None
    assert kept["arguments"].get("disable_dropout") == (None if objective == "lm" else False)


@pytest.mark.parametrize(
    ("choices", "versions"),
    [
        ({"loss": "tiled"}, "TRL from 1.15 on"),
        ({"loss": "chunked"}, "TRL 1.7 to 1.14"),
        ({"loss": "full", "batching": "padding-free"}, "TRL up to 1.6"),
    ],
)
def test_losses_and_batches_of_trl(choices: dict[str, Any], versions: str) -> None:
    """What transformers' Trainer has not is SFTTrainer's, in the versions that do it like this."""
    found = trainer_arguments(setup_of(**choices))
    assert found is not None
    assert (found["config"], found["versions"]) == ("SFTConfig", versions)
    assert found["arguments"]["max_length"] == setup_of().seq_len
    assert found["arguments"].get("padding_free", False) == ("batching" in choices)


def test_the_factor_in_the_arguments() -> None:
    """As TrainingArguments calls it."""
    found = trainer_arguments(setup_of(label_smoothing=0.1))
    assert found is not None
    assert found["arguments"]["label_smoothing_factor"] == 0.1


@pytest.mark.parametrize(
    "choices",
    [
        {"objective": "orpo"},
        {"objective": "reward"},
        TAUGHT,
        {"label_smoothing": 0.1},
        {"objective": "sequence-classification"},
    ],
)
def test_levers_that_there_are(choices: dict[str, Any]) -> None:
    """GIVEN an objective with one loss THEN no lever takes another, and none is refused."""
    changes = list(_changes(setup_of(**choices)))
    assert changes
    assert not [change for change in changes if change.flag.startswith("--loss")]


def test_a_target_in_tokens_counts_both_sequences_of_a_pair() -> None:
    """8,192 tokens are four pairs of two sequences of 1,024."""
    setup = Setup(objective="reward", seq_len=1024)
    target = target_from_tokens(8192, setup.tokens_per_example, 1)
    assert target.global_batch_size == 4
    assert (
        target.rounding(setup.tokens_per_example, "pair") == "8,192 tokens are 4 pairs of 2,048: 8,192 tokens, exactly"
    )


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"objective": "orpo", "loss": "tiled"}, "orpo is not modelled as --loss tiled"),
        ({"objective": "reward", "loss": "chunked"}, "reward is not modelled as --loss chunked"),
        ({"objective": "reward", "lora": Lora(rank=4)}, "Adapters of a reward model"),
        ({"objective": "orpo", "lora": Lora(rank=4, dropout=0.1)}, "ORPOTrainer switches dropout off"),
        ({"objective": "reward", "evaluation": Evaluation()}, "What the trainer evaluates for reward"),
        ({"objective": "dpo", "loss": "tiled", "evaluation": Evaluation()}, "What the trainer evaluates for dpo"),
        ({**TAUGHT, "evaluation": Evaluation()}, "What the trainer evaluates for distillation"),
        ({**TAUGHT, "batching": "padding-free"}, "own loss, not for distillation"),
        ({**TAUGHT, "label_smoothing": 0.1}, "not for --objective distillation"),
        ({"label_smoothing": 0.1, "loss": "fused"}, "--loss fused has none"),
        ({"label_smoothing": 0.1, "loss": "full-kept"}, "--loss full-kept has none"),
        ({"label_smoothing": 0.1, "objective": "orpo"}, "not for --objective orpo"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"label_smoothing": True}, "label_smoothing is True"),
    ],
)
def test_what_is_refused(choices: dict[str, Any], said: str) -> None:
    """By name."""
    with pytest.raises(UsageError, match=said):
        setup_of(**choices)


def test_the_trainers_of_trl() -> None:
    """Pairs and students have trainers of TRL's."""
    assert set(TRAINER_BY_OBJECTIVE) == {"dpo", "dpo-precomputed", "orpo", "reward", "distillation"}
