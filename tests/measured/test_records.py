"""Real records against the error budget; `profiles/measurements` holds them.

GPU    allocated: 1 % at the median, 3 % at the worst, and no under-prediction beyond 1 %; no plan too large, and 95 %
of the recommended micro-batches the true maximum or the next below it
CPU    bytes of the tensors of real training steps: equal to the byte
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from memplan import measuring
from memplan.calibration.accuracy import compare, why_not
from memplan.catalog.measurements import read_measurements
from memplan.report.accuracy import accuracy_markdown, summary
from memplan.report.pages.accuracy import render_accuracy_page

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


class Difference(NamedTuple):
    """What the formula counts more than a CPU allocates, and which tensors it is."""

    kept: int = 0
    peak: int = 0


def expected(record) -> Difference:
    """Zero, but for kernels of a CPU that allocate other tensors than a card's."""
    config, setup = record.trial.config, record.trial.setup
    if setup.quantize == "nf4-double":
        # bitsandbytes keeps the 256 numbers of scales itself (functional.py, name2qmap), beside each weight's own.
        return Difference(peak=-rounded(256 * 4))
    if config["model_type"] == "gpt_neox" and setup.attention == "sdpa":
        layers, tokens = config["num_hidden_layers"], setup.tokens_per_micro_batch
        if setup.precision == "fp32":
            # The fused kernel of a CPU lays its output out by heads: joining the heads makes a copy in each layer.
            copies = -layers * rounded(tokens * config["hidden_size"] * 4)
            return Difference(copies, copies)
        # LayerNorm keeps mean and 1/deviation of each row: two numbers of 2 bytes on a CPU, of 4 on a card.
        norms = (2 * layers + 1) * 2 * (rounded(tokens * 4) - rounded(tokens * 2))
        return Difference(norms, norms)
    if config["model_type"] == "gpt2" and setup.precision == "bf16-mixed":
        # pow is on CUDA's list of operators that autocast runs in fp32 and not on a CPU's: of gelu_new's tensors three
        # are in fp32 on a card and one is a cast, where a CPU keeps four in bf16. They are gone at the peak.
        wide = setup.tokens_per_micro_batch * 4 * config["n_embd"]
        kept = config["n_layer"] * (3 * rounded(4 * wide) + rounded(2 * wide) - 4 * rounded(2 * wide))
        return Difference(kept * (setup.activation_checkpointing == "none"), 0)
    if config["model_type"] in {"bert", "roberta"} and setup.precision == "bf16-mixed":
        # layer_norm is on CUDA's list of operators that autocast runs in fp32 and not on a CPU's: the sums that it is
        # given are in bf16 there. Two in each layer, and of the head the output of its GELU. They are gone at the peak.
        layers = config["num_hidden_layers"] if setup.activation_checkpointing == "none" else 0
        wide = setup.tokens_per_micro_batch * config["hidden_size"]
        return Difference((2 * layers + 1) * (rounded(4 * wide) - rounded(2 * wide)), 0)
    return Difference()


def rounded(num_bytes: int) -> int:
    """As the allocator rounds."""
    return -(-num_bytes // 512) * 512


@pytest.mark.parametrize("record", CPU, ids=lambda record: record.id)
def test_tensors_of_real_steps_on_a_cpu_are_the_formulas_to_the_byte(record):
    said, difference = measuring.predict(record.trial, None), expected(record)
    assert said.parameter_bytes == record.parameter_bytes
    assert said.gradient_bytes == record.gradient_bytes
    assert said.optimizer_state_bytes == record.optimizer_state_bytes
    assert said.kept_activation_bytes - record.kept_activation_bytes == difference.kept
    assert said.memory.peak_allocated_bytes - record.peak_allocated_bytes == difference.peak


def test_adapters_and_4_bit_bases_were_measured_on_a_cpu():
    recipes = {
        (one.trial.setup.quantize, one.trial.setup.lora.dora, one.trial.setup.activation_checkpointing)
        for one in CPU
        if one.trial.setup.lora is not None
    }
    assert recipes == {
        *((None, dora, checkpointing) for dora in (False, True) for checkpointing in ("none", "full")),
        ("nf4", False, "none"),
        ("nf4-double", False, "none"),
    }


def test_masks_of_adapters_on_a_cpu_are_floats():
    """Dropout keeps a mask of one byte a number on a card and of fp32 on a CPU, where its input needs a gradient.

    Its inputs: of queries, keys and values, of the attention's output, and of both layers of the MLP.  The first and
    the third come straight from the embedding in the first layer, which has no gradient.
    """
    (record,) = [
        one
        for one in RECORDS.measurements
        if one.card.device == "cpu" and one.trial.setup.lora is not None and one.trial.setup.lora.dropout
    ]
    config, said = record.trial.config, measuring.predict(record.trial, None)
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    masked = layers * (3 * hidden + inner) - 2 * hidden
    more = (4 - 1) * record.trial.setup.tokens_per_micro_batch * masked
    assert record.kept_activation_bytes - said.kept_activation_bytes == more
    assert record.peak_allocated_bytes - said.memory.peak_allocated_bytes == more


def test_most_records_of_a_cpu_are_equal_without_any_explanation():
    assert sum(expected(record) == Difference() for record in CPU) >= 0.8 * len(CPU)


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


def test_the_page_says_what_validate_says(document):
    """The document in it; its charts may differ by the release of matplotlib."""
    path = ROOT / "reports" / "accuracy.html"
    wanted = render_accuracy_page(document)
    if os.environ.get("MEMPLAN_UPDATE_GOLDEN"):
        path.write_text(wanted, encoding="utf-8")
    assert _embedded(path.read_text(encoding="utf-8")) == _embedded(wanted) == json.loads(json.dumps(document))


def test_the_summary_of_other_pages_says_what_validate_says(document):
    path = ROOT / "profiles" / "accuracy.json"
    wanted = json.dumps(summary(document), indent=1) + "\n"
    if os.environ.get("MEMPLAN_UPDATE_GOLDEN"):
        path.write_text(wanted, encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(wanted)


def _embedded(page: str):
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL).group(1))
