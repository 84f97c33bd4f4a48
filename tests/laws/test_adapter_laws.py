"""Laws of adapters: what layers and ranks add up to."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from tests.laws.models import RECORDINGS, peaks

LAYERS = (0, 1, 2)
TARGETS = ("q_proj", "v_proj")
models = st.sampled_from(["llama", "qwen2", "mixtral"])
ranks = st.integers(1, 64)
precisions = st.sampled_from(["bf16", "bf16-mixed", "fp32"])
checkpointings = st.sampled_from(["none", "full"])


def num_trained(model: str, setup: Setup) -> int:
    return RECORDINGS[model].program(setup).states.num_trained


def setup_of(rank: int, choices: dict[str, Any], **lora: Any) -> Setup:
    return Setup(micro_batch_size=2, seq_len=64, lora=Lora(rank=rank, targets=TARGETS, **lora), **choices)


some = st.fixed_dictionaries({"precision": precisions, "activation_checkpointing": checkpointings})


@settings(max_examples=25)
@given(model=models, rank=ranks, choices=some, layers=st.sets(st.sampled_from(LAYERS), min_size=1, max_size=2))
def test_layers_add_up(model: str, rank: int, choices: dict[str, Any], layers: set[int]) -> None:
    """Adapters of some layers and those of the others are those of all."""
    chosen = tuple(sorted(layers))
    others = tuple(n for n in LAYERS if n not in layers)
    parts = [num_trained(model, setup_of(rank, choices, layers=part)) for part in (chosen, others)]
    assert sum(parts) == num_trained(model, setup_of(rank, choices))


@settings(max_examples=25)
@given(model=models, rank=ranks, other=ranks, choices=some)
def test_a_rank_of_all_is_the_rank(model: str, rank: int, other: int, choices: dict[str, Any]) -> None:
    """GIVEN a pattern that fits everything THEN nothing is left of the rank beside it."""
    setup, plain = setup_of(other, choices, ranks=((".*", rank),)), setup_of(rank, choices)
    assert peaks(model, setup) == peaks(model, plain)
    assert num_trained(model, setup) == num_trained(model, plain)


@settings(max_examples=25)
@given(model=models, rank=ranks, more=ranks, choices=some)
def test_more_rank_takes_no_less(model: str, rank: int, more: int, choices: dict[str, Any]) -> None:
    """Neither kept bytes nor the peak get smaller where one layer's rank grows."""
    small, large = (
        peaks(model, setup_of(8, choices, ranks=((r"layers\.1\..*v_proj", r),))) for r in (rank, rank + more)
    )
    assert small.kept_activation_bytes <= large.kept_activation_bytes
    assert small.peak <= large.peak
