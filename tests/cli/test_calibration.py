"""`memplan calibrate`, and predictions that use what it wrote."""

from __future__ import annotations

import json
import shutil

import pytest

from memplan import measuring
from memplan.catalog.measurements import append_measurement
from memplan.specs.values import replace
from tests.support.records import measurement, steps


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """120 records of a card whose processes take up to 2 % more than predicted, and 0.7 GB beside the allocator."""
    path = tmp_path_factory.mktemp("made") / "nvidia-h200.jsonl"
    for n in range(120):
        one = measuring.make_trial("pythia-14m", micro_batch=1 + n % 16, seq_len=32 * (1 + n // 16), optimizer="sgd")
        plain = measurement(one)
        reserved = plain.peak_reserved_bytes
        process = reserved + 700_000_000 + int(reserved * 0.02 * (n % 10) / 10)
        append_measurement(
            str(path),
            replace(plain, steps=steps(plain.peak_allocated_bytes, reserved, process), step_times_s=(0.01,)),
        )
    return path


@pytest.fixture
def records(made, tmp_path, monkeypatch):
    """A folder with them, and a data folder of one's own."""
    monkeypatch.setenv("MEMPLAN_DATA_DIR", str(tmp_path / "data"))
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / made.name).write_bytes(made.read_bytes())
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Where the first calibration of all records is kept for the tests behind it."""
    return tmp_path_factory.mktemp("learnt") / "calibration"


@pytest.fixture
def calibrated(run, records, tmp_path, learnt):
    """A data folder with what the records teach; the records are learned from once."""
    if not learnt.exists():
        assert run(f"calibrate --records {records} --folder {learnt}").status == 0
    shutil.copytree(learnt, tmp_path / "data" / "calibration")


def test_calibrate_then_predict(run, records, tmp_path):
    folder = tmp_path / "data" / "calibration"
    ran = run(f"calibrate --records {records} --folder {folder}")
    assert ran.status == 0
    assert "NVIDIA H200 (h200)" in ran.out
    assert all(len(line) <= 80 or str(folder) in line for line in ran.out.splitlines())

    before = json.loads(run("estimate pythia-14m --gpu rtx4090 --json").out)
    assert before["calibration"] is None
    assert before["confidence"] == 0.0

    after = json.loads(run("estimate pythia-14m --gpu h200 --seq-len 256 --confidence 0.9 --json").out)
    assert after["calibration"]["gpu"] == "h200"
    assert after["calibration"]["num_records"] == 120
    assert after["confidence"] >= 0.9
    assert 700_000_000 <= after["context_bytes"] < 760_000_000
    ratio = after["upper_bound_bytes"] / after["peak_process_bytes"] - 1
    assert 0 <= ratio < 0.03, "the bound is what was measured, not a headroom of 5 % of the card"
    assert not run("estimate pythia-14m --gpu h200 --seq-len 256 --confidence 0.9").err


@pytest.mark.usefixtures("calibrated")
def test_a_plan_is_bounded_by_what_was_measured(run):
    plan = json.loads(run("suggest gpt2 --gpu h200 --target-batch 512 --confidence 0.95 --json").out)
    assert plan["budget"]["headroom_percent"] == 0
    assert plan["budget"]["bound_ratio"] > 0
    assert plan["confidence"] >= 0.95
    best = plan["best"]
    assert best["upper_bound_bytes"] >= best["peak_process_bytes"] * (1 + plan["budget"]["bound_ratio"])
    text = run("suggest gpt2 --gpu h200 --target-batch 512 --confidence 0.95").out
    assert "calibrated by 120 measurements on NVIDIA H200" in " ".join(text.split())
    assert "of comparable runs stay under it" in " ".join(text.split())


def test_too_few_records_for_the_confidence_are_said_and_the_headroom_stays(run, records, tmp_path):
    lines = (records / "nvidia-h200.jsonl").read_text().splitlines()[:40]
    (records / "nvidia-h200.jsonl").write_text("\n".join(lines) + "\n")
    run(f"calibrate --records {records} --folder {tmp_path / 'data' / 'calibration'}")
    ran = run("suggest gpt2 --gpu h200 --target-batch 32 --confidence 0.99 --json")
    assert "vouch for" in ran.err
    plan = json.loads(ran.out)
    assert plan["budget"]["headroom_percent"] == 5
    assert plan["budget"]["bound_ratio"] >= 0


@pytest.mark.usefixtures("calibrated")
def test_a_card_that_nobody_measured_gets_the_widest_bound_and_the_headroom(run):
    ran = run("suggest gpt2 --gpu rtx4090 --target-batch 32 --confidence 0.9 --json")
    assert "is not calibrated" in ran.err
    plan = json.loads(ran.out)
    assert plan["confidence"] == 0.0
    assert (plan["budget"]["headroom_percent"], plan["budget"]["bound_ratio"] > 0) == (5, True)


def test_a_broken_calibration_is_a_fault_that_names_the_file(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMPLAN_DATA_DIR", str(tmp_path))
    folder = tmp_path / "calibration" / "h200"
    folder.mkdir(parents=True)
    (folder / "torch.json").write_text("{}")
    ran = run("estimate gpt2 --gpu h200")
    assert ran.status == 1
    assert "torch.json is no calibration" in ran.err


@pytest.mark.parametrize("command", ["calibrate --records /dev/null", "calibrate --gpu h200 --records /dev/null"])
def test_nothing_to_learn_from(run, command):
    ran = run(command)
    assert ran.status == 1
    assert "no measurements on a GPU" in ran.err


def test_records_that_are_not_there(run):
    for command in ("calibrate", "validate"):
        ran = run(f"{command} --records /nowhere")
        assert ran.status == 2
        assert "There is nothing at /nowhere" in ran.err
