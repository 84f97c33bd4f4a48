"""What the texts say beside their numbers: which words stand where, and which are left out."""

from __future__ import annotations

import itertools
import json

import pytest

from memplan.report.layout import columns
from memplan.report.plan import REAL_SAVING

TRAINER = "suggest {} --gpu rtx4090 --target-batch 8 --seq-len 128 {}"


def words(text: str) -> str:
    return " ".join(text.split())


# -- the Trainer line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("gpt2", "--attention eager", "attn_implementation='eager'"),
        ("gpt2", "--attention flash", "attn_implementation='flash_attention_2'"),
        ("gpt2", "--optimizer adamw-forloop", "no key for the optimizer adamw-forloop"),
        ("gpt2", "--checkpointing selective", "no key for selective checkpointing"),
        ("gpt2", "--label-smoothing 0.1", "label_smoothing_factor=0.1"),
        ("gpt2", "--objective orpo", "ORPOConfig(per_device_train_batch_size="),
        ("gpt2", "--objective orpo", "activation_checkpointing=False"),
        ("gpt2", "--objective reward", "num_labels=1), RewardConfig("),
        ("gpt2", "--objective reward --dropout 0.1", "disable_dropout=False"),
        ("gpt2", "--objective dpo", "DPOConfig("),
        ("gpt2", "--objective dpo --checkpointing selective", "DPOConfig has no key for selective checkpointing"),
        ("gpt2", "--objective dpo-precomputed", "max_length=128, precompute_ref_log_probs=True"),
    ],
)
def test_the_trainer_line_says_what_is_not_the_default(run, model: str, options: str, said: str) -> None:
    assert said in words(run(TRAINER.format(model, options)).out)


@pytest.mark.parametrize("model", ["gpt2", "deberta-v3"])
def test_the_default_attention_is_not_spelt_out(run, model: str) -> None:
    """Eager is the default where transformers has no SDPA for the model."""
    out = run(TRAINER.format(model, "")).out
    assert "TrainingArguments(" in words(out)
    assert "attn_implementation" not in out


def test_the_kernel_of_adamw_is_compared_with_the_trainers(run) -> None:
    for optimizer in ("adamw", "adamw-fused"):
        text = words(run(f"estimate gpt2 --optimizer {optimizer}").out)
        assert "the Hugging Face Trainer's own default, adamw_torch_fused (transformers 5.23)" in text


# -- alternatives, levers, ways out ------------------------------------------------------------------------------------


def test_slower_plans_have_clearly_more_room(run) -> None:
    command = "suggest --gpu 24GB --target-batch 32"
    plan, text = json.loads(run(f"{command} --json").out), run(command).out
    shown = text.partition("Slower, with more room")[2].partition("\n\n")[0].splitlines()[2:]
    spare = [plan["best"]["headroom_bytes"] / 2**30, *(float(line.split()[4]) for line in shown)]
    assert shown
    least = REAL_SAVING * plan["gpu"]["usable_bytes"] / 2**30
    assert all(later - earlier >= least - 0.011 for earlier, later in itertools.pairwise(spare))


def test_sgd_is_the_last_lever(run) -> None:
    plan = json.loads(run("suggest qwen2.5-1.5b --gpu 24GB --target-batch 32 --precision bf16-mixed --json").out)
    flags = [lever["flag"] for lever in plan["levers"]]
    assert flags[-1] == "--optimizer sgd"
    sgd = ["--optimizer sgd " in f"{way['options']} " for way in plan["ways_out"]]
    assert sgd == sorted(sgd)


def test_no_way_out_is_no_list_of_options(run) -> None:
    text = run("suggest llama-3.1-405b --gpu 24GB --target-batch 8").out
    assert "no combination" in text
    assert "add these options" not in text


def test_what_the_loss_would_be_otherwise(run) -> None:
    assert "--loss tiled, TRL's from 1.15 on" in words(run("estimate gpt2").out)
    assert "all logits at once, as Trainer computes them" in words(run("estimate llama-3-8b --loss fused").out)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_one_and_many(run) -> None:
    text = words(run("suggest gpt2 --gpu t4 --target-batch 1 --seq-len 1").out)
    assert "target 1 sequence of 1 token = 1 token per step" in text
    text = words(run("suggest gpt2 --gpu t4 --target-tokens 1k").out)
    assert "1,000 tokens are 1 sequence of 1,024: 1,024 tokens, 24 more" in text


def test_huge_numbers_have_large_units(run) -> None:
    text = run("estimate gpt2 --micro-batch 1000000000 --accumulation 1000000000 --gpus 1000000000").out
    assert "ZiB" in text
    assert "e+" not in text
    assert "1,000,000,000 GPUs" in words(text)
    assert "micro 1,000,000,000 x accumulation 1,000,000,000 x" in words(text)


def test_what_rounds_to_nothing_has_no_bar(run) -> None:
    (rest,) = (line for line in run("estimate llama-3-8b").out.splitlines() if " 0 %" in line)
    assert "█" not in rest


