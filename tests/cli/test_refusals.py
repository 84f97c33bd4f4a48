"""What makes no sense for a model, or names nothing of it, is refused and never ignored."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_faults import assert_two_lines


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--freeze nope", "--freeze nope"),
        ("--freeze lm_head", "--freeze lm_head"),
        ("--lora-rank 8 --lora-targets c_attn,nope", "--lora-targets nope"),
        ("--lora-rank 8 --modules-to-save nope", "--modules-to-save nope"),
    ],
)
@pytest.mark.parametrize("command", ["estimate", "trace"])
def test_names_that_mean_nothing(run, command: str, options: str, name: str) -> None:
    """GIVEN a name that no module has (GPT-2's head has none of its own), THEN it is said, by formula and trace."""
    assert_two_lines(run(f"{command} gpt2 --seq-len 16 {options}"), 2, f"{name}: the model has nothing", "Known: ")


def test_a_difference_needs_a_formula(run) -> None:
    """GIVEN a model that is traced THEN the cure is not the command that was given."""
    assert_two_lines(run("trace t5-small --diff"), 1, "an encoder-decoder (t5)", "Leave --diff out")


def test_evaluations_of_traced_models_are_estimated_and_not_planned(run) -> None:
    """README's Limits, and what both commands say."""
    pytest.importorskip("transformers")
    assert_two_lines(
        run("suggest t5-small --seq-len 16 --eval-batch 8 --gpu 24GB --target-batch 8"),
        2,
        "planned without an evaluation",
        "memplan estimate",
    )
    ran = run("estimate t5-small --seq-len 16 --eval-batch 8 --json")
    assert "evaluation" in {instant["name"] for instant in json.loads(ran.out)["instants"]}


@pytest.mark.parametrize(
    ("options", "cause", "cure"),
    [
        ("t5-small --loss fused", "an encoder-decoder: --loss fused is for language models", "Leave --loss out"),
        ("t5-small --objective dpo", "it is trained for its own loss, not for dpo", "Leave --objective out"),
        ("vit-base --supervised 0.5", "which tokens have a label makes no difference", "Leave --supervised out"),
        ("resnet-50 --seq-len 512", "its inputs have one size", "Leave --seq-len out"),
    ],
)
def test_models_without_words(run, options: str, cause: str, cure: str) -> None:
    pytest.importorskip("transformers")
    assert_two_lines(run(f"estimate {options}"), 2, cause, cure)


def test_the_end_of_a_path_is_a_name(run) -> None:
    whole, end = (
        json.loads(run(f"estimate gpt2 --seq-len 16 --freeze {name} --json").out) for name in ("transformer.wte", "wte")
    )
    assert whole["model"]["num_trainable_parameters"] == end["model"]["num_trainable_parameters"]
    assert whole["peak_allocated_bytes"] == end["peak_allocated_bytes"]
