"""What an evaluation keeps, and what saving and resuming take, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

import memplan
from memplan import UsageError
from memplan.architectures.registry import read_architecture
from memplan.estimation.between import saved_bytes, split_bytes
from memplan.estimation.estimate import Estimator
from memplan.estimation.generation import DECODING, PREFILL, Generation
from memplan.estimation.step import EVALUATION, GENERATION, INSTANTS
from memplan.operators.sizes import allocated
from memplan.specs.adapter import Lora
from memplan.specs.evaluation import Evaluation, evaluation_record, parse_evaluation
from memplan.specs.training import Setup
from memplan.specs.values import replace
from tests.laws.models import GPT2, LLAMA, MIXTRAL

WORDS, LENGTH = 1000, 64
BF16, FP32, INT64 = 2, 4, 8
LOGITS = LENGTH * WORDS
"""Numbers of one sequence."""


def estimator(config: dict = LLAMA) -> Estimator:
    return Estimator(read_architecture(config, "config"), "config")


def resident(setup: Setup, of: Estimator) -> int:
    """Parameters, buffers, states and the inputs of the step."""
    program = of.program(setup)
    tensors = program.resident(setup.gradient_accumulation_steps, with_states=True)
    return sum(x.total(of.sizes(setup)) for x in tensors)


def test_the_concatenation_by_hand() -> None:
    """42 sequences by 4: the container of 40, the last batch of 2, the next container of 42, and what is small."""
    of = estimator()
    setup = Setup(seq_len=LENGTH, evaluation=Evaluation(batch=4, samples=42))
    logits = [allocated(n * LOGITS * BF16) for n in (40, 2, 42)]
    labels = allocated(40 * LENGTH * INT64)
    inputs = 2 * allocated(2 * LENGTH * INT64)
    losses = allocated(42 * FP32) + allocated(2 * FP32)
    assert of.peaks(setup).by_instant[EVALUATION] == resident(setup, of) + sum(logits) + labels + inputs + losses


def test_one_batch_is_not_concatenated() -> None:
    """The loss of a batch needs its logits, their fp32 copy and log-softmax: as much as if nothing were kept."""
    of = estimator()
    setup = Setup(seq_len=LENGTH)
    kept = replace(setup, evaluation=Evaluation(batch=8, samples=8))
    alone = replace(setup, evaluation=Evaluation(batch=8))
    losses = allocated(8 * FP32)
    found = [of.peaks(one).by_instant[EVALUATION] for one in (kept, alone)]
    assert found[1] - found[0] == losses


@pytest.mark.parametrize(
    ("precision", "samples", "accumulation", "numbers"),
    [
        ("bf16", 10, None, (BF16 + FP32) * 10),
        ("bf16", 10, 1, 2 * FP32 * 10),
        ("bf16", 4, 1, (BF16 + FP32) * 4),
        ("fp16", 10, None, 2 * 10),
        ("fp16", 10, 2, 2 * 2 * 10),
        ("fp32", 10, None, FP32 * 10),
        ("bf16-mixed", 10, None, FP32 * 10),
        ("bf16-mixed", 10, 1, 2 * FP32 * 10),
    ],
)
def test_logits_on_the_host(precision: str, samples: int, accumulation: int | None, numbers: int) -> None:
    """NumPy has no bf16; what comes in parts is concatenated; autocast hands out fp32."""
    evaluation = Evaluation(batch=4, samples=samples, accumulation=accumulation)
    setup = Setup(seq_len=LENGTH, precision=precision, evaluation=evaluation)
    assert estimator().evaluation(setup, evaluation).host_bytes() == numbers * LOGITS


def test_nothing_is_kept_and_no_layer_is_dropped_out() -> None:
    recording = estimator(GPT2)._recordings.recording(Setup(seq_len=LENGTH), evaluation=True)
    for piece in recording.pieces():
        assert not any(op.keeps or op.pins for op in piece.tape.ops)
        assert not any(op.name == "dropout" for op in piece.tape.ops)


def test_the_peak_is_that_of_a_step_unless_an_evaluation_is_asked_for() -> None:
    plain = memplan.estimate("gpt2", seq_len=512)
    asked = memplan.estimate("gpt2", seq_len=512, eval_batch=8)
    row = next(one for one in plain.assumptions if one.what == EVALUATION)
    assert [one.name for one in plain.instants] == list(INSTANTS)
    assert [one.name for one in asked.instants] == [*INSTANTS, EVALUATION]
    assert asked.memory.peak_allocated_bytes - plain.memory.peak_allocated_bytes == row.effect_bytes > 0
    assert "more than the step" in row.value
    assert asked.peak_instant == EVALUATION


def test_moving_logits_early_is_the_way_out() -> None:
    """The effect that is said is that of the option that is named."""
    kept = memplan.estimate("gpt2", seq_len=128, eval_samples=400)
    moved = memplan.estimate("gpt2", seq_len=128, eval_samples=400, eval_accumulation=1)
    row = next(one for one in kept.assumptions if one.what == EVALUATION)
    assert row.otherwise == "--eval-accumulation 1"
    assert row.effect_bytes == moved.memory.peak_allocated_bytes - kept.memory.peak_allocated_bytes < 0


@pytest.mark.parametrize("choices", [{"eval_batch": 16}, {"eval_samples": 100}, {"eval_batch": 1}])
def test_the_rows_add_up(choices: dict) -> None:
    found = memplan.estimate("gpt2", seq_len=128, **choices)
    assert sum(row.bytes_at_peak for row in found.ledger) == found.memory.peak_process_bytes


def test_it_takes_no_more_with_checkpointing() -> None:
    of = estimator()
    setup = Setup(seq_len=LENGTH, evaluation=Evaluation())
    full = replace(setup, activation_checkpointing="full")
    assert of.peaks(setup).by_instant[EVALUATION] == of.peaks(full).by_instant[EVALUATION]


@pytest.mark.parametrize(
    ("choices", "cause"),
    [
        ({"eval_batch": 0}, "eval_batch is 0"),
        ({"eval_samples": 1.5}, "eval_samples is 1.5"),
        ({"eval_generate": 0}, "eval_generate is 0"),
        ({"eval_generate": 5}, "Generation is not modelled for gpt2"),
        ({"eval_accumulation": 2}, "none are kept"),
        ({"eval_samples": 8, "loss": "chunked"}, "--loss chunked has no logits"),
        ({"eval_samples": 8, "loss": "tiled"}, "--loss tiled has no logits"),
        ({"eval_samples": 8, "loss": "cut"}, "--loss cut has no logits"),
    ],
)
def test_refused(choices: dict, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        memplan.estimate("gpt2", **choices)


def test_as_json_and_back() -> None:
    evaluation = Evaluation(batch=3, samples=9, accumulation=2, generate=4)
    assert parse_evaluation(evaluation_record(evaluation)) == evaluation


# -- generation --------------------------------------------------------------------------------------------------------

KEY_VALUE = 2 * 2 * 16 * BF16
"""Bytes of keys and values of one token in one of the three layers."""


def generated(num: int, batch: int = 64, **choices: Any) -> Generation:
    chosen = Evaluation(batch=batch, generate=num)
    found = estimator().evaluation(Setup(seq_len=LENGTH, evaluation=chosen, **choices), chosen).generation
    assert found is not None
    return found


def test_the_cache_by_hand() -> None:
    """Before the last step it holds the prompt and all tokens but that of the step."""
    *_, last = generated(40).stages(64)
    assert last.name == DECODING
    assert last.cache.total(last.sizes) == 3 * 64 * KEY_VALUE * (LENGTH + 38)


def test_one_token_needs_the_prefill_alone() -> None:
    assert [stage.name for stage in generated(1).stages(4)] == [PREFILL]
    assert [stage.name for stage in generated(2).stages(4)] == [PREFILL, DECODING]
    assert [stage.name for stage in generated(3).stages(4)] == [PREFILL, DECODING, DECODING]


def test_a_window_limits_what_the_cache_holds() -> None:
    config = LLAMA | {"model_type": "mistral", "sliding_window": 32}
    chosen = Evaluation(batch=64, generate=200)
    of = estimator(config)
    found = of.evaluation(Setup(seq_len=LENGTH, evaluation=chosen), chosen).generation
    assert found is not None
    _, first, last = found.stages(64)
    number = 3 * 512
    assert first.cache.total(first.sizes) == 3 * 64 * KEY_VALUE * LENGTH + number  # the prompt is let go after it
    assert last.cache.total(last.sizes) == 3 * 64 * KEY_VALUE * 32 + number


def test_every_token_more_takes_more() -> None:
    of = estimator()
    heights = [
        of.peaks(Setup(seq_len=LENGTH, evaluation=Evaluation(batch=64, generate=num))).by_instant[GENERATION]
        for num in (1, 500, 1000, 1500)
    ]
    assert heights == sorted(heights)
    assert heights[3] - heights[2] == heights[2] - heights[1] > 3 * 64 * KEY_VALUE * 500


@pytest.mark.parametrize(("num", "samples"), [(5, None), (5, 100), (3000, 100)])
def test_the_rows_of_a_generation_add_up(num: int, samples: int | None) -> None:
    """Of an evaluation that is highest where tokens are generated, too; no row is negative."""
    found = memplan.estimate("qwen2.5-0.5b", seq_len=64, eval_generate=num, eval_samples=samples, loss="fused")
    assert sum(row.bytes_at_peak for row in found.ledger) == found.memory.peak_process_bytes
    assert all(row.num_bytes >= 0 for row in found.ledger)


@pytest.mark.parametrize(
    ("model", "choices", "cause"),
    [
        ("bert-base", {}, "does not generate"),
        ("deepseek-v2-lite", {}, "Generation is not modelled for deepseek_v2"),
        ("qwen2.5-0.5b", {"padding": True}, "padded prompts"),
        ("qwen2.5-0.5b", {"eval_generate": 40_000}, "positions"),
        ("qwen2.5-0.5b", {"objective": "dpo"}, "What the trainer evaluates for dpo"),
    ],
)
def test_no_generation(model: str, choices: dict, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        memplan.estimate(model, **({"seq_len": 64, "eval_generate": 5} | choices))


# -- saving and resuming -----------------------------------------------------------------------------------------------


def test_all_weights_are_saved_or_the_adapters_alone() -> None:
    of = estimator()
    setup = Setup(seq_len=LENGTH)
    assert saved_bytes(of.program(setup), setup) == BF16 * of.program(setup).states.num_parameters
    lora = replace(setup, lora=Lora(rank=4))
    assert saved_bytes(of.program(lora), lora) == FP32 * of.program(lora).states.num_trained


def test_experts_are_split_before_they_are_saved() -> None:
    """3 layers x 4 experts x (2 x 200) x 96 in bf16; of adapters' bases nothing is saved."""
    of = estimator(MIXTRAL)
    setup = Setup(seq_len=LENGTH)
    assert split_bytes(of.program(setup), setup) == 3 * 4 * 400 * 96 * BF16
    assert split_bytes(estimator().program(setup), setup) == 0
    lora = replace(setup, lora=Lora(rank=4, targets=("q_proj",)))
    assert split_bytes(of.program(lora), lora) == 0


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "once on the host"),
        ({"optimizer": "adamw-8bit"}, "twice on the host"),
        ({"gpus": 2}, "once on the device"),
        ({"optimizer": "sgd"}, "no states"),
    ],
)
def test_where_states_are_read_to(choices: dict, words: str) -> None:
    rows = memplan.estimate("gpt2", seq_len=128, **choices).assumptions
    assert words in next(row.value for row in rows if row.what == "resuming")