def test_long_paths_keep_their_end() -> None:
    """The end of a path says which module it is."""
    path = "model.language_model.layers.*.self_attn.rotary_embedding.projection"
    ((module, *_),) = (line.split() for line in columns([(path, "x" * 30)], keep_end=True))
    assert module.startswith("..")
    assert module.endswith("rotary_embedding.projection")


# -- the card ----------------------------------------------------------------------------------------------------------


def test_what_torch_sees_is_not_known(run) -> None:
    cards = json.loads(run("gpus --json").out)["gpus"]
    starred = [card["name"] for card in cards if card["is_from_nvidia_smi"]]
    assert starred
    text = words(run(f"suggest gpt2 --gpu {starred[0]} --target-batch 1").out)
    assert f"{starred[0]} (" in text
    assert ": * " in text
    nothing = "suggest qwen2.5-1.5b --gpu 10GB --target-batch 32 --precision bf16-mixed"
    held = json.loads(run(f"{nothing} --json").out)["cards"]
    assert all(card["is_from_nvidia_smi"] == (card["name"] in starred) for card in held)
    assert ("nvidia-smi's total" in words(run(nothing).out)) == any(card["is_from_nvidia_smi"] for card in held)


@pytest.mark.parametrize(
    ("gpu", "precision", "warned"),
    [("t4", "bf16", True), ("t4", "bf16-mixed", True), ("t4", "fp16-mixed", False), ("a10", "bf16", False)],
)
def test_a_card_without_fast_units_for_the_precision(run, gpu: str, precision: str, warned: bool) -> None:
    for command in ("estimate gpt2", "suggest gpt2 --target-batch 1"):
        text = words(run(f"{command} --gpu {gpu} --precision {precision}").out)
        assert ("It has no fast units for bf16: say --precision fp16-mixed." in text) == warned


# -- assumptions -------------------------------------------------------------------------------------------------------


def test_the_buckets_of_several_gpus(run) -> None:
    def found(command: str) -> list[dict]:
        document = json.loads(run(f"{command} --json").out)
        return [one for one in document["assumptions"] if one["what"] == "DDP's buckets"]

    assert found("estimate gpt2") == []
    (one,) = found("estimate gpt2 --gpus 2 --accumulation 4")
    assert "gradient_as_bucket_view=True" in one["value"]
    assert one["effect_bytes"] < 0


def test_the_inputs_of_many_micro_batches(run) -> None:
    text = words(run("estimate gpt2 --accumulation 100000").out)
    assert "ids and labels of all 100,000 micro-batches are fetched at once: 1.53 GiB" in text
    assert "fetched at once" not in run("estimate gpt2 --accumulation 8").out


@pytest.mark.parametrize(
    ("model", "head"), [("bert", "with the head for masked tokens"), ("deberta-v3", "without a head"), ("gpt2", "")]
)
def test_which_head_is_estimated(run, model: str, head: str) -> None:
    line = words(run(f"estimate {model}").out.partition("setup")[0])
    assert head in line
    assert head or "head" not in line


@pytest.mark.parametrize(
    ("model", "tokens"), [("bert", 512), ("deberta-v3", 512), ("gpt2", 1024), ("llama-3-8b", 2048)]
)
def test_the_length_where_none_is_given(run, model: str, tokens: int) -> None:
    assert json.loads(run(f"estimate {model} --json").out)["setup"]["seq_len"] == tokens


# -- words on stderr ---------------------------------------------------------------------------------------------------


def test_a_headroom_without_a_card(run) -> None:
    ran = run("estimate gpt2 --headroom 10")
    assert (ran.status, "--headroom has no effect without --gpu" in ran.err) == (0, True)
    assert run("estimate gpt2 --headroom 10 -q").err == ""
    assert run("estimate gpt2 --headroom 10 --gpu t4").err == ""


@pytest.mark.parametrize(("every", "said"), [(11, False), (12, True), (999_999_999, True)])
def test_every_nth_layer_of_fewer(run, every: int, said: bool) -> None:
    """GPT-2 has 12 layers: of every-12 only the first is checkpointed."""
    for command in ("estimate gpt2", "suggest gpt2 --gpu t4 --target-batch 1"):
        ran = run(f"{command} --checkpointing every-{every}")
        assert ran.status == 0
        assert ("12 layers, so only the first is checkpointed" in ran.err) == said


def test_no_reserve(run) -> None:
    command = "suggest gpt2 --gpu t4 --target-batch 1"
    assert run(f"{command} --reserve 0") == run(command)


@pytest.mark.parametrize("option", ["--gpu", "--reserve", "--target-tokens", "--headroom", "--dropout", "--seq-len"])
def test_numbers_of_thousands_of_digits(run, option: str) -> None:
    ran = run("estimate", "gpt2", option, "9" * 5000)
    assert ran.status == 2
    assert "Exceeds the limit" not in ran.err
    assert len(ran.err) < 400


# -- the catalogue -----------------------------------------------------------------------------------------------------


def test_models_are_listed_by_the_name_that_the_documentation_uses(run) -> None:
    names = [line.split()[0] for line in run("models").out.splitlines() if line.strip()]
    assert {"llama-3-8b", "llama-3.2-3b", "gpt2", "qwen2.5-1.5b"} <= set(names)
    assert len(set(names)) == len(names)
