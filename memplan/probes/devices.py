"""A device that training steps are measured on: what it holds, what it charges, how long it takes.

The card reads PyTorch's caching allocator (torch.cuda.memory_stats) and the driver; the CPU counts the storages that
operators make, as a trace does, but of tensors with numbers.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from memplan.errors import MemplanError
from memplan.operators.sizes import allocated
from memplan.specs.measurement import OTHERS_BYTES, Card
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.probes.nvml import Nvml

CUBLAS_FAILED = "CUBLAS_STATUS_ALLOC_FAILED"
OUT_OF_MEMORY_TEXTS = ("out of memory", CUBLAS_FAILED, "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
"""What errors of CUDA and its libraries say where they got no memory.

cuBLAS says NOT_INITIALIZED where its handle found none (cublasCreate allocates).
"""


class DeviceError(MemplanError):
    """There is no such device, or it cannot be used."""


class LimitReachedError(MemplanError):
    """A card of the limit's size would have had no memory left: the process takes more beside its tensors."""


class Reading(NamedTuple):
    """What a device holds now."""

    allocated: int
    peak_allocated: int
    """The most since the peaks were last reset."""
    reserved: int | None = None
    peak_reserved: int | None = None
    num_alloc_retries: int = 0
    num_ooms: int = 0


class Device(Protocol):
    """Where the tensors are."""

    type: str
    """As torch calls it: ``cuda``, ``cpu``."""
    process_basis: str
    """Who says what the process takes, see `Measurement.process_basis`."""
    context_bytes: int | None
    """What the driver charges before the first tensor."""

    def open(self, limit_bytes: int | None) -> Card:
        """Take the device into use, capped; what it is."""

    def settle(self) -> None:
        """Give back what building the model left in the cache."""

    def tighten(self) -> None:
        """Cap again, now that it is known what the process takes beside the tensors."""

    def read(self) -> Reading:
        """What it holds now; the peaks begin anew."""

    def process_bytes(self) -> int | None:
        """What the driver charges to this process."""

    def seconds(self, step: Callable[[], None]) -> float:
        """Do it, and say how long the device took."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error says that the device has no more memory."""

    def clocks(self) -> dict[str, int]:
        """MHz, now."""

    def workspace_bytes(self) -> int | None:
        """What cuBLAS holds; asked at the very end."""


