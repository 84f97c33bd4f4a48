"""`memplan suggest --data`: what is said of the data, which options make each way of batching, and faults."""

from __future__ import annotations

import json
import shlex

import jsonschema
import pytest

from memplan.cli.values import SETUP_ROWS
from tests.cli.test_documents import read_schema, refuse, unlisted
from tests.cli.test_faults import assert_two_lines

BASE = "suggest qwen2.5-0.5b --gpu rtx4090 --target-batch 16"
SHORT = f"{BASE} --data data.jsonl"


@pytest.fixture(autouse=True)
def data(tmp_path) -> None:
    """300 records of 10 to 3,000 tokens, the last half of each with a label."""
    rows = [{"num_tokens": 10 * n, "num_supervised_tokens": 5 * n} for n in range(1, 301)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "even.jsonl").write_text("\n".join(['{"num_tokens": 512}'] * 40))
    (tmp_path / "text.jsonl").write_text('{"text": "one"}')


def words(text: str) -> str:
    return " ".join(text.split())


def document(run, command: str) -> dict:
    return json.loads(run(f"{command} --json").out, parse_constant=refuse)


@pytest.mark.parametrize(
    "options",
    ["", "--seq-len 1024", "--batching packed --attention flash", "--batching padding-free", "--target-batch 300"],
)
def test_the_document_and_its_schema(run, options: str) -> None:
    found = document(run, f"{SHORT} {options}")
    rules = read_schema("plan")
    jsonschema.Draft202012Validator(rules).validate(found)
    assert unlisted(found, rules, rules) == []
    assert found["data"]["ways"]


def test_without_data_there_is_none(run) -> None:
    assert document(run, BASE)["data"] is None


def test_what_is_said(run) -> None:
    """The length with its loss, the ways with what asks for them, the longest first, what if nothing is cut."""
    ran = run(f"{SHORT} --seq-len 2048")
    text = words(ran.out)
    assert ran.status == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    for said in (
        "data.jsonl: 300 records",
        "2,048, as was asked for: 32.0 % of the records are cut",
        "of those with a label",
        "32,768 tokens per step",
        "padded *",
        "--batching packed --attention flash --target-batch",
        "Put the longest batch first",
        "SFTConfig(max_length=2048)",
        "If nothing cuts the records",
    ):
        assert said in text, said


def test_the_length_that_is_chosen_says_why_it_is_not_shorter(run) -> None:
    text = words(run(f"{SHORT} --max-loss 25").out)
    assert "2,048: 32.0 % of the records are cut" in text
    assert "1,024 would lose" in text
    assert "above --max-loss 25" in text


@pytest.mark.parametrize("how", ["smaller", "padding-free", "packed"])
def test_the_options_of_a_way_make_its_plan(run, how: str) -> None:
    """What the table says of a way is the plan of the same command with the options beside it."""
    (way,) = [one for one in document(run, f"{SHORT} --seq-len 1024")["data"]["ways"] if one["how"] == how]
    assert way["options"]
    again = document(run, f"{SHORT} --seq-len 1024 {way['options']}")
    assert again["best"]["setup"] == way["plan"]["setup"]
    assert again["best"]["peak_process_bytes"] == way["plan"]["peak_process_bytes"]


def test_quiet_says_the_length(run) -> None:
    """It is part of the plan."""
    lines = run(f"{SHORT} --seq-len 2048 --quiet").out.splitlines()
    assert lines[0].startswith("  length   2,048, as was asked for")
    assert "The plan" in lines


def test_equal_records_have_no_padding(run) -> None:
    found = document(run, f"{BASE} --data even.jsonl")
    assert found["data"]["why"] == "longest"
    assert found["best"] == document(run, f"{BASE} --seq-len 512")["best"]
    assert found["best"]["setup"]["padding"] is False
    assert {way["how"]: way["padding"] for way in found["data"]["ways"]}["padded"] == 0


def test_rows_that_hold_one_record_are_not_packed(run) -> None:
    ways = {way["how"]: way for way in document(run, f"{BASE} --data even.jsonl")["data"]["ways"]}
    assert ways["packed"]["refused"] == "no two records fit in a row"


def test_a_target_in_tokens_is_of_the_data(run) -> None:
    """16,000 tokens are 31 records of 512, not 15 or 16 rows of 1,024."""
    found = document(run, "suggest gpt2-medium --gpu h100 --target-tokens 16000 --seq-len 1024 --data even.jsonl")
    assert found["target"]["global_batch_size"] == 31  # 16,000 / 512 = 31.25
    assert found["data"]["tokens_per_step"] == 31 * 512


def test_the_page_shows_it(run) -> None:
    page = run(f"{SHORT} --format html").out
    assert 'id="data"' in page
    assert "padding-free" in page
    assert shlex.join(SHORT.split()) in page


def test_a_saved_plan_keeps_its_data(run, tmp_path) -> None:
    run(f"{SHORT} --json --output plan.json")
    assert run("report plan.json --output page.html --quiet").status == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "data.jsonl: 300 records" in page


def test_a_model_without_flash_is_told_so(run) -> None:
    """On a card without the kernel sequences in a row take a mask."""
    ways = {
        way["how"]: way
        for way in document(run, "suggest gpt2 --gpu t4 --target-batch 8 --data data.jsonl")["data"]["ways"]
    }
    assert ways["packed"]["plan"]["setup"]["attention"] == "sdpa"


def test_a_model_that_masks_by_place_has_rows_alone(run) -> None:
    found = document(run, "suggest opt-1.3b --gpu h100 --target-batch 8 --data data.jsonl")["data"]
    refused = {way["how"]: way["refused"] for way in found["ways"]}
    assert not refused["padded"]
    assert "without position ids" in refused["padding-free"]


@pytest.mark.parametrize(
    ("command", "cause", "cure"),
    [
        (f"{BASE} --max-loss 1", "--max-loss is about data", "--data PATH"),
        (f"{BASE} --tokenizer x", "--tokenizer is about data", "--data PATH"),
        (f"{BASE} --data no.jsonl", "no data at 'no.jsonl'", "Give a file"),
        (f"{SHORT} --max-loss 100", "--max-loss is '100'", "below 100"),
        (f"{SHORT} --max-loss 1 --seq-len 64", "--max-loss and --seq-len contradict", "Leave one"),
        (f"{SHORT} --truncation up", "--truncation 'up'", "right"),
        (f"{SHORT} --objective dpo", "pairs of dpo", "--seq-len"),
        (f"{SHORT} --seq-len 9 --truncation drop", "nothing of the data is left", "--seq-len"),
        (f"{SHORT} --batching packed --packed-sequences 3", "--packed-sequences and --data", "Leave one"),
    ],
)
def test_usage(run, command: str, cause: str, cure: str) -> None:
    assert_two_lines(run(command), 2, cause, cure)


def test_text_needs_a_tokenizer(run) -> None:
    assert_two_lines(run(f"{BASE} --data text.jsonl"), 1, "no tokenizer is named", "--tokenizer")


def test_only_a_plan_takes_data(run) -> None:
    assert "--data" not in {row.flag for row in SETUP_ROWS}
    assert run("estimate gpt2 --data data.jsonl").status == 2
