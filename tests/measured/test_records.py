"""Real records against the error budget; `profiles/measurements` holds them.

GPU    allocated: 1 % at the median, 3 % at the worst, and no under-prediction beyond 1 %; no plan too large, and 95 %
of the recommended micro-batches the true maximum or the next below it
CPU    bytes of the tensors of real training steps: equal to the byte
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memplan import measuring
from memplan.calibration.accuracy import compare, why_not
from memplan.catalog.measurements import read_measurements
from memplan.report.accuracy import accuracy_markdown
from memplan.report.accuracy_page import render_accuracy_page

ROOT = Path(__file__).parents[2]
RECORDS = read_measurements(str(ROOT / "profiles" / "measurements"))
CPU = [one for one in RECORDS.measurements if one.card.device == "cpu" and not why_not(one)]
GPU = [one for one in RECORDS.measurements if one.card.device == "cuda"]

README = ROOT / "README.md"
BEGIN, END = "<!-- accuracy: memplan validate --format markdown -->\n", "<!-- end of accuracy -->\n"


def test_every_line_is_a_record():
    assert not RECORDS.bad_lines


def test_there_are_records_of_a_cpu():
    assert len(CPU) >= 40
    assert len({one.trial.config["model_type"] for one in CPU}) >= 5


@pytest.mark.parametrize("record", CPU, ids=lambda record: record.id)
def test_tensors_of_real_steps_on_a_cpu_are_the_formulas_to_the_byte(record):
    said = measuring.predict(record.trial, None)
    assert said.parameter_bytes == record.parameter_bytes
    assert said.gradient_bytes == record.gradient_bytes
    assert said.optimizer_state_bytes == record.optimizer_state_bytes
    assert said.kept_activation_bytes == record.kept_activation_bytes
    assert said.memory.peak_allocated_bytes == record.peak_allocated_bytes


@pytest.mark.skipif(not GPU, reason="no measurement on a GPU exists yet")
def test_allocated_bytes_on_a_gpu():
    errors = {
        (one.device, one.quantity): one for one in compare(GPU, measuring.prediction_for).errors() if one.group == "all"
    }
    found = errors["cuda", "allocated"]
    assert abs(found.median) <= 0.01
    assert found.worst_under is None or found.worst_under.error >= -0.01, found.worst_under
    assert found.worst_over is None or found.worst_over.error <= 0.03, found.worst_over


@pytest.mark.skipif(not GPU, reason="no measurement on a GPU exists yet")
def test_plans_on_a_gpu():
    verdicts = [one.verdict for one in measuring.validate(str(ROOT / "profiles" / "measurements")).decisions]
    decided = [verdict for verdict in verdicts if verdict != "undecided"]
    assert "too_large" not in decided
    right = sum(verdict in {"true_maximum", "one_below"} for verdict in decided)
    assert right >= 0.95 * len(decided)


@pytest.fixture(scope="module")
def document():
    return measuring.accuracy_document(measuring.validate(str(ROOT / "profiles" / "measurements")))


def test_the_readme_says_what_validate_says(document):
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}{accuracy_markdown(document)}{END}{after}"
    if os.environ.get("MEMPLAN_UPDATE_GOLDEN"):
        README.write_text(wanted, encoding="utf-8")
    assert README.read_text(encoding="utf-8") == wanted


def test_the_page_is_what_validate_writes(document):
    path = ROOT / "reports" / "accuracy.html"
    wanted = render_accuracy_page(document)
    if os.environ.get("MEMPLAN_UPDATE_GOLDEN"):
        path.write_text(wanted, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == wanted