class CudaDevice:
    """A card, through PyTorch's caching allocator and the driver."""

    type = "cuda"

    def __init__(self, index: int = 0, nvml: Nvml | None = None, cuda: Any = None, alloc_conf: str = "") -> None:
        """`nvml`: the driver's view of the same card; `cuda`: in place of torch.cuda.

        `alloc_conf`: the settings of the allocator, as PYTORCH_ALLOC_CONF has them.
        """
        self._alloc_conf = alloc_conf
        self._cuda: Any = torch.cuda if cuda is None else cuda
        self._nvml = nvml
        self._index = index
        self._used_before: int | None = None
        self._alone = False
        self._limit_bytes: int | None = None
        self._total_bytes = 0
        self.context_bytes: int | None = None
        self.process_basis = ""

    def open(self, limit_bytes: int | None) -> Card:
        """Make the context, measure it, and cap what the allocator may take beside it.

        Raises:
            DeviceError: there is no card, the driver is too old, or the limit does not hold the context.
        """
        others = None if self._nvml is None else self._nvml.processes()
        self._alone = others == {}
        self._used_before = None if self._nvml is None else self._nvml.used_bytes()
        cuda = self._cuda
        try:
            if self._alloc_conf:
                _set_allocator(cuda, self._alloc_conf)
            cuda.set_device(self._index)
            free, total = cuda.mem_get_info(self._index)
            properties = cuda.get_device_properties(self._index)
        except Exception as error:
            text = " ".join(str(error).split())
            cure = "Check that nvidia-smi works, that torch is built for CUDA, and that nobody fills the card."
            raise DeviceError(f"CUDA cannot be used: {text[:300]}", cure) from error
        used = None if self._nvml is None else self._nvml.used_bytes()
        own = None if self._nvml is None else self._nvml.own_bytes(alone=self._alone)
        self._choose_basis(own)
        self.context_bytes = own if own is not None else self._beyond_before(used)
        self._limit_bytes, self._total_bytes = limit_bytes, total
        # Where nobody says what the context takes, all that is taken of the card counts as if it did.
        beside = total - free if self.context_bytes is None else self.context_bytes
        if limit_bytes is not None and self.context_bytes is None and beside > OTHERS_BYTES:
            raise DeviceError(
                f"Of the card {beside:,} bytes are taken, and nobody says by whom: a limit would say nothing.",
                "Install nvidia-ml-py, or end what else is on the card.",
            )
        self._cap(beside)
        if limit_bytes is not None and free < limit_bytes - beside:
            raise DeviceError(
                f"Of the card {free:,} bytes are free, and a limit of {limit_bytes:,} needs {limit_bytes - beside:,}.",
                "End what else is on the card, or give a smaller --limit.",
            )
        return Card(
            device="cuda",
            name=properties.name,
            total_bytes=properties.total_memory,
            compute_capability=f"{properties.major}.{properties.minor}",
            driver=(self._nvml.driver() or "") if self._nvml is not None else "",
            clocks=self.clocks(),
            num_other_processes=None if others is None else len(others),
            other_bytes=self._used_before,
        )

    def _choose_basis(self, own: int | None) -> None:
        self.process_basis = "nvml" if own is not None else "device" if self._used_before is not None else ""

    def _beyond_before(self, used: int | None) -> int | None:
        return None if used is None or self._used_before is None else max(used - self._used_before, 0)

    def tighten(self) -> None:
        """Cap again by what the process really takes beside the allocator: kernels are loaded when they first run."""
        process = self.process_bytes()
        if process is None or self._limit_bytes is None:
            return
        reserved = self._cuda.memory_reserved(self._index)
        beside = max(process - reserved, 0)
        if beside >= self._limit_bytes:
            raise LimitReachedError(
                f"The process takes {beside:,} bytes beside its tensors, and the limit is {self._limit_bytes:,}."
            )
        self._cap(beside)
        if reserved > self._limit_bytes - beside:  # what was cached before has to be asked for again, within the cap
            self._cuda.empty_cache()

    def _cap(self, beside_bytes: int) -> None:
        """Leave to the allocator what a card of the limit's size would, with so many bytes taken beside it."""
        limit_bytes, total = self._limit_bytes, self._total_bytes
        if limit_bytes is None:
            return
        left = limit_bytes - beside_bytes
        if limit_bytes > total:
            raise DeviceError(
                f"The limit of {limit_bytes:,} bytes is more than the card has, {total:,}.", "Give a smaller --limit."
            )
        if left <= 0:
            raise DeviceError(
                f"The limit of {limit_bytes:,} bytes does not hold the CUDA context, {beside_bytes:,}.",
                "Give a larger --limit.",
            )
        self._cuda.set_per_process_memory_fraction(left / total, self._index)

    def settle(self) -> None:
        """Give back what building the model left in the cache."""
        gc.collect()
        self._cuda.synchronize()
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(self._index)

    def read(self) -> Reading:
        """The allocator's own statistics; they are the host's, so that nothing is waited for."""
        stats = self._cuda.memory_stats(self._index)
        self._cuda.reset_peak_memory_stats(self._index)
        return Reading(
            allocated=stats.get("allocated_bytes.all.current", 0),
            peak_allocated=stats.get("allocated_bytes.all.peak", 0),
            reserved=stats.get("reserved_bytes.all.current", 0),
            peak_reserved=stats.get("reserved_bytes.all.peak", 0),
            num_alloc_retries=stats.get("num_alloc_retries", 0),
            num_ooms=stats.get("num_ooms", 0),
        )

    def process_bytes(self) -> int | None:
        """What the driver charges: to this process, else of the card beyond what was taken before."""
        if self._nvml is None:
            return None
        if self.process_basis == "nvml":
            return self._nvml.own_bytes(alone=self._alone)
        return self._beyond_before(self._nvml.used_bytes())

    def seconds(self, step: Callable[[], None]) -> float:
        """Between two events on the card."""
        start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda.synchronize()
        start.record()
        step()
        stop.record()
        self._cuda.synchronize()
        return float(start.elapsed_time(stop)) / 1000

    def is_out_of_memory(self, error: BaseException) -> bool:
        """The allocator's own error, or a library's."""
        text = str(error)
        kind = getattr(torch, "OutOfMemoryError", None)
        if kind is not None and isinstance(error, kind):
            return True
        return isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY_TEXTS)

    def clocks(self) -> dict[str, int]:
        """MHz, now."""
        return {} if self._nvml is None else self._nvml.clocks()

    def workspace_bytes(self) -> int | None:
        """What cuBLAS holds in the allocator: it is given back to find out, so that this comes last."""
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is None:
            return None
        self._cuda.synchronize()
        before = self.read().allocated
        clear()
        return before - self.read().allocated


