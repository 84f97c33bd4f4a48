"""Tokens generated during an evaluation, as options of the commands."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_faults import assert_two_lines


def test_an_instant_of_its_own(run) -> None:
    """GIVEN --eval-generate, THEN the generation has its bytes, and more tokens take more."""
    peaks = []
    for num in (1000, 2000):
        ran = run(f"estimate qwen2.5-0.5b --seq-len 64 --eval-batch 64 --eval-generate {num} --json")
        assert ran.status == 0, ran.err
        found = json.loads(ran.out)
        assert found["setup"]["evaluation"] == {"batch": 64, "samples": None, "accumulation": None, "generate": num}
        peaks.append(next(one for one in found["instants"] if one["name"] == "generation")["allocated_bytes"])
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize(
    ("question", "cause"),
    [
        ("estimate gpt2", "Generation is not modelled for gpt2"),
        ("estimate bert-base", "bert does not generate"),
        ("estimate deepseek-v2-lite", "Generation is not modelled for deepseek_v2"),
        ("suggest llama-3-8b --gpu 24GB --target-batch 32 --padding", "padded prompts is not modelled"),
    ],
)
def test_refused(run, question: str, cause: str) -> None:
    """What is not modelled is refused in two lines."""
    assert_two_lines(run(f"{question} --seq-len 64 --eval-generate 16"), 2, cause, "--eval-generate")
