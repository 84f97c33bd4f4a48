"""What checkpointing keeps, offloaded to the host: the formula against transformers' own offloading."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import memplan
from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.estimation.timeline import timeline
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from tests.published.test_formula_equals_trace import CONFIG_BY_MODEL_TYPE
from tests.support.witnesses import compare

CASES = list(product(("llama", "gpt2", "bert"), ("bf16", "bf16-mixed"), ("full", "every-2"), (1, 2)))


@pytest.mark.parametrize(("model_type", "precision", "checkpointing", "accumulation"), CASES)
def test_offloaded_inputs_of_layers(model_type: str, precision: str, checkpointing: str, accumulation: int) -> None:
    """GIVEN transformers' ``offload=True`` WHEN a step runs THEN formula and trace agree to the byte, peak included."""
    setup = Setup(
        micro_batch_size=2,
        seq_len=128,
        precision=precision,
        activation_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
        offload="activations",
    )
    both = compare(CONFIG_BY_MODEL_TYPE[model_type], setup)
    assert both.formula == both.trace
    assert both.formula_peak == pytest.approx(both.trace_peak, rel=1e-3)


@pytest.mark.parametrize("lora", [None, Lora(rank=8)])
def test_the_timeline_of_offloading(lora: Lora | None) -> None:
    """Every block is given back, and the highest point is the closed form's."""
    estimator = Estimator(read_architecture(CONFIG_BY_MODEL_TYPE["llama"], "config"), "llama")
    setup = Setup(seq_len=64, activation_checkpointing="full", offload="activations", lora=lora)
    live = highest = 0
    alive = set()
    for moment in timeline(estimator.program(setup), estimator.sizes(setup), 1):
        live += moment.sign * moment.num_bytes
        highest = max(highest, live)
        (alive.add if moment.sign > 0 else alive.remove)(moment.key)
    assert highest == estimator.memory(setup).peak_allocated_bytes


def test_what_waits_on_the_host() -> None:
    """llama-3-8b: 32 layers, each with its input of 2 x 1024 x 4096 numbers of two bytes."""
    kept = memplan.estimate("llama-3-8b", micro_batch=2, seq_len=1024, checkpointing="full")
    offloaded = memplan.estimate("llama-3-8b", micro_batch=2, seq_len=1024, checkpointing="full", offload="activations")
    assert kept.host_bytes == 0
    assert offloaded.host_bytes == 32 * 2 * 1024 * 4096 * 2
    assert kept.kept_activation_bytes - offloaded.kept_activation_bytes == offloaded.host_bytes


def test_nothing_to_offload() -> None:
    """Without checkpointing the question has no meaning."""
    with pytest.raises(UsageError, match="no layer is checkpointed"):
        Setup(offload="activations")
