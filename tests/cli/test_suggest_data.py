"""`memplan suggest --data`: what is said of the data, which options make each way of batching, and faults."""

from __future__ import annotations

import io
import json
import re
import shlex

import jsonschema
import pytest

from memplan.cli.values import SETUP_ROWS
from memplan.report.feed_words import chance_words
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
    (tmp_path / "empty.jsonl").write_text("")


def words(text: str) -> str:
    return " ".join(text.split())


def document(run, command: str) -> dict:
    return json.loads(run(f"{command} --json").out, parse_constant=refuse)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--sample 40",
        "--sample 40 --batching padding-free --loss tiled",
        "--seq-len 1024",
        "--batching packed --attention flash",
        "--batching padding-free",
        "--target-batch 300",
    ],
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
    """The data, the chart with the maximum marked, its numbers, and what other lengths lose."""
    page = run(f"{SHORT} --seq-len 1500 --format html").out
    assert 'id="data"' in page
    assert "padding-free" in page
    assert f"{BASE} --seq-len 1500 --data data.jsonl" in page
    for said in ("How long the records are", "the plan's maximum", "1,500 (the plan)", "Records by length"):
        assert said in page, said


OPTIONS = {
    "rows": "--seq-len 1500 --truncation left",
    "chosen": "--max-loss 25 --loss tiled",
    "padding-free": "--batching padding-free --attention flash --loss tiled --seq-len 1024",
    "nothing fits": "--seq-len 3000 --reserve 20GiB",
    "packed": "--batching packed --attention flash --seq-len 2048",
    "sample": "--sample 40 --loss tiled",
}
SLOW = ("rows", "chosen", "padding-free", "nothing fits", "packed")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in OPTIONS]


