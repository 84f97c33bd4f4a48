"""Accumulation beyond the usual: how far sums of gradients can be off, and what makes it shorter."""

from __future__ import annotations

import pytest
import torch

import memplan
from memplan.planner.long_accumulation import USUAL_STEPS, largest_error
from memplan.report.document import plan_document
from memplan.report.long_accumulation import shorter_rows, why_words

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16}


def worst_error(steps: int, dtype: str) -> float:
    """Of sums of random terms, and of equal ones, by the sum of their sizes, in the dtype."""
    terms = torch.randn((steps, 512), generator=torch.Generator().manual_seed(0))
    terms[:, 256:] = 1.00390625  # one and a bit: from 256 on bf16 has steps of two
    terms = terms.to(TORCH[dtype])
    total = terms[0].clone()
    for one in terms[1:]:
        total += one
    exact = terms.double().sum(0)
    return float(((total.double() - exact).abs() / terms.double().abs().sum(0)).max())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("steps", [2, 16, 32, 64, 200])
def test_sums_in_half_precision_stay_within_the_bound(steps: int, dtype: str) -> None:
    most = largest_error(steps, dtype)
    assert most is not None
    assert worst_error(steps, dtype) <= most


def test_the_bound_is_the_one_of_the_book() -> None:
    """32 terms in bf16: 31/256 / (1 - 31/256) = 31/225; from 257 on there is none."""
    assert largest_error(32, "bf16") == pytest.approx(31 / 225)
    assert largest_error(257, "bf16") is None
    assert largest_error(32, "fp16") == pytest.approx(31 / 2017)
    assert largest_error(10**6, "fp32") is None
    assert largest_error(1, "bf16") is None


def test_equal_terms_stop_adding_up_in_bf16() -> None:
    """The case that the warning is about: of 1,024 equal gradients a sum in bf16 keeps a fourth."""
    assert worst_error(1024, "bf16") > 0.7


def test_what_is_named_shortens_it() -> None:
    """Each way, asked for, is a plan that fits with the usual steps, and the same batch."""
    plan = memplan.suggest("qwen2.5-1.5b", gpu="24GB", target_batch=32)
    found = plan.long_accumulation
    assert found is not None and found.steps == 32 and found.dtype == "bf16"
    asked = {
        "--micro-batch 2": {"micro_batch": 2},
        "--loss fused --micro-batch 2": {"micro_batch": 2, "loss": "fused"},
        "--loss tiled --micro-batch 2": {"micro_batch": 2, "loss": "tiled"},
        "--gpus 2": {"gpus": 2},
    }
    assert [way.options for way in found.ways] == list(asked)
    for way in found.ways:
        other = memplan.suggest("qwen2.5-1.5b", gpu="24GB", target_batch=32, **asked[way.options])
        assert other.best is not None
        setup = other.best.setup
        assert setup.gradient_accumulation_steps == way.candidate.setup.gradient_accumulation_steps <= USUAL_STEPS
        assert setup.global_batch_size == 32
        assert way.candidate.step_time.total_s <= other.best.step_time.total_s  # as replayed it may not be faster
        assert other.long_accumulation is None


def test_nothing_is_said_up_to_the_usual() -> None:
    plan = memplan.suggest("qwen2.5-1.5b", gpu="24GB", target_batch=USUAL_STEPS)
    assert plan.best is not None and plan.best.setup.gradient_accumulation_steps == USUAL_STEPS
    assert plan.long_accumulation is None
    assert why_words(plan_document(plan)) == ""


def test_a_split_that_was_fixed_is_freed() -> None:
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=64, micro_batch=1, seq_len=256)
    assert plan.long_accumulation is not None
    assert plan.long_accumulation.ways[0].options == "--micro-batch 4"


def test_adapters_in_fp32_add_up_exactly_enough() -> None:
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=64, micro_batch=1, seq_len=256, lora_rank=8)
    found = plan.long_accumulation
    assert found is not None and found.dtype == "fp32" and found.rounding is None
    document = plan_document(plan)
    assert "sums" not in why_words(document)
    change, price = shorter_rows(document)[0]
    assert change == "--micro-batch 4" and price.startswith("16, at least")


def test_more_gpus_are_named_as_such() -> None:
    """A card that was asked for with its number takes no --gpus beside it."""
    plan = memplan.suggest("gpt2", gpu="2xrtx4090", target_batch=128, accumulation=64, seq_len=256)
    assert [change for change, _ in shorter_rows(plan_document(plan))][-2:] == ["8 GPUs", "a smaller --target-batch"]


def test_nothing_bounds_a_very_long_sum() -> None:
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=512, micro_batch=1, seq_len=256)
    why = why_words(plan_document(plan))
    assert "512 accumulation steps" in why and "in bf16 can be off by any amount" in why


def test_so_many_gpus_that_nobody_has_them_are_not_named() -> None:
    """977 is prime: 977 times as many GPUs are no answer."""
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=977, accumulation=977, seq_len=256)
    assert not any("GPUs" in change for change, _ in shorter_rows(plan_document(plan)))
