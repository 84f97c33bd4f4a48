"""What a run prints and how it ends."""

from __future__ import annotations

import csv
import io
import json
from typing import get_type_hints

import pytest

from memplan.cli.commands import suggest
from memplan.cli.data_rows import SUGGEST_ROWS
from memplan.cli.values import MODEL, Options
from memplan.report.layout import WIDTH

FITS = "suggest gpt2 --gpu 24GB --target-batch 32 --seq-len 512"
NOT = "suggest llama-3-8b --gpu 24GB --target-batch 32"

SCREENS = [
    FITS,
    NOT,
    "suggest qwen2.5-1.5b --gpu 24GB --target-batch 32 --precision bf16-mixed",
    "suggest llama-3.2-3b --gpu 2xa100-80gb --target-tokens 4M --precision bf16-mixed --reserve 1GiB",
    "suggest llama-3.1-70b --gpu b200 --target-batch 8 --precision fp32",
    "suggest gpt2 --gpu t4 --target-batch 1000000000 --dropout 0.25",
    "estimate gpt2",
    "estimate gpt2 --micro-batch 1000000000 --accumulation 1000000000 --gpus 1000000000 --gpu rtx4090",
    "estimate qwen2.5-1.5b --micro-batch 64 --gpu rtx3060",
    "estimate llama-3.1-70b --gpu 8xh100 --precision bf16-mixed --checkpointing every-2",
    "models",
    "gpus",
    "--help",
    "estimate --help",
    "suggest --help",
    "models --help",
    "gpus --help",
]


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (FITS, 0),
        (NOT, 3),
        ("estimate gpt2", 0),
        ("estimate gpt2 --gpu rtx4090", 0),
        ("estimate llama-3-8b --gpu rtx4090", 3),
        ("models", 0),
        ("gpus", 0),
        ("--version", 0),
        ("--help", 0),
    ],
)
def test_exit_status(run, command: str, status: int) -> None:
    """0: done, or it fits; 3: it does not; the answer is on stdout either way."""
    ran = run(command)
    assert (ran.status, ran.err) == (status, "")
    assert ran.out


@pytest.mark.parametrize("command", SCREENS)
def test_eighty_columns(run, command: str) -> None:
    """No line is wider than 80 columns, and none ends in blanks."""
    lines = run(command).out.splitlines()
    assert [line for line in lines if len(line) > WIDTH or line != line.rstrip()] == []


@pytest.mark.parametrize("command", ["suggest", "estimate"])
@pytest.mark.parametrize("kind", ["text", "json", "csv", "markdown"])
def test_the_same_question_has_the_same_answer(run, command: str, kind: str) -> None:
    question = f"{command} qwen2.5-0.5b --gpu rtx4090 --target-batch 8 --format {kind}"
    assert run(question) == run(question)


def test_json_is_a_format(run) -> None:
    assert run(f"{FITS} --json") == run(f"{FITS} --format json")
    assert run(f"{FITS} --json --format json") == run(f"{FITS} --json")


def test_the_table_of_a_plan(run) -> None:
    """CSV has the best plan and the alternatives, one line each, and the numbers of the JSON."""
    plan = json.loads(run(f"{FITS} --json").out)
    rows = list(csv.DictReader(io.StringIO(run(f"{FITS} --format csv").out)))
    assert [int(row["peak_process_bytes"]) for row in rows] == [
        one["peak_process_bytes"] for one in (plan["best"], *plan["alternatives"])
    ]


def test_the_table_of_an_estimate(run) -> None:
    """CSV and Markdown have every row of the ledger."""
    estimate = json.loads(run("estimate gpt2 --json").out)
    rows = list(csv.DictReader(io.StringIO(run("estimate gpt2 --format csv").out)))
    assert [int(row["bytes_at_peak"]) for row in rows] == [row["bytes_at_peak"] for row in estimate["ledger"]]
    assert len(run("estimate gpt2 --format markdown").out.splitlines()) == len(rows) + 2