@pytest.mark.parametrize("name", NAMES)
def test_one_page_by_three_commands(run, tmp_path, name: str) -> None:
    """`suggest --format html`, `report`, and `report` of the saved plan, whose data is gone by then."""
    command = f"{SHORT} {OPTIONS[name]}"
    status = run(f"{command} --json --output plan.json").status
    assert status == (3 if name == "nothing fits" else 0)
    page = run(f"{command} --format html").out
    direct = run(f"{command.replace('suggest', 'report', 1)} --output page.html --quiet")
    assert (direct.status, direct.out, direct.err) == (status, "", "")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    (tmp_path / "data.jsonl").unlink()
    assert run("report plan.json --output page.html --quiet").status == status
    again = embedded((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert without_commands(again) == without_commands(embedded(page))
    assert again["notes"] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_a_saved_plan_makes_it_again(run, tmp_path, name: str) -> None:
    command = f"{SHORT} {OPTIONS[name]}"
    run(f"{command} --json --output plan.json --quiet")
    plan = json.loads((tmp_path / "plan.json").read_text())
    run("report plan.json --output page.html --quiet")
    said = embedded((tmp_path / "page.html").read_text(encoding="utf-8"))["command"]
    made = json.loads(run(*shlex.split(said)[1:], "--json").out)
    assert made["best"] == plan["best"]
    assert made["data"] == plan["data"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [one for one in NAMES if one.values[0] not in {"chosen", "nothing fits"}])
def test_what_the_sliders_say_is_an_estimate(run, name: str) -> None:
    """The command of the page with the plan's own choices takes as much as the plan."""
    found = embedded(run(f"{SHORT} {OPTIONS[name]} --format html").out)
    best = found["plan"]["best"]
    own, axes = found["what_if"]["own"], found["what_if"]["axes"]
    chosen = [
        word
        for axis, flag in found["what_if"]["flags"].items()
        if axes[axis][own[axis]] is not None
        for word in (flag, str(axes[axis][own[axis]]))
    ]
    made = json.loads(run(*shlex.split(found["what_if"]["commands"][0])[1:], *chosen, "--json").out)
    assert made["setup"] == best["setup"]
    assert made["peak_allocated_bytes"] == best["peak_allocated_bytes"]


# -- a sample ----------------------------------------------------------------------------------------------------------


def test_a_sample_says_what_it_stands_for(run) -> None:
    ran = run(f"{SHORT} --sample 40")
    text = words(ran.out)
    assert max(map(len, ran.out.splitlines())) <= 80
    for said in (
        "data.jsonl: 40 of 300 records, drawn at random",
        "estimates from the sample; steps of an epoch are those of all records",
        "What is said of memory holds for the rest too, if it is cut at",
        ", the longest record of the sample: none of the sample is cut, of all records 7.2 % at most are longer",
        "SFTConfig(max_length=",
    ):
        assert said in text, said
    found = document(run, f"{SHORT} --sample 40")["data"]
    assert (found["is_sample"], found["num_samples"], found["num_records"]) == (True, 40, 300)
    assert found["unseen"] == pytest.approx(1 - 0.05 ** (1 / 40))
    assert [way["steps_per_epoch"] for way in found["ways"] if way["how"] == "padded"] == [-(-300 // 16)]


FLAT = "--batching padding-free --attention flash --loss tiled"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("", "and no record of the sample is longer; the chance to exceed the budget in an epoch is not known: of all"),
        ("--seq-len 256", "37 records of the sample are longer; the chance to exceed the budget in an epoch is 1:"),
        (FLAT, "and no 4 records of the sample have more together; the chance to exceed the budget in an epoch is not"),
        (f"{FLAT} --seq-len 1024", "1,000 of 1,000 epochs that were drawn from the sample did (seed 0)."),
    ],
)
def test_what_a_sample_knows_of_batches_that_are_not_cut(run, options: str, says: str) -> None:
    """That one is too large, that none of its own is, or how often epochs of its records have one."""
    assert says in words(run(f"{SHORT} --sample 40 {options}").out)


def test_what_a_sample_may_lack_adds_to_a_chance() -> None:
    found = {"chance": 0.25, "num_epochs_drawn": 1000, "is_exact": False}
    text = "about 25.0 %: 250 of 1,000 epochs that were drawn did (seed 0)"
    assert chance_words(found) == text
    text = (
        "about 25.0 %: 250 of 1,000 epochs that were drawn from the sample did (seed 0); records that it lacks may add"
    )
    assert chance_words(found, " from the sample") == f"{text} to it"


def test_a_sample_of_all_is_none(run) -> None:
    """The whole screen, and the document but for how it was made."""
    whole = run(SHORT)
    assert run(f"{SHORT} --sample 300").out == whole.out
    assert run(f"{SHORT} --sample 301").out == whole.out


def test_labels_of_a_sample_may_be_everywhere(run) -> None:
    assert "all of its tokens may have a label" in words(run(f"{SHORT} --sample 40 --loss tiled").out)
    assert "may have a label" not in words(run(f"{SHORT} --sample 40").out)


def test_quiet_says_that_it_is_of_a_sample(run) -> None:
    assert "of the sample" in run(f"{SHORT} --sample 40 --quiet").out.splitlines()[0]


# -- several -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_plans_for_the_same_data(run, tmp_path) -> None:
    """Counted once, and planned for as each would be by itself."""
    ran = run(
        "report gpt2 qwen2.5-0.5b --gpu rtx4090,t4 --target-batch 16 --seq-len 1000 --data data.jsonl "
        "--output page.html --quiet"
    )
    assert (ran.status, ran.err) == (0, "")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    sides = embedded(page)["sides"]
    assert len(sides) == 4
    for side in sides:
        assert json.loads(run(*shlex.split(side["command"])[1:], "--json").out)["best"] == side["plan"]["best"]
    assert page.count("data.jsonl: 300 records, 452 k tokens, as the records say") == 4
    assert page.count("1,000, 66.7 % of the records are cut") == 4
    assert "32 sequences =" not in page


def test_several_plans_for_what_is_piped_in(run, monkeypatch, tmp_path) -> None:
    """It can be read once."""
    monkeypatch.setattr("sys.stdin", io.StringIO((tmp_path / "data.jsonl").read_text()))
    assert run("report gpt2 --gpu rtx4090,t4 --target-batch 16 --seq-len 1000 --data - -o page.html -q").status == 0
    sides = embedded((tmp_path / "page.html").read_text(encoding="utf-8"))["sides"]
    assert [side["plan"]["data"]["num_samples"] for side in sides] == [300, 300]


def test_a_side_that_cannot_be_planned_is_said_before_data_is_counted(run) -> None:
    ran = run("report gpt2 nope --gpu t4 --target-batch 16 --data no.jsonl")
    assert "no.jsonl" not in ran.err
    assert "nope" in ran.err


def test_a_plan_from_a_file_beside_one_for_data(run, tmp_path) -> None:
    run("suggest gpt2 --gpu t4 --target-batch 16 --json --output plan.json")
    assert run("report plan.json gpt2 --gpu t4 --target-batch 16 --data data.jsonl -o page.html -q").status == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert [side["plan"]["data"] is None for side in embedded(page)["sides"]] == [True, False]


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="document">(.*?)</script>', page, re.DOTALL)[1])


def without_commands(found: dict) -> dict:
    """What is the same however the command is spelt."""
    left = {key: value for key, value in found.items() if key != "command"}
    return {**left, "what_if": {key: value for key, value in found["what_if"].items() if key != "commands"}}


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
        (f"{SHORT} --sample 0", "--sample is '0'", "from 1 to"),
        (f"{SHORT} --sample many", "--sample is 'many'", "whole number"),
        (f"{BASE} --sample 9", "--sample is about data", "--data PATH"),
        (f"{BASE} --data empty.jsonl", "holds no records", "Name a file with records"),
        (f"{SHORT} --batching packed --packed-sequences 3", "--packed-sequences and --data", "Leave one"),
    ],
)
@pytest.mark.parametrize("program", ["suggest", "report"])
def test_usage(run, program: str, command: str, cause: str, cure: str) -> None:
    assert_two_lines(run(command.replace("suggest", program, 1)), 2, cause, cure)


def test_text_needs_a_tokenizer(run) -> None:
    assert_two_lines(run(f"{BASE} --data text.jsonl"), 1, "no tokenizer is named", "--tokenizer")


def test_only_a_plan_takes_data(run) -> None:
    assert "--data" not in {row.flag for row in SETUP_ROWS}
    assert run("estimate gpt2 --data data.jsonl").status == 2
