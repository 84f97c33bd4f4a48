"""Adapters on the command line: what is understood, what is printed, what is refused."""

from __future__ import annotations

import json

import pytest

SEQUENCE, TOKEN = "--objective sequence-classification", "--objective token-classification"


def test_adapters_of_classifiers(run) -> None:
    """The copy of the head is said; the printed settings are those that peft and bitsandbytes need."""
    of_bert = run(f"estimate bert-large --gpu rtx4090 {SEQUENCE} --lora-rank 8 --lora-targets query,value")
    assert "a full copy of the head is trained" in " ".join(of_bert.out.split())
    plan = run(
        f"suggest bert-large --gpu rtx4090 {SEQUENCE} --target-batch 8 --seq-len 128 --lora-rank 8 --quantize nf4"
    )
    assert "task_type=SEQ_CLS" in " ".join(plan.out.split()).replace('"', "").replace("'", "")
    assert "llm_int8_skip_modules" in plan.out


@pytest.mark.parametrize("command", ["estimate", "suggest --target-batch 8"])
@pytest.mark.parametrize("objective", [SEQUENCE, TOKEN])
def test_classifiers_that_do_not_fit(run, command: str, objective: str) -> None:
    """GIVEN one that is too large THEN the levers are those that it has, and nothing fails."""
    answer = run(f"{command} llama-3-8b --gpu rtx4090 {objective}")
    assert answer.status == 3
    assert "--loss tiled" not in answer.out


def test_all_linear_of_tokens(run) -> None:
    """It is a usage error that says what to do."""
    answer = run(f"estimate bert-large --gpu rtx4090 {TOKEN} --lora-rank 8")
    assert answer.status == 2
    assert "query,value" in answer.err


def test_ranks_and_layers(run) -> None:
    """They are said in words, as JSON, and as peft's own settings in a plan."""
    options = "--lora-rank 8 --lora-targets q_proj,down_proj --lora-layers 0,2-5 --lora-ranks down_proj=32"
    words = " ".join(run(f"estimate qwen2.5-1.5b --gpu rtx4090 {options}").out.split())
    assert "of layers 0, 2-5 alone, rank 32 on down_proj" in words
    lora = json.loads(run(f"estimate qwen2.5-1.5b --gpu rtx4090 {options} --json").out)["setup"]["lora"]
    assert (lora["layers"], lora["ranks"]) == ([0, 2, 3, 4, 5], {"down_proj": 32})
    plan = run(f"suggest qwen2.5-1.5b --gpu rtx4090 --target-batch 8 --seq-len 512 {options}").out
    told = " ".join(plan.split()).replace('"', "").replace("'", "")
    assert "layers_to_transform=[0, 2, 3, 4, 5]" in told
    assert "rank_pattern={down_proj: 32}" in told


@pytest.mark.parametrize("command", ["estimate", "trace"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--lora-targets q_proj --lora-layers 0,99", "--lora-layers 99: the model has no such layer"),
        ("--lora-ranks nope=4", "--lora-ranks nope: the model has nothing"),
        ("--lora-ranks q_proj", "not names and ranks"),
        ("--lora-layers 0", "does not go with all-linear"),
    ],
)
def test_ranks_and_layers_that_mean_nothing(run, command: str, options: str, said: str) -> None:
    answer = run(f"{command} qwen2.5-1.5b --seq-len 16 --lora-rank 8 {options}")
    assert answer.status == 2
    assert said in " ".join(answer.err.split())
