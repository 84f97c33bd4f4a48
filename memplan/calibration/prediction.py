"""What memplan says of a trial, in the terms in which a card counts.

cuBLAS takes its workspaces from PyTorch's allocator, so that torch.cuda counts them as allocated and reserved; an
estimate lists them apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimate, Memory
    from memplan.specs.measurement import Measurement


QUANTITIES = ("allocated", "reserved", "process", "step_time")
"""What is predicted and measured: three kinds of bytes, and seconds."""


class Prediction(NamedTuple):
    """One trial, predicted; None where there is no number."""

    allocated: int | None = None
    reserved: int | None = None
    process: int | None = None
    step_time: float | None = None
    reason: str = ""
    """Why there is none, empty where there is."""

    def of(self, quantity: str) -> float | None:
        """One of `QUANTITIES`."""
        value: float | None = getattr(self, quantity)
        return value


def prediction_of(estimate: Estimate, device: str = "cuda") -> Prediction:
    """An estimate as the device counts: on a CPU there are tensors alone."""
    if device == "cpu":
        return Prediction(allocated=estimate.memory.peak_allocated_bytes)
    time = estimate.step_time
    return on_card(estimate.memory, None if time is None else time.total_s)


def on_card(memory: Memory, step_time_s: float | None) -> Prediction:
    """The bytes of a setup as torch.cuda and nvidia-smi count them."""
    return Prediction(
        allocated=memory.peak_allocated_bytes + memory.workspace_bytes,
        reserved=memory.peak_reserved_bytes + memory.workspace_bytes,
        process=memory.peak_process_bytes,
        step_time=step_time_s,
    )


def measured(measurement: Measurement, quantity: str) -> float | None:
    """One of `QUANTITIES`; None where it was not measured."""
    if quantity == "step_time":
        return measurement.step_time_s
    value: float | None = getattr(measurement, f"peak_{quantity}_bytes")
    return value
