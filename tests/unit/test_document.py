"""Answers as plain data: nothing is lost, added up wrongly or rounded on the way."""

from __future__ import annotations

import json

import pytest

import memplan
from memplan.catalog.gpus import parse_gpu, read_gpus
from memplan.export.trainer import trainer_arguments
from memplan.planner.goal import Target
from memplan.report.cards import cards_that_hold
from memplan.report.document import estimate_document, options_of, plan_document
from memplan.specs.adapter import Lora
from memplan.specs.evaluation import Evaluation
from memplan.specs.training import Setup


@pytest.fixture(scope="module")
def estimate():
    return memplan.estimate("gpt2", gpu="rtx4090", micro_batch=4, accumulation=2, seq_len=512)


@pytest.fixture(scope="module")
def plan():
    return memplan.suggest("qwen2.5-0.5b", gpu="24GB", target_batch=32)


@pytest.fixture(scope="module")
def no_plan():
    return memplan.suggest("llama-3-8b", gpu="24GB", target_batch=32)


def test_the_rows_add_up_to_the_process(estimate) -> None:
    document = estimate_document(estimate)
    assert sum(row["bytes_at_peak"] for row in document["ledger"]) == document["peak_process_bytes"]


def test_a_document_is_json(estimate, plan, no_plan) -> None:
    """There and back again, and nothing has changed."""
    for document in (estimate_document(estimate), plan_document(plan), plan_document(no_plan)):
        assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_products_of_a_setup(estimate) -> None:
    """4 x 2 x 1 = 8 sequences of 512 tokens."""
    setup = estimate_document(estimate)["setup"]
    assert setup["global_batch_size"] == 8
    assert setup["tokens_per_micro_batch"] == 2048
    assert setup["tokens_per_step"] == 4096


def test_what_is_spare(estimate) -> None:
    """Usable bytes = process + headroom asked for + what is spare."""
    document = estimate_document(estimate)
    usable = document["gpu"]["usable_bytes"]
    assert document["upper_bound_bytes"] == document["peak_process_bytes"] + int(usable * 5 / 100)
    assert document["headroom_bytes"] == usable - document["upper_bound_bytes"]
    assert document["fits"] is True


def test_a_reserve_comes_on_top_of_the_headroom() -> None:
    """A plan and an estimate of its best agree, with a reserve too."""
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=8, reserve="1GiB")
    assert plan.best is not None
    best = plan_document(plan)["best"]
    assert best["upper_bound_bytes"] == best["peak_process_bytes"] + 1_200_000_000 + 2**30
    assert best["headroom_bytes"] == 24_000_000_000 - best["upper_bound_bytes"]
    assert plan.estimate.headroom_bytes == best["headroom_bytes"]


def test_without_a_gpu_nothing_is_said_about_fitting() -> None:
    document = estimate_document(memplan.estimate("gpt2"))
    assert [document[key] for key in ("gpu", "fits", "headroom_bytes", "step_time_s")] == [None] * 4


def test_nothing_is_calibrated(estimate, plan) -> None:
    assert estimate_document(estimate)["confidence"] == 0
    assert plan_document(plan)["confidence"] == 0


def test_a_plan_that_fits(plan) -> None:
    document = plan_document(plan, origin="as asked for")
    assert document["fits"]
    assert document["nearest"] is None
    assert document["ways_out"] == document["cards"] == []
    assert document["best"]["setup"]["global_batch_size"] == document["target"]["global_batch_size"] == 32
    assert document["speed_source"] == "GeForce RTX 4090"


def test_a_plan_without_a_best(no_plan) -> None:
    document = plan_document(no_plan)
    assert not document["fits"]
    assert document["best"] is document["trainer"] is None
    assert document["nearest"]["headroom_bytes"] < 0
    assert document["assumptions"]
    assert min(one["short_by_bytes"] for one in document["rejections"]) == -document["nearest"]["headroom_bytes"]


