"""Numbers remembered from run to run: what comes back, and what a damaged or foreign file does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import memplan
from memplan import api
from memplan.catalog.answers import FOLDER, MOST_BYTES, RememberedAnswers
from memplan.estimation import estimate
from memplan.estimation.step import StepProgram
from memplan.specs.training import Setup

if TYPE_CHECKING:
    from pathlib import Path


def answers(folder: Path, fingerprint: str = "llama") -> RememberedAnswers:
    return RememberedAnswers(fingerprint, {"MEMPLAN_CACHE_DIR": str(folder)})


def the_file(folder: Path) -> Path:
    (found,) = (folder / FOLDER).iterdir()
    return found


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    first = answers(tmp_path)
    first["peak seq_len=8"] = (123456789012345678,)
    first["time freeze=('a\\n b',)"] = (0.1, 2.5e-07, 0.0, 3.0)
    assert dict(answers(tmp_path)) == dict(first)
    assert [type(x) for x in answers(tmp_path)["peak seq_len=8"]] == [int]


def test_what_is_added_is_appended(tmp_path: Path) -> None:
    one, other = answers(tmp_path), answers(tmp_path)
    one["a"] = (1,)
    again = answers(tmp_path)
    again["b"] = (2,)
    one["c"] = (3,)
    assert dict(answers(tmp_path)) == {"a": (1,), "b": (2,), "c": (3,)}
    other["d"] = (4,)  # it knew of no file, and begins one
    assert dict(answers(tmp_path)) == {"d": (4,)}


def test_another_fingerprint_has_nothing_of_it(tmp_path: Path) -> None:
    answers(tmp_path)["a"] = (1,)
    assert not answers(tmp_path, "gpt2")


def damage_end(text: str) -> str:
    return text[:-3]


def damage_head(text: str) -> str:
    return text.replace("memplan answers", "memplan replays")


def damage_size(text: str) -> str:
    return text + f"{'1,' * MOST_BYTES}1 long\n"


@pytest.mark.parametrize("damage", [damage_end, damage_head, damage_size])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, damage) -> None:
    answers(tmp_path)["peak seq_len=16"] = (1,)
    path = the_file(tmp_path)
    path.write_text(damage(path.read_text()))
    found = answers(tmp_path)
    assert not found
    found["b"] = (2,)
    assert dict(answers(tmp_path)) == {"b": (2,)}


def test_a_line_that_is_no_answer_is_left_out(tmp_path: Path) -> None:
    answers(tmp_path)["a"] = (1,)
    path = the_file(tmp_path)
    path.write_text(path.read_text() + "one b\n\n1,,2 c\n7 d\n")
    assert dict(answers(tmp_path)) == {"a": (1,), "d": (7,)}


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    found = answers(tmp_path)
    found["a"] = (1,)
    assert found["a"] == (1,)


def test_no_binary_file_is_read(tmp_path: Path) -> None:
    answers(tmp_path)["a"] = (1,)
    the_file(tmp_path).write_bytes(b"\xff\xfe")
    assert not answers(tmp_path)


def test_a_question_names_all_that_is_not_the_default() -> None:
    assert Setup().unlike_the_default() == ""
    setup = Setup(seq_len=2048, optimizer="lion", micro_batch_size=1)
    assert setup.unlike_the_default() == "seq_len=2048, optimizer='lion'"


def test_a_plan_is_the_same_when_it_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the numbers of its candidates and levers are not worked out a second time."""
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path))
    evaluated: list[str] = []
    peaks = StepProgram.peaks
    monkeypatch.setattr(StepProgram, "peaks", lambda *args, **kw: evaluated.append("") or peaks(*args, **kw))

    def plan() -> tuple[memplan.Plan, int]:
        before = len(evaluated)
        return memplan.suggest("qwen2.5-0.5b", gpu="24GB", target_batch=32), len(evaluated) - before

    (first, worked), (second, remembered) = plan(), plan()
    assert first == second
    assert worked > 20
    assert remembered == 2  # of the plan itself, in the first step and in later ones


def test_a_model_read_without_dropout_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the setup says nothing about it."""
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path))
    setup = Setup(micro_batch_size=8, seq_len=256)
    peaks = [
        api.estimator_of(api.find_model("gpt2", dropout=dropout), None).memory(setup).peak_allocated_bytes
        for dropout in (0.0, None, 0.0)
    ]
    assert peaks[0] == peaks[2] < peaks[1]


def test_times_are_those_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path))
    cards = ("a100-80gb", "h100-sxm")
    times = [memplan.estimate("gpt2", gpu=card).step_time for card in cards]
    assert times[0] != times[1]
    assert [memplan.estimate("gpt2", gpu=card).step_time for card in cards] == times
    assert isinstance(times[0], estimate.StepTime)
    assert os.listdir(tmp_path) == [FOLDER]
