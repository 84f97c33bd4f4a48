"""What somebody who waits is told, and how much of a card is taken as a bar."""

from __future__ import annotations

import json

import pytest

from memplan import measuring
from memplan.calibration.prediction import Prediction
from memplan.catalog.gpus import read_gpu
from memplan.catalog.measurements import append_measurement
from memplan.report.probe import probe_document, render_probe
from tests.support.records import measurement, steps

GIB = 2**30


def trial(micro_batch: int = 1):
    return measuring.make_trial("pythia-14m", micro_batch=micro_batch, seq_len=128)


@pytest.fixture
def records(tmp_path) -> str:
    """Three of a card."""
    path = tmp_path / "nvidia-h200.jsonl"
    for micro_batch in (1, 2, 4):
        append_measurement(str(path), measurement(trial(micro_batch)))
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return str(path)


def test_which_of_how_many_records_is_predicted(records: str) -> None:
    """Then the plans, and then every published number."""
    told: list[str] = []
    found = measuring.validate(records, notify=told.append)
    assert [one.partition(" ")[0] for one in told[:3]] == ["1/3", "2/3", "3/3"]
    assert told[3] == "planning what was put to the test"
    num = len(found.published)
    assert [one.partition(" ")[0] for one in told[4:]] == [f"{n + 1}/{num}" for n in range(num)]


def test_which_card_is_learnt_about(records: str) -> None:
    told: list[str] = []
    measuring.calibrate(records, notify=told.append)
    assert told == ["1/1 learning from 3 measurements on h200"]


def test_what_a_probe_took_of_the_card() -> None:
    """6 of 24 cells are a quarter."""
    gpu = read_gpu("h200")
    record = measurement(trial(), steps=steps(GIB, 2 * GIB, gpu.usable_bytes // 4))
    document = probe_document(record, Prediction(), gpu, context_bytes=0, records=None)
    (line,) = (line.text for line in render_probe(document) if "█" in line.text)
    assert f"{'█' * 6}{'░' * 18} as measured" in line
    on_a_cpu = probe_document(record, Prediction(), None, context_bytes=0, records=None)
    assert not any("█" in line.text for line in render_probe(on_a_cpu))
