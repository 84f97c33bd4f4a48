"""Bad input: one sentence of cause, one of cure, the right exit status, nothing on stdout, no traceback."""

from __future__ import annotations

import json
import sys

import pytest

PLAN = "suggest gpt2 --gpu 24GB --target-batch 32"

USAGE = [
    ("sugest", "no command 'sugest'", "Did you mean suggest?"),
    ("banana", "no command 'banana'", "estimate, suggest, sweep, trace, probe, validate"),
    ("suggest", "--gpu is missing", "--gpu 24GB"),
    ("suggest --gpu 24GB", "--target-batch or --target-tokens is missing", "--target-batch 32"),
    ("suggest --gpu banana --target-batch 32", "'banana'", "memplan gpus"),
    ("suggest --gpu 24 --target-batch 32", "'24' does not say", "24GB (24 x 10^9 bytes) or 24GiB"),
    ("suggest --gpu a100 --target-batch 32", "'a100'", "Did you mean a100-40gb"),
    ("suggest --gpu -24GB --target-batch 32", "negative", "24GB"),
    ("suggest --gpu nan --target-batch 32", "'nan'", "24GB"),
    ("suggest --gpu 0GB --target-batch 32", "zero", "24GB"),
    ("suggest --gpu --target-batch 32", "--gpu has no value", "--gpu VALUE"),
    ("suggest --gpu 24GB --target-batch", "--target-batch", "memplan suggest --help"),
    ("suggest --gpu 24GB --target-batch 0", "--target-batch is '0'", "from 1 to 1,000,000,000"),
    ("suggest --gpu 24GB --target-batch -1", "--target-batch is '-1'", "from 1 to"),
    ("suggest --gpu 24GB --target-batch 1.5", "not a whole number", "from 1 to"),
    ("suggest --gpu 24GB --target-batch nan", "not a whole number", "from 1 to"),
    ("suggest --gpu 24GB --target-batch inf", "not a whole number", "from 1 to"),
    ("suggest --gpu 24GB --target-batch " + "9" * 5000, "--target-batch is '999", "from 1 to"),
    ("suggest --gpu 24GB --target-batch ²", "not a whole number", "from 1 to"),
    ("suggest --gpu 24GB --target-tokens 0", "--target-tokens", "4M"),
    ("suggest --gpu 24GB --target-tokens 1e9", "--target-tokens", "4M"),
    ("suggest --gpu 24GB --target-tokens 900T", "--target-tokens is '900T'", "1,000,000,000 at most"),
    ("suggest --gpu 24GB --target-batch 32 --target-tokens 4M", "--target-batch and --target-tokens", "Leave one"),
    ("suggest --gpu 24GB --target-tokens 4M --target-batch 32", "--target-batch and --target-tokens", "Leave one"),
    ("suggest --gpu 2x24GB --target-batch 1", "smaller than the number of GPUs", "--target-batch 2"),
    ("suggest --gpu 2x24GB --target-batch 33", "cannot be divided exactly", "32 or 34"),
    ("suggest --gpu 2x24GB --gpus 3 --target-batch 6", "--gpu 2x24GB names 2 GPUs and --gpus says 3", "Leave one"),
    (f"{PLAN} --micro-batch 5", "cannot be divided exactly", "30 or 35"),
    (f"{PLAN} --micro-batch 4 --accumulation 4", "is 16, not the target batch 32", "--target-batch 16"),
    (f"{PLAN} --seq-len 4096", "positions for 1024", "--seq-len 1024"),
    (f"{PLAN} --seq-len 0", "--seq-len is '0'", "from 1 to"),
    (f"{PLAN} --gpus 0", "--gpus is '0'", "from 1 to"),
    (f"{PLAN} --precision bf61", "--precision 'bf61'", "Did you mean bf16?"),
    (f"{PLAN} --optimizer adam", "--optimizer 'adam'", "Did you mean adamw"),
    (f"{PLAN} --attention flesh", "--attention 'flesh'", "Did you mean flash?"),
    (f"{PLAN} --checkpointing every-0", "--checkpointing 'every-0'", "every-2"),
    (f"{PLAN} --checkpointing every-x", "--checkpointing 'every-x'", "every-2"),
    (f"{PLAN} --checkpointing all", "--checkpointing 'all'", "Known: none, selective, save-attention, full"),
    (f"{PLAN} --headroom 100", "--headroom is '100'", "below 100"),
    (f"{PLAN} --headroom nan", "--headroom is 'nan'", "below 100"),
    (f"{PLAN} --headroom -3", "--headroom is '-3'", "below 100"),
    (f"{PLAN} --confidence 0", "--confidence is '0'", "above 0 and below 1"),
    (f"{PLAN} --dropout 1", "--dropout is '1'", "below 1"),
    (f"{PLAN} --dropout inf", "--dropout is 'inf'", "below 1"),
    (f"{PLAN} --reserve 5", "--reserve", "5GiB"),
    (f"{PLAN} --reserve 30GB", "reserve takes all", "smaller --reserve"),
    (f"{PLAN} --json --format csv", "--json and --format csv", "Leave one"),
    (f"{PLAN} --format xml", "--format 'xml'", "text, json, csv, markdown"),
    (f"{PLAN} --target-bach 8", "no option --target-bach", "--target-batch"),
    (f"{PLAN} more", "more", "memplan suggest --help"),
    ("estimate gpt2 --micro-batch 3 --target-batch 32", "cannot be divided exactly", "30 or 33"),
    ("estimate gpt2 --target-batch 32 --accumulation 3", "is 3, not the target batch 32", "Leave one"),
    ("estimate gpt2 --gpu banana", "'banana'", "memplan gpus"),
    ("estimate gpt2 --micro-batch -4", "--micro-batch is '-4'", "from 1 to"),
    ("models --json --format markdown", "--json and --format markdown", "Leave one"),
    ("models gpt2", "gpt2", "memplan models --help"),
    ("suggest gpt2 --gpu 24GB --target-batch 32 --loss fused", "no fused loss for gpt2", "chunked"),
    ("estimate gpt2 --objective distillation", "needs a teacher", "--teacher MODEL"),
    ("estimate gpt2 --teacher gpt2-medium", "the objective is lm", "--objective distillation"),
    ("estimate gpt2 --objective distillation --teacher llama-3-8b", "one of 128,256", "the same vocabulary"),
    ("trace gpt2 --objective distillation --teacher llama-3-8b", "50,257 tokens", "the same vocabulary"),
    ("estimate gpt2 --objective distillation --teacher t5-small", "does not describe it", "memplan models"),
    ("estimate t5-small --objective distillation --teacher gpt2", "does not describe it", "memplan trace"),
    ("estimate gpt2 --objective distillation --teacher gpt2 --loss tiled", "not modelled as --loss tiled", "full"),
    ("estimate gpt2 --objective distillation --teacher gpt2 --teacher-dtype fp32", "two dtypes", "--teacher-dtype"),
    ("estimate gpt2 --objective distillation --teacher gpt2 --teacher-dtype int8", "'int8'", "Known: fp32, bf16"),
    ("estimate gpt2 --objective distillation --teacher gpt2 --eval-batch 8", "not modelled", "--eval"),
    ("estimate bert-base --objective distillation --teacher bert-base", "language models", "one vocabulary"),
    ("estimate bert-base --loss chunked", "causal language models", "--loss full"),
    ("estimate llama-3-8b --loss cut --precision fp32", "hidden states in fp32", "--loss full"),
    ("estimate llama-3-8b --objective orpo --loss tiled", "orpo is not modelled as --loss tiled", "--loss full"),
    ("estimate llama-3-8b --objective reward --lora-rank 8", "Adapters of a reward model", "Leave"),
    ("estimate opt-1.3b --objective reward", "reward is not modelled for opt", "Known: bert"),
    ("estimate llama-3-8b --objective orpo --eval-batch 4", "What the trainer evaluates for orpo", "--eval-batch"),
    ("trace gpt2 --objective dpo --eval-batch 8", "What the trainer evaluates for dpo", "--eval-batch"),
    ("trace gpt2 --loss tiled --eval-batch 8 --eval-samples 16", "has no logits that it could keep", "--eval-samples"),
    ("estimate llama-3-8b --label-smoothing 0.1 --loss tiled", "and --loss tiled has none", "--loss full"),
    ("estimate llama-3-8b --label-smoothing 0.1 --objective dpo", "not for --objective dpo", "Leave"),
    ("estimate bert-base --label-smoothing 0.1", "causal language models", "memplan trace"),
    ("estimate llama-3-8b --label-smoothing 1", "--label-smoothing is '1'", "below 1"),
]