def test_an_empty_table_says_so(run) -> None:
    ran = run(f"{NOT} --format csv")
    assert (ran.status, ran.out) == (3, "")
    assert "nothing fits" in ran.err


def test_quiet_is_the_verdict(run) -> None:
    assert len(run(f"{FITS} --quiet").out.splitlines()) < 15
    assert run("models --quiet").out.splitlines()[0] == "openai-community/gpt2"
    assert "rtx4090" in run("gpus -q").out.splitlines()


def test_confidence_says_what_the_bound_is(run) -> None:
    """Nothing is calibrated: the bound is not a statistical one, and stderr says so."""
    ran = run(f"{FITS} --confidence 0.99")
    assert ran.status == 0
    assert "--confidence" in ran.err
    assert ran.out == run(FITS).out
    assert run(f"{FITS} --confidence 0.99 -q").err == ""


def test_what_the_user_fixes_is_kept(run) -> None:
    plan = json.loads(run(f"{FITS} --json --micro-batch 2 --checkpointing full").out)
    setups = [one["setup"] for one in (plan["best"], *plan["alternatives"])]
    assert {(setup["micro_batch_size"], setup["activation_checkpointing"]) for setup in setups} == {(2, "full")}


def test_a_rounded_target_is_said_aloud(run) -> None:
    """4,000,000 tokens are no whole number of sequences of 2,048."""
    command = "qwen2.5-0.5b --gpu rtx4090 --target-tokens 4M --micro-batch 1"
    for verb in ("suggest", "estimate"):
        words = " ".join(run(f"{verb} {command}").out.split())
        assert "4,000,000 tokens are 1,953 sequences of 2,048: 3,999,744 tokens, 256 fewer." in words
        assert json.loads(run(f"{verb} {command} --json").out)["target"]["target_tokens"] == 4_000_000


def test_the_batch_of_an_estimate_is_exact(run) -> None:
    """GIVEN a global batch of 32 and micro-batches of 4 on 2 GPUs, THEN there are 4 accumulation steps."""
    document = json.loads(run("estimate gpt2 --gpu 2xrtx4090 --target-batch 32 --micro-batch 4 --json").out)
    assert document["setup"]["gradient_accumulation_steps"] == 4
    assert document["setup"]["global_batch_size"] == 32


def test_what_reaches_the_batch_where_an_estimate_does_not_fit(run) -> None:
    """The ways out are options that, added to the command, make it fit."""
    command = "estimate qwen2.5-1.5b --micro-batch 8 --gpu rtx3090"
    ways = json.loads(run(f"{command} --json").out)["ways_out"]
    assert ways
    for way in ways:
        assert run(f"{command} {way['options']}").status == 0


def test_the_ways_out_of_a_plan_are_ways_out(run) -> None:
    command = "suggest qwen2.5-1.5b --gpu 24GB --target-batch 32 --precision bf16-mixed"
    ways = json.loads(run(f"{command} --json").out)["ways_out"]
    assert ways
    for way in ways:
        again = json.loads(run(f"{command} {way['options']} --json").out)
        assert again["fits"]


def test_padding_is_assumed_away_or_counted(run) -> None:
    """GIVEN padded micro-batches, THEN the peak is what the assumption of unpadded ones says, and the setup says so."""
    plain, padded = (json.loads(run(f"estimate llama-3-8b --json {flag}").out) for flag in ("", "--padding"))
    (assumed,) = (one for one in plain["assumptions"] if one["what"] == "padding")
    (counted,) = (one for one in padded["assumptions"] if one["what"] == "padding")
    assert assumed["effect_bytes"] == padded["peak_allocated_bytes"] - plain["peak_allocated_bytes"] > 0
    assert counted["effect_bytes"] == -assumed["effect_bytes"]
    assert (plain["setup"]["padding"], padded["setup"]["padding"]) == (False, True)
    assert "padded batches" in run("suggest gpt2 --gpu t4 --target-batch 8 --padding").out


