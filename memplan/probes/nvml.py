"""What does the driver say of a card: who is on it, how much each process takes, how fast it runs?

NVIDIA's management library through pynvml (package nvidia-ml-py), which needs no CUDA context.  Where it is missing or
does not answer, nobody knows: every question has None as its answer.  A process is found by its own number; where the
driver lists numbers of another namespace (a container), it is the only one on the card or it is not found.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Nvml:
    """The driver's view of one card."""

    def __init__(self, library: Any, handle: Any) -> None:
        """`library`: pynvml, initialised; `handle`: of the card."""
        self._library = library
        self._handle = handle

    def driver(self) -> str | None:
        """Version of the driver."""
        text = self._ask("nvmlSystemGetDriverVersion", card=False)
        return text.decode() if isinstance(text, bytes) else text

    def used_bytes(self) -> int | None:
        """Bytes of the card that are taken, by anyone."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def processes(self) -> dict[int, int | None] | None:
        """Number of each process with a context on the card -> its bytes, None where these are not known."""
        found = self._ask("nvmlDeviceGetComputeRunningProcesses")
        return None if found is None else {one.pid: one.usedGpuMemory for one in found}

    def own_bytes(self, *, alone: bool) -> int | None:
        """Bytes that the driver charges to this process; `alone`: nobody else was on the card before it."""
        found = self.processes()
        if not found:
            return None
        if os.getpid() in found:
            return found[os.getpid()]
        return next(iter(found.values())) if alone and len(found) == 1 else None

    def clocks(self) -> dict[str, int]:
        """MHz of the multiprocessors and of the memory, now."""
        library = self._library
        kinds = {"sm": "NVML_CLOCK_SM", "memory": "NVML_CLOCK_MEM"}
        found = {
            name: self._ask("nvmlDeviceGetClockInfo", getattr(library, kind, None)) for name, kind in kinds.items()
        }
        return {name: int(value) for name, value in found.items() if value is not None}

    def _ask(self, function: str, *args: Any, card: bool = True) -> Any:
        ask: Callable[..., Any] = getattr(self._library, function)
        with contextlib.suppress(self._library.NVMLError):
            return ask(self._handle, *args) if card else ask(*args)
        return None


@contextlib.contextmanager
def open_nvml(index: int | str) -> Iterator[Nvml | None]:
    """The driver's view of the card with this index or UUID, None where there is no way to ask."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield _of_card(pynvml, index)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _of_card(library: Any, index: int | str) -> Nvml | None:
    try:
        if isinstance(index, str):
            return Nvml(library, library.nvmlDeviceGetHandleByUUID(index))
        return Nvml(library, library.nvmlDeviceGetHandleByIndex(index))
    except library.NVMLError:
        return None


def visible_card(position: int, visible: str | None) -> int | str:
    """Index or UUID of the card that CUDA calls `position`, given CUDA_VISIBLE_DEVICES.

    Indices are the driver's own with CUDA_DEVICE_ORDER=PCI_BUS_ID, and on machines of equal cards; elsewhere CUDA may
    put a faster card first.
    """
    if not visible:
        return position
    names = [name.strip() for name in visible.split(",")]
    if position >= len(names):
        return position
    name = names[position]
    return int(name) if name.isdigit() else name