def test_the_smallest_cards_first(no_plan) -> None:
    """GIVEN a configuration that 24 GB do not hold, THEN the cards that do come smallest first, none left out."""
    gpus = list(read_gpus().values())
    cards = cards_that_hold(no_plan.nearest, no_plan.goal, gpus)
    sizes = [card["usable_bytes"] for card in cards]
    assert sizes == sorted(sizes)
    assert all(card["headroom_bytes"] >= 0 for card in cards)
    smaller = [gpu for gpu in gpus if gpu.usable_bytes < sizes[0]]
    assert cards_that_hold(no_plan.nearest, no_plan.goal, smaller) == []


def test_no_card_is_no_card(no_plan) -> None:
    assert cards_that_hold(no_plan.nearest, no_plan.goal, [parse_gpu("24GB")[1]]) == []


def test_a_target_in_tokens(estimate) -> None:
    document = estimate_document(estimate, target=Target(8, target_tokens=4000))
    assert document["target"]["rounding"] == "4,000 tokens are 8 sequences of 512: 4,096 tokens, 96 more"


# -- assumptions -------------------------------------------------------------------------------------------------------


def assumed(answer) -> dict:
    return {one["what"]: one for one in estimate_document(answer)["assumptions"]}


def test_states_are_in_the_dtype_of_the_parameters() -> None:
    """fp32 states and an fp32 copy of N parameters are 4 N bytes more each than bf16 states and no copy."""
    answer = memplan.estimate("qwen2.5-0.5b")
    found = assumed(answer)
    assert found["optimizer states"]["effect_bytes"] == answer.optimizer_state_bytes
    assert found["master weights"]["effect_bytes"] == 4 * 494_032_768
    assert "bf16" in found["optimizer states"]["value"]


@pytest.mark.parametrize("micro_batch", [1, 8])
@pytest.mark.parametrize(
    ("what", "otherwise"),
    [
        ("AdamW kernel", {"optimizer": "adamw-fused"}),
        ("attention", {"attention": "eager"}),
        ("gradients", {"accumulation": 2}),
    ],
)
def test_an_effect_is_the_difference_of_two_peaks(what: str, otherwise: dict, micro_batch: int) -> None:
    """What an assumption says is what estimating the other case gives (its scalar steps aside)."""
    here = memplan.estimate("gpt2", micro_batch=micro_batch)
    there = memplan.estimate("gpt2", micro_batch=micro_batch, **otherwise)
    difference = there.memory.peak_allocated_bytes - here.memory.peak_allocated_bytes
    scalars = 512 * 148 if what == "AdamW kernel" else 0
    assert abs(assumed(here)[what]["effect_bytes"] - difference) <= scalars


def test_a_temporary_below_the_peak_moves_nothing() -> None:
    """GIVEN the loss is the highest instant, THEN the optimizer's temporaries change nothing."""
    answer = memplan.estimate("gpt2", micro_batch=8)
    assert answer.peak_instant == "loss"
    assert assumed(answer)["AdamW kernel"]["effect_bytes"] == 0


def test_autocast_has_a_cache() -> None:
    assert "autocast's cache" in assumed(memplan.estimate("gpt2", precision="bf16-mixed"))
    assert "autocast's cache" not in assumed(memplan.estimate("gpt2", precision="bf16"))


def test_the_largest_effect_first(estimate) -> None:
    effects = [abs(one["effect_bytes"] or 0) for one in estimate_document(estimate)["assumptions"]]
    assert effects == sorted(effects, reverse=True)


def test_grouped_queries_in_fp32_are_a_caveat() -> None:
    """CUDA's kernel for fp32 takes no grouped queries; GPT-2 has none."""
    caveat = "scores of grouped-query attention in fp32"
    of = {
        (model, precision): {what for what, _ in memplan.estimate(model, precision=precision).unmodelled}
        for model in ("llama-3-8b", "gpt2")
        for precision in ("fp32", "bf16")
    }
    assert [key for key, whats in of.items() if caveat in whats] == [("llama-3-8b", "fp32")]


# -- options of others -------------------------------------------------------------------------------------------------