def _set_allocator(cuda: Any, alloc_conf: str) -> None:
    """The settings of the allocator, before it is used; the first name is that of PyTorch 2.10 on."""
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (setter or cuda.memory._set_allocator_settings)(alloc_conf)


class CpuDevice:
    """The CPU: every storage that an operator makes, rounded up as on a card."""

    type = "cpu"
    process_basis = ""
    context_bytes: int | None = None

    def __init__(self, *, has_padding: bool) -> None:
        from memplan.probes.attention import RANDOM_STATES
        from memplan.probes.recorder import StorageRecorder

        self.recorder = StorageRecorder(
            {}, RANDOM_STATES, has_padding=has_padding, trust=("transformers",), device="cpu"
        )
        self.hidden_bytes = 0
        """Bytes on the CPU that would be on the host: the step counters of optimizers."""
        self._position = 0
        self._level = 0

    def open(self, limit_bytes: int | None) -> Card:
        """Nothing has to be done.

        Raises:
            DeviceError: it was to be capped.
        """
        if limit_bytes is not None:
            raise DeviceError("A CPU has no limit that could be capped.", "Leave --limit out, or use a CUDA device.")
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1
        return Card(device="cpu", name="CPU", total_bytes=total)

    def settle(self) -> None:
        """Forget what building the model needed for a moment."""
        gc.collect()
        self.recorder.drop_dead()
        self._position = self._level = 0
        self.read()

    def tighten(self) -> None:
        """Nothing is capped."""

    def read(self) -> Reading:
        """The storages that are alive, and the most that were since the last reading."""
        level = peak = self._level
        events = self.recorder.raw_events(self._position)
        for num_bytes, sign in events:
            level += sign * allocated(num_bytes)
            peak = max(peak, level)
        self._position += len(events)
        self._level = level
        return Reading(level - self.hidden_bytes, peak - self.hidden_bytes)

    def process_bytes(self) -> int | None:
        """Nobody charges for tensors on a CPU."""
        return None

    def seconds(self, step: Callable[[], None]) -> float:
        """On the wall."""
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def is_out_of_memory(self, error: BaseException) -> bool:
        """The host is out of memory: no answer about a card."""
        return False

    def clocks(self) -> dict[str, int]:
        """Not read."""
        return {}

    def workspace_bytes(self) -> int | None:
        """There is no cuBLAS."""
        return None


@contextlib.contextmanager
def watching(device: Any) -> Any:
    """Count storages while steps run, where the device has no allocator that does."""
    recorder = getattr(device, "recorder", None)
    with contextlib.nullcontext() if recorder is None else recorder:
        yield