def test_sequences_in_one_row(run) -> None:
    """GIVEN a batching, THEN bytes follow the tokens, and the plan says whose arguments ask for it."""
    base = "estimate qwen2.5-0.5b --seq-len 512 --micro-batch 4 --attention flash --json"
    rows, free, packed = (
        json.loads(run(f"{base} {flags}").out)
        for flags in ("", "--batching padding-free", "--batching packed --packed-sequences 16")
    )
    assert [one["setup"]["packed_sequences"] for one in (rows, free, packed)] == [None, None, 16]
    assert free["kept_activation_bytes"] == packed["kept_activation_bytes"]
    assert free["peak_allocated_bytes"] <= packed["peak_allocated_bytes"]
    (assumed,) = (one for one in free["assumptions"] if one["what"] == "batching")
    assert assumed["effect_bytes"] == rows["peak_allocated_bytes"] - free["peak_allocated_bytes"]
    plan = "suggest qwen2.5-0.5b --gpu 24GB --target-batch 32 --attention flash --loss tiled --seq-len 512"
    said = " ".join(run(f"{plan} --batching padding-free").out.split())
    assert "padding_free=True) of TRL from 1.15 on" in said
    assert "32 sequences of 512 tokens on average" in said
    said = " ".join(run(f"{plan} --batching packed").out.split())
    assert "max_length=512, packing=True) of TRL from 1.15 on" in said
    assert "32 packed rows of 512 tokens" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batching packed --padding", "holds no padding"),
        ("--packed-sequences 4", "Give --batching packed"),
        ("--batching packed --packed-sequences 1", "holds several sequences"),
        ("--batching packed --packed-sequences 9 --seq-len 8", "does not hold 9 sequences"),
        ("--batching packed --objective dpo", "not for dpo"),
        ("--batching packed --eval-samples 9", "Leave --eval-samples or --batching out"),
        ("--batching paked", "Did you mean"),
    ],
)
def test_what_does_not_go_with_one_row(run, flags: str, words: str) -> None:
    """Contradictions are faults of usage, which say what to leave out."""
    outcome = run(f"estimate gpt2 {flags}")
    assert outcome.status == 2
    assert words in outcome.err


def test_the_cards_that_hold_it_do(run) -> None:
    """GIVEN nothing fits 24 GB, THEN the cards named hold the same configuration."""
    command = "suggest qwen2.5-1.5b --gpu {} --target-batch 32 --precision bf16-mixed"
    plan = json.loads(run(command.format("24GB") + " --json").out)
    assert plan["cards"]
    for card in plan["cards"]:
        assert run(command.format(card["name"])).status == 0


def test_the_default_model_is_named(run, tmp_path) -> None:
    words = " ".join(run("suggest --gpu 24GB --target-batch 32").out.split())
    assert "None was named: this is the default model of memplan." in words
    (tmp_path / "memplan.toml").write_text('model = "gpt2"\n')
    document = json.loads(run("estimate --json").out)
    assert document["model"]["name"] == "openai-community/gpt2"
    assert document["model"]["origin"].endswith("memplan.toml")


def test_options_and_their_types_agree() -> None:
    """Every row of the table fills the field of `Options` that has its name, with values of the field's type."""
    rows = {row.field: row for row in (MODEL, *SUGGEST_ROWS) if not row.hidden and row.field != "json"}
    fields = get_type_hints(Options)
    assert rows.keys() == fields.keys()
    for name, row in rows.items():
        of_type = bool if row.read is None else get_type_hints(row.read)["return"]
        assert fields[name] in {of_type, of_type | None}, name
    params = {param.name: param for param in suggest.params}
    assert len(params) == len(suggest.params) == 1 + len(SUGGEST_ROWS)
    assert {name for name, param in params.items() if param.expose_value} == {*fields, "json"}


@pytest.mark.parametrize("command", ["estimate", "suggest"])
def test_the_help_names_what_is_modelled(run, command: str) -> None:
    text = run(f"{command} --help").out
    assert "--target-batch" in text
    assert "--lora-rank" in text
    assert "--zero-stage" not in text
