"""Preference optimisation, worked out by hand: what is kept, what a reference adds, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.estimation.grid import estimate_grid
from memplan.estimation.step import REFERENCE, run_without_graph
from memplan.memory.events import Sizes
from memplan.operators.sizes import allocated, bind
from memplan.specs.adapter import Lora
from memplan.specs.choices import dropout_of, setup_fields
from memplan.specs.training import LOSSES_BY_OBJECTIVE, OBJECTIVES, PAIRED, Setup

WIDTH, WORDS, LENGTH, PAIRS = 64, 40000, 256, 3
SEQUENCES = 2 * PAIRS
PREDICTING = SEQUENCES * (LENGTH - 1)
SCALAR = 512
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": WORDS,
}
TILE_BYTES = 2 * PREDICTING * 32768


def estimator() -> Estimator:
    """A small Llama."""
    return Estimator(read_architecture(LLAMA, "config"), "llama")


def pairs(objective: str = "dpo", **choices: Any) -> Setup:
    """A setup of three pairs."""
    return Setup(**{"micro_batch_size": PAIRS, "seq_len": LENGTH, "loss": "tiled", "objective": objective} | choices)


def kept(setup: Setup) -> int:
    """Bytes kept for the backward pass."""
    found = estimator()
    return int(found.program(setup).peaks(found.sizes(setup), 1).kept_activation_bytes)


def test_a_micro_batch_counts_pairs() -> None:
    """GIVEN pairs THEN twice as many sequences run, and tokens are counted of both."""
    setup = pairs(gradient_accumulation_steps=2)
    assert setup.sequences_per_micro_batch == SEQUENCES
    assert setup.tokens_per_micro_batch == SEQUENCES * LENGTH
    assert (setup.global_batch_size, setup.tokens_per_step) == (2 * PAIRS, 2 * SEQUENCES * LENGTH)
    assert Setup(micro_batch_size=3).sequences_per_micro_batch == 3


def test_what_the_loss_keeps() -> None:
    """What a language model's tiled loss of as many sequences keeps, but for what it divides by, and a pair's margin.

    The one keeps ``num_items_in_batch`` clamped, 512 bytes; the other the input of log-sigmoid, three numbers.
    """
    plain = Setup(micro_batch_size=SEQUENCES, seq_len=LENGTH, loss="tiled")
    assert kept(pairs("dpo-precomputed")) == kept(plain) - SCALAR + allocated(4 * PAIRS)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_the_reference_leaves_nothing_behind(lora: Lora | None) -> None:
    """What is kept is the same with a reference as without."""
    assert kept(pairs("dpo", lora=lora)) == kept(pairs("dpo-precomputed", lora=lora))


def test_a_second_model_is_there_all_the_time() -> None:
    """GIVEN full fine-tuning THEN parameters and buffers are there twice, gradients and states once."""
    found, precomputed = estimator().estimate(pairs()), estimator().estimate(pairs("dpo-precomputed"))
    assert found.parameter_bytes == 2 * precomputed.parameter_bytes
    assert found.gradient_bytes == precomputed.gradient_bytes
    assert found.optimizer_state_bytes == precomputed.optimizer_state_bytes
    clip = {one.name: one.allocated_bytes for one in found.instants}["gradient clip"]
    other = {one.name: one.allocated_bytes for one in precomputed.instants}["gradient clip"]
    buffers = 2 * SCALAR  # inv_freq and original_inv_freq
    log_probabilities = 2 * SCALAR  # of the reference, chosen and rejected: inputs of the other
    assert clip - other == precomputed.parameter_bytes + buffers - log_probabilities


def test_adapters_need_no_second_model() -> None:
    """GIVEN adapters THEN the reference is the same model without them."""
    found = estimator().estimate(pairs(lora=Lora(rank=4)))
    assert found.parameter_bytes == estimator().estimate(pairs("dpo-precomputed", lora=Lora(rank=4))).parameter_bytes
    assert REFERENCE in {one.name for one in found.instants}


def test_the_high_point_of_a_run_without_a_graph() -> None:
    """The tile, seven numbers a token and the hidden states, gathered and not, beside what it found out."""
    setup = pairs()
    found = estimator()
    reference = found.program(setup).layout.companion
    assert reference is not None
    sizes = Sizes(bind(SEQUENCES, LENGTH))
    parts, let_go_later = run_without_graph(reference)
    assert not let_go_later
    assert {part.instant for part in parts} == {REFERENCE}
    live = highest = 0
    for part in parts:
        run = sizes.extent(part.segment).repeated(len(part.places))
        highest, live = max(highest, live + run.peak), live + run.net
    assert live == 0
    hidden = 2 * SEQUENCES * LENGTH * WIDTH
    gathered = 2 * PREDICTING * WIDTH
    mask, targets, number = PREDICTING, 8 * PREDICTING, allocated(4 * PREDICTING)
    results = 3 * number  # log-probability, log-sum-exp and its double
    tile = sum(map(allocated, (hidden, gathered, mask, targets, TILE_BYTES))) + 7 * number
    assert highest == tile + results


def test_a_grid_counts_pairs() -> None:
    """GIVEN several micro-batches THEN each is the estimate of as many pairs."""
    for objective in PAIRED:
        setup = pairs(objective, loss=LOSSES_BY_OBJECTIVE[objective][0])
        grid = estimate_grid(estimator(), setup, [1, 4], [64, 128])
        for b, s, peak in zip((1, 4), (64, 128), grid.peak_allocated_bytes.tolist(), strict=True):
            one = pairs(objective, micro_batch_size=b, seq_len=s, loss=LOSSES_BY_OBJECTIVE[objective][0])
            assert peak == estimator().memory(one).peak_allocated_bytes


def test_the_reference_takes_time() -> None:
    """GIVEN rates THEN a step with a reference takes the time of one forward pass more."""
    from memplan.catalog.gpus import read_gpu

    card = read_gpu("a100-80gb")
    timed = Estimator(read_architecture(LLAMA, "config"), "llama", card)
    with_it, without = timed.step_time(pairs()), timed.step_time(pairs("dpo-precomputed"))
    assert with_it is not None
    assert without is not None
    assert with_it.forward_s > 1.8 * without.forward_s
    assert with_it.backward_s == pytest.approx(without.backward_s)
    terms = timed.time_terms(pairs())
    assert terms is not None
    assert len(terms) > len(timed.time_terms(pairs("dpo-precomputed")) or ())


def test_defaults_of_an_objective() -> None:
    """DPOTrainer has a loss of its own and switches dropout off; what is given stays."""
    assert setup_fields({"objective": "dpo"}) == {"objective": "dpo", "loss": "tiled", "dropout": 0.0}
    assert setup_fields({"objective": "dpo", "dropout": 0.1})["dropout"] == 0.1
    assert setup_fields({"objective": "lm"}) == {"objective": "lm"}
    assert dropout_of({"objective": "dpo"}) == 0.0
    assert dropout_of({"dropout": 0.1, "objective": "dpo"}) == 0.1
    assert dropout_of({}) is None


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"loss": "full"}, "not modelled as --loss full"),
        ({"loss": "fused"}, "not modelled as --loss fused"),
        ({"lora": Lora(rank=4, dropout=0.1)}, "switches dropout off"),
        ({"objective": "ppo"}, "not known"),
    ],
)
def test_what_is_refused(choices: dict[str, Any], said: str) -> None:
    """By name."""
    with pytest.raises(UsageError, match=said):
        pairs(**choices)


def test_an_encoder_has_no_preferences() -> None:
    """DPO is of causal language models."""
    bert = LLAMA | {"model_type": "bert", "max_position_embeddings": 256, "type_vocab_size": 2}
    with pytest.raises(UsageError, match="trains causal language models"):
        Estimator(read_architecture(bert, "config"), "bert").memory(pairs())
    assert set(PAIRED) <= set(OBJECTIVES)
