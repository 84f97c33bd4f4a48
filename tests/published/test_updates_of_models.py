"""Small models of transformers' families: which of them let a batch be cut, and what their mean is over."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from memplan.catalog.models import read_config
from memplan.equivalence.diagnosis import diagnose_loop, diagnose_subject, tolerance
from memplan.equivalence.records import parse_loop, parse_subject
from memplan.equivalence.runner.measuring import Shape, measure
from memplan.probes.updates import build

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

SHAPE = Shape(micro_batch_size=2, accumulation=2, ranks=1, seq_len=16)
NEXT, LABELS, SAMPLES = "count_next_tokens", "count_labels", "num_samples"

MODELS = {
    "llama-3-8b": NEXT,
    "gpt-neox-20b": NEXT,
    "bloom-560m": NEXT,
    "deepseek-v3": NEXT,
    "falcon-7b": NEXT,
    "gemma-3-270m": NEXT,
    "gpt-oss-120b": NEXT,
    "mamba-130m": NEXT,
    "mpt-7b": NEXT,
    "olmoe-1b-7b": NEXT,
    "phi-3-mini": NEXT,
    "smollm3-3b": NEXT,
    "bart-base": LABELS,
    "deberta-v3-base": LABELS,
    "modernbert-base": LABELS,
    "whisper-tiny": LABELS,
    "vit-base": SAMPLES,
}
NOT_CUT = {"resnet-50": "batch norm", "clip-base": "in-batch negatives", "wav2vec2-base": "sum"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products wait longer for threads than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def found(name: str) -> dict[str, Any]:
    values, _ = read_config(name)
    torch.manual_seed(0)
    module, make_inputs, loss_of = build({"config": values, "name": name, "shape": SHAPE._asdict()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measure(module, make_inputs, loss_of, SHAPE)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_can_be_cut(name: str) -> None:
    record = found(name)
    subject = parse_subject(record["subject"])
    assert diagnose_subject(subject).is_same
    assert subject.error < 5e-6
    assert record["count"] == MODELS[name]
    loops = {key: parse_loop(loop) for key, loop in record["loops"].items()}
    assert diagnose_loop(loops["normalised"], tolerance(subject.floor)).is_same
    naive = diagnose_loop(loops["naive"], tolerance(subject.floor))
    assert naive.kinds == (() if MODELS[name] == SAMPLES else ("mean of micro-batches",))


@pytest.mark.parametrize("name", NOT_CUT)
def test_a_batch_cannot_be_cut(name: str) -> None:
    """BatchNorm, a softmax over the pairs of the batch, and CTC's sum over samples."""
    record = found(name)
    assert diagnose_subject(parse_subject(record["subject"])).kinds == (NOT_CUT[name],)
    assert diagnose_loop(parse_loop(record["loops"]["normalised"])).is_same
