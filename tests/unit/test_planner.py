"""Goals, splits and plans, with the numbers of the worked examples."""

from __future__ import annotations

import pytest

import memplan
from memplan.errors import UsageError
from memplan.planner.goal import Goal, Target, target_from_tokens
from memplan.specs.evaluation import Evaluation
from memplan.specs.training import Setup, checkpointed_layers

GIB = 2**30


@pytest.mark.parametrize(
    ("micro", "steps", "ranks", "batch"), [(3, 2, 3, 18), (2, 1, 3, 6), (4, 4, 2, 32), (8, 4, 1, 32), (16, 4, 1, 64)]
)
def test_the_batch_is_the_product(micro: int, steps: int, ranks: int, batch: int) -> None:
    """micro-batch x accumulation x GPUs, and the split is found again from the batch and the micro-batch."""
    setup = Setup(micro_batch_size=micro, gradient_accumulation_steps=steps, data_parallel_size=ranks)
    assert setup.global_batch_size == batch
    goal = Goal(setup=Setup(data_parallel_size=ranks), target=Target(batch), usable_bytes=GIB, micro_batch_size=micro)
    assert list(goal.splits()) == [(micro, steps)]


def test_tokens_of_a_micro_batch() -> None:
    """12 sequences of 1,024 tokens are 12,288, of 512 they are 6,144."""
    assert Setup(micro_batch_size=12, seq_len=1024).tokens_per_micro_batch == 12_288
    assert Setup(micro_batch_size=12, seq_len=512).tokens_per_micro_batch == 6_144


def test_splits_of_32() -> None:
    """All divisors, the largest micro-batch first."""
    goal = Goal(setup=Setup(), target=Target(32), usable_bytes=GIB)
    assert list(goal.splits()) == [(32, 1), (16, 2), (8, 4), (4, 8), (2, 16), (1, 32)]


def test_four_million_tokens_are_rounded_aloud() -> None:
    """4M tokens of 2,048 are 1,953.1 sequences: 1,953, or 1,952 for eight GPUs, and the rounding is said."""
    assert target_from_tokens(4_000_000, 2048, 1).global_batch_size == 1953
    target = target_from_tokens(4_000_000, 2048, 8)
    assert target.global_batch_size == 1952
    said = target.rounding(2048)
    assert said is not None
    assert "3,997,696 tokens" in said
    assert "2,304 fewer" in said
    assert Target(32).rounding(2048) is None


@pytest.mark.parametrize(
    ("target", "ranks", "fixed", "near"),
    [
        (32, 3, {}, ("30", "33")),
        (2, 4, {}, ("4",)),
        (10, 1, {"micro_batch_size": 3}, ("9", "12")),
        (10, 1, {"gradient_accumulation_steps": 4}, ("8", "12")),
        (10, 2, {"micro_batch_size": 2, "gradient_accumulation_steps": 2}, ("8",)),
    ],
)
def test_batches_that_cannot_be_reached(target: int, ranks: int, fixed: dict[str, int], near: tuple[str, ...]) -> None:
    """Refused with the nearest that can; contradictory options are both named."""
    with pytest.raises(UsageError) as fault:
        Goal(setup=Setup(data_parallel_size=ranks), target=Target(target), usable_bytes=GIB, **fixed)  # type: ignore[arg-type]
    assert all(number in fault.value.cure for number in near)


def test_a_target_of_32_that_fits_8_at_a_time() -> None:
    """The card is made so that 8 sequences fit and 16 do not: 8 x 4 accumulation steps."""
    at = {b: memplan.estimate("gpt2", micro_batch=b, accumulation=2, seq_len=512) for b in (8, 16)}
    usable = (at[8].memory.peak_process_bytes + at[16].memory.peak_process_bytes) // 2
    plan = memplan.suggest(
        "gpt2", gpu=f"{usable / 10**9:.4f}GB", target_batch=32, seq_len=512, checkpointing="none", headroom=0
    )
    assert plan.best is not None
    assert (plan.best.setup.micro_batch_size, plan.best.setup.gradient_accumulation_steps) == (8, 4)
    assert plan.rejections[0].candidate.setup.micro_batch_size == 16
    assert plan.rejections[0].candidate.short_by_bytes > 0
    assert len(plan.to_pandas()) == 1 + len(plan.alternatives)


