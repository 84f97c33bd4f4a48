"""`memplan same-update`: real processes, on modules of a few hundred parameters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest

pytest.importorskip("torch")

from memplan.catalog.trainers import find_trainers, read_rows
from memplan.errors import MemplanError
from memplan.measuring.same_update import find_cut
from memplan.measuring.update_document import update_document
from memplan.probes.update_launch import compare_updates
from memplan.report.same_update import render_trainers, render_update
from tests.cli.test_documents import read_schema, refuse, unlisted

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = "tests.support.updates"
SHOWN = (("mean_tokens", ",.0f"), ("smallest", ".2f"), ("p5", ".2f"))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that are started find the modules of the tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))


def checked(out: str) -> dict:
    document = json.loads(out, parse_constant=refuse)
    rules = read_schema("same-update")
    jsonschema.Draft202012Validator.check_schema(rules)
    jsonschema.Draft202012Validator(rules).validate(document)
    assert unlisted(document, rules, rules) == []
    return document


def text_of(document: dict) -> list[str]:
    """The text of the document, which fits on the screen."""
    lines = [line.text for line in render_update(document)]
    assert max(map(len, lines)) <= 80
    return lines


def test_the_same_update(run, tmp_path: Path) -> None:
    """A right step function, the data, and another batch than before."""
    rows = [{"num_tokens": 100, "num_supervised_tokens": 5 + n % 40} for n in range(400)]
    data = tmp_path / "lengths.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = run(
        f"same-update {MODULE}:language_model --step {MODULE}:right --micro-batch 2 --target-batch 32 --seq-len 100 "
        f"--data {data} --packing bfd,wrapped --previous-batch 8 --lr 1e-4 --warmup-steps 10 --total-steps 1001 --json"
    )
    document = checked(ran.out)
    assert ran.status == 0
    assert document["is_same"]
    assert document["setup"]["gradient_accumulation_steps"] == 16
    assert document["measured"]["gradient_accumulation_steps"] == 8
    assert [step["is_same"] for step in document["steps"]] == [False, True, True]
    assert max(window["error"] for window in document["steps"][1]["windows"]) < 1e-5
    ways = {one["batching"]: one for one in document["token_weights"]}
    assert [(name, one["row_tokens"]) for name, one in ways.items()] == [
        ("rows", None),
        ("grouped", None),
        ("bfd", 100),
        ("wrapped", 100),
    ]
    weights = ways["rows"]["weights"]
    assert weights["smallest"] < weights["p5"] < 1 < weights["p95"] < weights["largest"]
    assert document["advice"]["learning_rate"] == pytest.approx(2e-4)
    assert (document["advice"]["warmup_steps"], document["advice"]["total_steps"]) == (3, 251)
    text = "\n".join(text_of(document))
    assert "The same update: your step is off by" in text
    assert "For adamw the square root rule, x 2: 0.0001 becomes 0.0002." in text
    assert "naive averaging: micro-averaging" in text
    row = next(line for line in text.splitlines() if line.startswith("  packed, bfd"))
    assert row.split()[2:5] == [f"{ways['bfd']['weights'][name]:{form}}" for name, form in SHOWN]
    assert "packed, wrapped: rows of 100 tokens (" in text


@pytest.mark.slow  # the ranks themselves are in tests/unit/test_updates.py
def test_another_update_over_two_ranks(run) -> None:
    """By torchrun: the mean of the means of micro-batches, of all ranks."""
    ran = run(
        f"same-update {MODULE}:language_model --step {MODULE}:micro_averaged --micro-batch 2 --accumulation 3 --gpus 2 "
        "--seq-len 12 --json"
    )
    document = checked(ran.out)
    assert ran.status == 3
    assert document["is_same"] is False
    naive, normalised, own = document["steps"]
    assert normalised["is_same"]
    assert [cause["kind"] for cause in own["causes"]] == ["mean of micro-batches"]
    for ours, theirs in zip(own["windows"], naive["windows"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert "Not the same update: mean of micro-batches" in text_of(document)[5:9]


def test_a_module_that_does_not_cut(run) -> None:
    ran = run(f"same-update {MODULE}:batch_norm --micro-batch 4 --accumulation 2")
    assert ran.status == 3
    assert "Not the same update: batch norm" in ran.out
    assert "with running statistics the error goes" in " ".join(ran.out.split())


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (f"{MODULE}:language_model --step {MODULE}:raises", 1, "ValueError: the loader is empty"),
        (f"{MODULE}:language_model --step {MODULE}:nobody", 1, "has no 'nobody'"),
        (f"{MODULE}:nobody", 1, "has no 'nobody'"),
        (f"{MODULE}:dies", 1, "ended without an answer"),
        ("gpt2 --step nonsense", 2, "package.module:function"),
        ("gpt2 --lr 1e-4", 2, "--previous-batch"),
        ("gpt2 --lr fast --previous-batch 8", 2, "--lr is 'fast'"),
        ("gpt2 --target-batch 9 --micro-batch 2", 2, "A batch of 9 is not micro-batch 2"),
        ("gpt2 --data nowhere.jsonl", 2, "no data at"),
        ("gpt2 --data lengths.jsonl --seq-len 4", 2, "no sequence has a token with a loss left"),
        ("gpt2 --data lengths.jsonl --target-batch 64", 2, "The data has 8 samples and a step takes 64"),
        ("gpt2 --data lengths.jsonl --packing bdf", 2, "Did you mean bfd?"),
        ("gpt2 --packing bfd", 2, "--packing is about data, and none is named"),
        ("no-such-model", 1, "no-such-model"),
    ],
)
def test_faults(run, args: str, status: int, words: str) -> None:
    with open("lengths.jsonl", "w") as file:
        file.write(8 * (json.dumps({"num_tokens": 9, "num_supervised_tokens": 5}) + "\n"))
    ran = run(f"same-update {args}")
    assert ran.status == status
    assert words in ran.err


def test_the_time_is_limited() -> None:
    shape = {"micro_batch_size": 2, "accumulation": 2, "ranks": 2, "seq_len": 8}
    with pytest.raises(MemplanError, match="was not done after"):
        compare_updates(name=f"{MODULE}:language_model", config=None, shape=shape, time_limit_s=0.5)


def test_trainers(run) -> None:
    """Without a measurement."""
    ran = run("same-update --trainer --json")
    assert ran.status == 0
    document = checked(ran.out)
    assert document["is_same"] is None
    assert document["steps"] == []
    assert {one["trainer"] for one in document["trainers"]} == {row.trainer for row in read_rows()}
    lines = run("same-update --trainer").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "What trainers do by default"


@pytest.mark.parametrize(
    ("version", "tokens", "ranks"),
    [
        ("4.45.2", "micro-batch mean", "rank mean"),
        ("4.46.0", "same", "rank mean"),
        ("4.53.3", "same", "rank mean"),
        ("4.54.0", "same", "same"),
        ("5.23.0.dev0", "same", "same"),
    ],
)
def test_the_row_of_an_installed_version(version: str, tokens: str, ranks: str) -> None:
    found = find_trainers({"transformers": version}.get)
    assert found[0].row.trainer == "transformers Trainer"
    assert found[0].installed == version
    assert (found[0].row.tokens, found[0].row.ranks) == (tokens, ranks)
    assert len({one.row.trainer for one in found}) == len(found)
    assert render_trainers(update_document(None, found))[0].text == "What trainers do by default"


def test_every_row_has_a_source() -> None:
    for row in read_rows():
        assert row.source
        assert row.checked
        assert row.tokens in {"same", "micro-batch mean", "sample mean"}
        assert row.ranks in {"same", "rank mean", "sample mean"}
        assert row.window in {"own", "full"}


@pytest.mark.parametrize(
    ("given", "cut"),
    [
        ((None, None, None, None, None), (2, 4, 1, 32)),
        ((4, 2, 2, None, 64), (4, 2, 2, 64)),
        ((2, None, 2, 32, None), (2, 8, 2, 32)),
        ((None, 4, None, 32, None), (8, 4, 1, 32)),
        ((2, 16, None, 32, None), (2, 16, 1, 32)),
    ],
)
def test_how_a_step_is_cut(given: tuple, cut: tuple) -> None:
    assert find_cut(*given) == cut


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "qwen3-0.6b", "mixtral-8x7b", "t5-small", "bert-base"])
def test_models_of_transformers(run, model: str) -> None:
    """Decoders, a mixture of experts, an encoder-decoder and an encoder: a small one of each family."""
    ran = run(f"same-update {model} --micro-batch 2 --accumulation 3 --json")
    document = checked(ran.out)
    assert ran.status == 0
    assert document["model"]["mean_over"] == ("labels" if model in {"t5-small", "bert-base"} else "next tokens")
    assert document["steps"][0]["is_same"] is False
