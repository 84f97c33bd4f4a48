"""Adapters on the command line: what is understood, what is printed, what is refused."""

from __future__ import annotations

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