FAULTS = [
    ("estimate lama-3-8b", "'lama-3-8b'", "Did you mean llama-3-8b"),
    ("estimate no/such/config.json", "no/such/config.json", "memplan models"),
    ("estimate someone/some-model", "MEMPLAN_OFFLINE", "."),
    ("estimate rwkv-4-3b", "token by token", "memplan trace"),
    ("suggest gpt2 --gpu 24GB --target-batch 32 --output no/such/folder/plan", "could not be written", "--output"),
    ("doctor", "memplan doctor is not there yet", "estimate"),
    ("estimate gpt2 --offload optimizer", "--offload optimizer is not modelled yet", "activations"),
    *[
        (f"{command} gpt2 --gpu 24GB --target-batch 32 {flag} 8", f"{flag} is not modelled yet", "Leave it out")
        for command in ("estimate", "suggest")
        for flag in ("--zero-stage",)
    ],
    *[
        (f"estimate gpt2 --objective {name}", f"--objective {name} is not modelled yet", "Known: lm, dpo")
        for name in ("kto", "grpo")
    ],
]


def assert_two_lines(ran, status: int, cause: str, cure: str) -> None:
    assert ran.status == status
    assert ran.out == ""
    first, second = ran.err.splitlines()
    assert first.startswith("memplan: ")
    assert first.endswith(".")
    assert cause in first
    assert cure in second
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(("command", "cause", "cure"), USAGE)
def test_usage(run, command: str, cause: str, cure: str) -> None:
    """A value or a combination without meaning is exit status 2."""
    assert_two_lines(run(command), 2, cause, cure)