def test_options_of_a_setup() -> None:
    """Only what differs is an option."""
    large = Setup(micro_batch_size=8)
    small = Setup(micro_batch_size=2, gradient_accumulation_steps=4, activation_checkpointing="every-2")
    assert options_of(small, beside=large) == "--micro-batch 2 --accumulation 4 --checkpointing every-2"
    assert options_of(small, beside=small) == ""
    full = Setup(micro_batch_size=8, activation_checkpointing="full")
    assert options_of(full, beside=large) == "--checkpointing full"


def test_a_target_that_hardly_divides_is_said_to() -> None:
    """GIVEN 2 x 977 sequences, 977 being prime, THEN a target of 2 x 976 is offered; 2 x 976 itself is fine."""
    said = {
        batch: plan_document(memplan.suggest("gpt2", gpu="2x24GB", target_batch=batch))["target"]["coarseness"]
        for batch in (1954, 1952, 14)
    }
    assert said[1952] is said[14] is None
    assert "--target-batch 1952" in said[1954]


def test_pure_bf16_is_no_autocast() -> None:
    """`bf16=True` is autocast; pure bf16 is the dtype that the model is loaded in."""
    pure = trainer_arguments(Setup(precision="bf16"))
    mixed = trainer_arguments(Setup(precision="bf16-mixed"))
    assert (pure["dtype"], pure["arguments"]["bf16"]) == ("bfloat16", False)
    assert (mixed["dtype"], mixed["arguments"]["bf16"]) == ("float32", True)


def test_checkpointing_of_the_trainer() -> None:
    full = trainer_arguments(Setup(activation_checkpointing="full"))["arguments"]
    every = trainer_arguments(Setup(activation_checkpointing="every-3"))["arguments"]
    assert full["activation_checkpointing"] is True
    assert "activation_checkpointing_kwargs" not in full
    assert every["activation_checkpointing_kwargs"] == {"every_n_layers": 3}
    assert trainer_arguments(Setup(activation_checkpointing="selective")) is None


def test_checkpointing_that_keeps_attention_is_of_trl() -> None:
    kept = trainer_arguments(Setup(activation_checkpointing="save-attention", loss="tiled"))
    assert (kept["config"], kept["versions"]) == ("SFTConfig", "TRL 1.16")
    assert kept["arguments"]["activation_checkpointing_kwargs"] == {"selective": True}
    assert trainer_arguments(Setup(activation_checkpointing="save-attention")) is None


def test_evaluation_in_the_arguments() -> None:
    evaluation = Evaluation(batch=4, samples=100, accumulation=2)
    arguments = trainer_arguments(Setup(evaluation=evaluation))["arguments"]
    assert arguments["per_device_eval_batch_size"] == 4
    assert arguments["eval_accumulation_steps"] == 2
    assert "per_device_eval_batch_size" not in trainer_arguments(Setup())["arguments"]


def test_generation_in_the_arguments() -> None:
    """Seq2SeqTrainer generates, behind 100 tokens of a prompt; TRL's trainers do not."""
    evaluation = Evaluation(batch=4, generate=28)
    found = trainer_arguments(Setup(seq_len=100, evaluation=evaluation))
    assert found["config"] == "Seq2SeqTrainingArguments"
    assert found["arguments"]["predict_with_generate"] is True
    assert found["arguments"]["generation_max_length"] == 128
    assert trainer_arguments(Setup(loss="tiled", evaluation=evaluation)) is None


def test_how_a_model_is_made_ready() -> None:
    """What no class of arguments says: the adapters' dtype, the casts of k-bit training, dropout of the config."""
    lora = Lora(rank=8, dtype="base")
    made = trainer_arguments(Setup(lora=lora, quantize="nf4", upcast=True, dropout=0.0))
    assert (made["adapters_as_base"], made["upcast"], made["dropout"]) == (True, True, 0.0)
    usual = trainer_arguments(Setup(lora=Lora(rank=8), quantize="nf4"))
    assert (usual["adapters_as_base"], usual["upcast"], usual["dropout"]) == (False, False, None)


def test_what_the_trainer_does_not_offer() -> None:
    assert trainer_arguments(Setup(optimizer="adamw-forloop")) is None