def test_nothing_fits() -> None:
    """An 8 B model on 24 GB is a plan without a best candidate, with the nearest and what it lacks."""
    plan = memplan.suggest("llama-3-8b", gpu="24GB", target_batch=32)
    assert plan.best is None
    assert plan.nearest is not None
    assert plan.nearest.short_by_bytes > 30 * GIB


def test_ways_out_of_mixed_precision() -> None:
    """Qwen2.5-1.5B in mixed precision does not fit 24 GB; in bf16 it does, and that is offered."""
    plan = memplan.suggest("qwen2.5-1.5b", gpu="24GB", target_batch=32, precision="bf16-mixed")
    assert plan.best is None
    assert ["--precision bf16"] in [[lever.flag for lever in way.levers] for way in plan.ways_out]


def test_checkpointed_layers() -> None:
    """every-N checkpoints layers 0, N, 2N, ... as transformers' every_n_layers does."""
    assert checkpointed_layers("every-2", 5) == ("full", "none", "full", "none", "full")
    assert checkpointed_layers("selective", 2) == ("selective", "selective")


@pytest.mark.parametrize(
    "wrong",
    [
        {"micro_batch_size": 0},
        {"micro_batch_size": -1},
        {"micro_batch_size": 1.5},
        {"micro_batch_size": True},
        {"seq_len": 10**10},
        {"precision": "fp8"},
        {"optimizer": "adamm"},
        {"activation_checkpointing": "every-0"},
        {"activation_checkpointing": "every-x"},
        {"attention": "flesh"},
        {"dropout": 1.0},
        {"dropout": float("nan")},
    ],
)
def test_setups_that_have_no_meaning(wrong: dict[str, object]) -> None:
    """Each is a usage error with a cause and a cure."""
    with pytest.raises(UsageError) as fault:
        Setup(**wrong)  # type: ignore[arg-type]
    assert fault.value.cause
    assert fault.value.cure


@pytest.mark.parametrize("objective", ["sequence-classification", "token-classification"])
def test_levers_that_the_objective_does_not_have_are_left_out(objective: str) -> None:
    """GIVEN classes in place of words, THEN no loss of words is a lever, where it fits and where it does not."""
    for gpu in ("24GB", "1GB"):
        plan = memplan.suggest("bert-base-uncased", gpu=gpu, target_batch=64, objective=objective)
        assert not [lever for lever in plan.levers if "--loss" in lever.flag]
        assert (plan.best is None) == (gpu == "1GB")


def test_offloading_leaves_only_checkpointing_to_choose_from() -> None:
    plan = memplan.suggest("qwen3-0.6b", gpu="24GB", target_batch=8, offload="activations")
    assert plan.best is not None
    assert plan.best.setup.activation_checkpointing not in {"none", "selective"}
    assert not [lever for lever in plan.levers if lever.flag == "--checkpointing none"]


def test_an_evaluation_that_is_the_peak_has_levers() -> None:
    """GIVEN an evaluation that takes more than the step THEN a smaller batch of it is among the ways to need less."""
    plan = memplan.suggest("qwen2.5-0.5b", gpu="24GB", target_batch=1, seq_len=512, eval_batch=16, eval_samples=64)
    levers = {lever.flag: lever for lever in plan.levers}
    for flag in ("--eval-batch 1", "--eval-accumulation 1"):
        assert levers[flag].delta_bytes < 0
        assert levers[flag].delta_step_time_s == 0


def test_two_changes_of_one_evaluation_are_a_way_out() -> None:
    """GIVEN an evaluation far above the card WHEN both of its levers are needed THEN they are found together."""
    plan = memplan.suggest(
        "qwen2.5-1.5b", gpu="16GB", target_batch=16, lora_rank=16, eval_batch=8, eval_samples=20, label_smoothing=0.1
    )
    assert plan.nearest is not None
    assert plan.nearest.setup.micro_batch_size == 1
    way = plan.ways_out[0]
    assert sorted(lever.flag for lever in way.levers) == ["--eval-accumulation 1", "--eval-batch 1"]
    assert way.candidate.fits
    assert way.candidate.setup.evaluation == Evaluation(batch=1, samples=20, accumulation=1)


def test_a_lever_is_priced_in_tensors() -> None:
    """GIVEN a lever, THEN its bytes are those of an estimate of the setup with it."""
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=32)
    assert plan.best is not None
    for lever in plan.levers:
        assert lever.delta_bytes == (
            lever.candidate.memory.peak_allocated_bytes - plan.best.memory.peak_allocated_bytes
        ), lever.flag