@pytest.mark.parametrize(("command", "cause", "cure"), FAULTS)
def test_fault(run, command: str, cause: str, cure: str) -> None:
    """What cannot be read or modelled is exit status 1."""
    assert_two_lines(run(command), 1, cause, cure)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ("{}", "model_type"),
        ("[" * 100_000, "nested too deeply"),
        ('{"model_type": "llama"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": NaN}', "NaN"),
        ('{"model_type": "llama", "hidden_size": -8}', "."),
        (" " * (5 << 20), "larger than 4 MiB"),
    ],
)
def test_a_broken_config(run, tmp_path, content: str, cause: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert_two_lines(run("estimate", str(tmp_path / "config.json")), 1, cause, "")


def test_heads_that_do_not_divide_the_hidden_size(run, tmp_path) -> None:
    values = {"model_type": "llama", "hidden_size": 4097, "num_attention_heads": 32, "num_hidden_layers": 2}
    values |= {"intermediate_size": 64, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_two_lines(run("estimate", str(tmp_path)), 1, "hidden_size", "heads")


def test_a_terminal_gets_lines_broken_between_words(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN a terminal of 60 columns THEN no line is longer and no word is lost; a pipe gets the sentences whole."""
    command = "estimate llama-3-8b --label-smoothing 0.1 --loss tiled"
    whole = run(command).err
    assert max(map(len, whole.splitlines())) > 60
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    broken = run(command).err
    assert max(map(len, broken.splitlines())) <= 60
    assert broken.split() == whole.split()


def test_an_empty_model(run) -> None:
    assert_two_lines(run("estimate", ""), 2, "MODEL is empty", "MODEL")


def test_no_command_shows_the_help(run) -> None:
    ran = run()
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("Usage: memplan")


def test_an_unexpected_fault_is_two_lines(run, monkeypatch) -> None:
    """GIVEN a bug, THEN it is exit status 1 and no traceback, unless one was asked for."""

    def broken(*args: object, **settings: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("memplan.api.find_model", broken)
    assert_two_lines(run("estimate gpt2"), 1, "an unexpected KeyError", "--traceback")
    ran = run("estimate gpt2 --traceback")
    assert ran.status == 1
    assert "Traceback (most recent call last)" in ran.err


def test_an_interrupt(run, monkeypatch) -> None:
    def interrupted(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memplan.api.find_model", interrupted)
    ran = run("estimate gpt2")
    assert (ran.status, ran.out) == (130, "")
    assert "interrupted" in ran.err
