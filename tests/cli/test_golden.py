"""Whole screens, as text in `golden/`.

`MEMPLAN_UPDATE_GOLDEN=1 python -m pytest tests/cli/test_golden.py` writes them anew; the difference is to be read.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

SCREENS = {
    "suggest": "suggest --gpu 24GB --target-batch 32",
    "suggest_two_gpus": "suggest llama-3.2-3b --gpu 2xa100-80gb --target-tokens 4M --precision bf16-mixed",
    "suggest_nothing_fits": "suggest qwen2.5-1.5b --gpu 24GB --target-batch 32 --precision bf16-mixed",
    "suggest_quiet": "suggest qwen2.5-0.5b --gpu rtx4090 --target-batch 64 --seq-len 1024 --quiet",
    "suggest_data": "suggest qwen2.5-0.5b --gpu rtx4090 --target-batch 32 --data data.jsonl --max-loss 5",
    "suggest_sample": "suggest qwen2.5-0.5b --gpu 24GB --target-batch 32 --data data.jsonl --sample 100 --loss tiled",
    "lengths": "lengths data.jsonl --max-len 512,1024,2048 --micro-batch 4 --target-batch 32",
    "estimate": "estimate llama-3-8b --gpu a100-80gb --seq-len 4096",
    "estimate_does_not_fit": "estimate qwen2.5-1.5b --micro-batch 8 --gpu rtx3090",
    "sweep": "sweep --gpu 24GB --micro-batch 1..8 --checkpointing full",
    "gpus": "gpus",
}


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    """1,000 records whose lengths are spread as those of text are: many short ones, a few of up to 3,000 tokens."""
    lengths = [20 + 2980 * (n * 617 % 1000) ** 4 // 999**4 for n in range(1000)]
    (tmp_path / "data.jsonl").write_text(
        "".join(f'{{"num_tokens": {num}, "num_supervised_tokens": {num // 3}}}\n' for num in lengths)
    )


@pytest.mark.parametrize("name", SCREENS)
def test_screen(run, name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    ran = run(SCREENS[name])
    text = f"$ memplan {SCREENS[name]}\n{ran.out}exit status {ran.status}\n"
    if os.environ.get("MEMPLAN_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_golden_text_is_used() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == SCREENS.keys()


def test_the_readme_shows_lines_of_the_first_screen() -> None:
    """It is shortened there: every line that is left stands on the screen, in its order."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("```console\n")[2].partition("```")[0].splitlines()
    screen = iter((GOLDEN / "suggest.txt").read_text(encoding="utf-8").splitlines())
    assert len(shown) > 5
    assert all(line in screen for line in shown)
