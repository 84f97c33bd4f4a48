"""What does each phase of a training step take?  Read off the device whenever a phase ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.sizes import allocated
from memplan.specs.measurement import PhaseBytes, StepRecord

if TYPE_CHECKING:
    import torch

    from memplan.probes.devices import Device, Reading


class PhaseMeter:
    """Watches the steps of a `memplan.probes.training.TrainingRun` on a device with numbers."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.kept_activation_bytes: int | None = None
        """What the last forward pass left."""
        self.position = "before the first step"
        """Where the run is, in words."""
        self._steps: dict[int, dict[str, PhaseBytes]] = {}
        self._current: tuple[str, int] | None = None
        self._before_forward = 0
        self._last: Reading | None = None
        self._held: dict[str, dict[int, int]] = {}

    def begin_step(self) -> None:
        """A step begins; its gradients are new."""
        self._held.clear()

    def enter(self, phase: str, step: int, micro_step: int) -> None:
        """Read what the phase before took, then begin the next."""
        self.close()
        self._current = (phase, step)
        self.position = f"{phase} of step {step}" + (f", micro-step {micro_step}" if micro_step >= 0 else "")
        if phase == "forward" and self._last is not None:
            self._before_forward = self._last.allocated

    def mark_kept(self) -> None:
        """Read what the forward pass left."""
        assert self._current is not None
        self.kept_activation_bytes = self._note(*self._current).allocated - self._before_forward

    def label(self, tensor: torch.Tensor, category: str, module: str, op: str) -> None:
        """Note the storage of a gradient or state."""
        storage = tensor.untyped_storage()
        self._held.setdefault(category, {})[storage.data_ptr()] = allocated(storage.nbytes())

    def held_bytes(self, category: str) -> int:
        """Allocated bytes of the tensors of a category in the last step, each storage once."""
        return sum(self._held.get(category, {}).values())

    def close(self) -> None:
        """The phase ends."""
        if self._current is None:
            self._last = self.device.read()
            return
        phase, step = self._current
        self._note(phase, step)
        self._current = None

    def step(self, number: int) -> StepRecord:
        """What a step took so far."""
        last = self._last
        return StepRecord(
            number=number,
            phases=tuple(self._steps.get(number, {}).values()),
            num_alloc_retries=0 if last is None else last.num_alloc_retries,
            num_ooms=0 if last is None else last.num_ooms,
        )

    def _note(self, phase: str, step: int) -> Reading:
        """Add what the device holds to the record of a phase."""
        now = self._last = self.device.read()
        phases = self._steps.setdefault(step, {})
        before = phases.get(phase)
        process = self.device.process_bytes()
        phases[phase] = PhaseBytes(
            name=phase,
            allocated_bytes=now.allocated,
            peak_allocated_bytes=max(now.peak_allocated, before.peak_allocated_bytes if before else 0),
            reserved_bytes=now.reserved,
            peak_reserved_bytes=_most(now.peak_reserved, before.peak_reserved_bytes if before else None),
            process_bytes=_most(process, before.process_bytes if before else None),
        )
        return now


class Unwatched:
    """A witness that takes no notice: for steps that are timed."""

    def begin_step(self) -> None:
        """A step begins."""

    def enter(self, phase: str, step: int, micro_step: int) -> None:
        """A phase begins."""

    def mark_kept(self) -> None:
        """A forward pass has ended."""

    def label(self, tensor: torch.Tensor, category: str, module: str, op: str) -> None:
        """What a tensor is for."""


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)
