"""Measurements that nobody made: for tests of what is learnt from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan import measuring
from memplan.specs.measurement import Card, Measurement, PhaseBytes, StepRecord

if TYPE_CHECKING:
    from memplan.specs.measurement import Trial

H200 = Card(
    device="cuda", name="NVIDIA H200", total_bytes=150_754_820_096, compute_capability="9.0", driver="580.159.04"
)
STACK = {"torch": "2.11.0+cu130", "cuda": "13.0", "transformers": "5.17.0", "memplan-probe": "1"}


def steps(allocated: int, reserved: int | None, process: int | None) -> tuple[StepRecord, ...]:
    """Three equal steps of one phase."""
    phase = PhaseBytes("backward", allocated, allocated, reserved, reserved, process)
    return tuple(StepRecord(number, (phase,), 0, 0) for number in range(3))


def measurement(trial: Trial, *, card: Card = H200, outcome: str = "done", **given: Any) -> Measurement:
    """A record; by default of what the formula predicts, to the byte."""
    found: dict[str, Any] = {
        "measured_at": "2026-11-22T10:00:00Z",
        "versions": STACK,
        "process_basis": "nvml",
        "context_bytes": 500_000_000,
        "workspace_bytes": 67_108_864,
    }
    if outcome == "done" and "steps" not in given:
        gpu = measuring.gpu_of(card, trial.limit_bytes, trial.limit)
        memory = measuring.predict(trial, gpu).memory
        beside = memory.workspace_bytes if card.device == "cuda" else 0
        on_card = card.device == "cuda"
        found["steps"] = steps(
            memory.peak_allocated_bytes + beside,
            memory.peak_reserved_bytes + beside if on_card else None,
            memory.peak_process_bytes if on_card else None,
        )
    return Measurement(trial=trial, card=card, outcome=outcome, **{**found, **given})
