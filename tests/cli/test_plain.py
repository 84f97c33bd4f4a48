"""The two readers of a command line agree: what is read without click is what click reads."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan.cli import commands
from memplan.cli.main import main
from memplan.cli.plain import ANSWERS, read_plain
from memplan.cli.values import SETUP_ROWS, Options
from memplan.errors import MemplanError
from tests.cli.test_faults import FAULTS, USAGE

VALUES = ["1", "32", "+7", " 8 ", "1_000", "0", "-1", "1.5", "24GB", "4M", "64k", "bf16", "BF16", "adam", "lion"]
VALUES += ["adamw", "every-2", "every-0", "full", "none", "json", "csv", "xml", "0.5", "5%", "nan", "", " ", "-", "="]
VALUES += ["a=b", "²", "gpt2", "sdpa", "\0", "é"]
FLAGS = [name for row in SETUP_ROWS for name in row.names]

values = st.one_of(st.sampled_from(VALUES), st.text(max_size=4))
tokens = st.one_of(
    st.tuples(st.sampled_from(FLAGS), values),
    st.builds(lambda flag, value: (f"{flag}={value}",), st.sampled_from(FLAGS), values),
    st.sampled_from([("--json",), ("--quiet",), ("-q",), ("--padding",), ("--traceback",), ("gpt2",), ("-",), ("--",)]),
    values.map(lambda value: (value,)),
)
lines = st.lists(tokens, max_size=6).map(lambda parts: [token for part in parts for token in part])


def both_lanes(command: str, rest: list[str]) -> tuple[object, object]:
    """What each lane makes of a command line: the options, or the fault in words."""

    def plain() -> Options | None:
        read = read_plain([command, *rest], {})
        return None if read is None else read[1]

    def by_click() -> Options:
        with getattr(commands, command).make_context(command, list(rest)) as ctx:
            return Options(**ctx.params)

    return answer_of(plain), answer_of(by_click)


def answer_of(read) -> object:
    try:
        return read()
    except MemplanError as fault:
        return type(fault), fault.cause, fault.cure


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ANSWERS), lines)
def test_what_both_read_is_the_same(command: str, rest: list[str]) -> None:
    """For every command line that is plain: equal options, or the same fault in the same words."""
    if answer_of(lambda: read_plain([command, *rest], {})) is None:
        return
    read, clicked = both_lanes(command, rest)
    assert read == clicked


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "--gpu": st.sampled_from(["24GB", "rtx4090"]),
            "--target-batch": st.sampled_from(["8", "1_000"]),
            "--micro-batch": st.sampled_from(["1", "+2"]),
            "--seq-len": st.just("512"),
            "--precision": st.sampled_from(["BF16", "fp32"]),
            "--checkpointing": st.sampled_from(["full", "every-3"]),
            "--headroom": st.sampled_from(["5%", "0"]),
            "--dropout": st.just("0.1"),
            "--reserve": st.just("1GiB"),
            "--format": st.sampled_from(["json", "CSV"]),
            "-o": st.sampled_from(["plan.txt", "-"]),
            "--padding": st.none(),
            "-q": st.none(),
        },
    ),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_ordinary_lines_are_plain(options: dict[str, str | None], joined: bool, random) -> None:
    """Whatever is spelt out is read without click, in any order and in both spellings of a value."""
    parts = [
        [flag] if value is None else [f"{flag}={value}"] if joined and flag.startswith("--") else [flag, value]
        for flag, value in options.items()
    ]
    parts.append(["gpt2"])
    random.shuffle(parts)
    read, clicked = both_lanes("suggest", [token for part in parts for token in part])
    assert isinstance(read, Options)
    assert read == clicked


@pytest.mark.parametrize("command", [command for command, _, _ in [*USAGE, *FAULTS] if command.split()[0] in ANSWERS])
def test_bad_input_ends_alike_in_both_lanes(run, monkeypatch, command: str) -> None:
    """Every fault of the tests: the same status and the same words, whoever read the line."""
    ran = run(command)
    monkeypatch.setattr("memplan.cli.main.read_plain", lambda *args: None)
    assert run(command) == ran


@pytest.mark.parametrize(
    "rest",
    [
        "--help",
        "-h",
        "--gp 24GB",
        "--gpu",
        "--gpu --json",
        "--gpu=--json",
        "--gpu 24GB --gpu 16GB",
        "--json=1",
        "-oplan.txt",
        "-qo plan.txt",
        "--zero-stage 2",
        "-- gpt2",
        "gpt2 bert",
        "-",
    ],
)
def test_what_click_has_to_read(rest: str) -> None:
    assert read_plain(["suggest", *rest.split()], {}) is None


@pytest.mark.parametrize("args", [[], ["--version"], ["models"], ["sugest"], ["--help"]])
def test_other_commands_are_clicks(args: list[str]) -> None:
    assert read_plain(args, {}) is None


def test_completion_is_clicks() -> None:
    assert read_plain(["estimate", "gpt2"], {}) is not None
    assert read_plain(["estimate", "gpt2"], {"_MEMPLAN_COMPLETE": "bash_complete"}) is None


def test_a_fault_without_stderr_is_a_status(monkeypatch) -> None:
    """Whoever started the program may have closed stderr, or not read it."""
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["suggest"]) == 2

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    assert main(["suggest"]) == 2
