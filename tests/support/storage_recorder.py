"""Which storages are alive at each instant of a program, and which operator made each of them?

A dispatch mode sees every operator below autograd. Each storage that an operator creates gets a record (who made it,
how large, when it was born) and a weak reference whose callback writes the time of its death. Nothing here holds a
tensor, so lifetimes are exactly those of the program. Only storages on the meta device are counted: they stand for
the GPU; CPU tensors (the step counters of foreach optimizers) do not.

Time is the number of allocations and frees so far. `allocated_bytes` counts as torch.cuda does: every storage rounded
up to 512 bytes (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK_BYTES = 512

Transients = dict[Any, Callable[..., int]]
"""Operator -> bytes of the buffers that its CUDA kernel allocates and frees again before it returns."""


def round_to_block(num_bytes: int) -> int:
    """Bytes that the caching allocator accounts for a request of `num_bytes`."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(slots=True)
class StorageRecord:
    """One storage: who made it, how large it is, when it lived."""

    module: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    birth: int
    death: int | None = None

    def is_alive_at(self, time: int) -> bool:
        return self.birth <= time and (self.death is None or time < self.death)


@dataclass(slots=True)
class Peak:
    """The instant within a phase at which most bytes were allocated."""

    phase: str
    allocated_bytes: int = 0
    transient_bytes: int = 0
    time: int = 0
    op: str = ""
    module: str = ""


@dataclass
class ModuleTrail:
    """Names the module at work: by the call stack in the forward pass, by autograd's sequence numbers in the backward.

    Autograd numbers its nodes in the order of creation; whenever the stack changes, the next number is noted, so that
    a node's number tells which module was running when it was created.
    """

    names: dict[int, str] = field(default_factory=dict)
    parameters: dict[int, str] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    first_numbers: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)

    def describe(self, model: torch.nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}

    def enter(self, module: torch.nn.Module) -> None:
        self.stack.append(self.names.get(id(module), self.stack[-1] if self.stack else ""))
        self._note()

    def leave(self) -> None:
        self.stack.pop()
        self._note()

    def forget_steps(self) -> None:
        self.first_numbers.clear()
        self.modules.clear()

    def current(self) -> str:
        if self.stack:
            return self.stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self.parameters.get(id(variable), "")
        index = bisect.bisect_right(self.first_numbers, node._sequence_nr()) - 1
        return self.modules[index] if index >= 0 else ""

    def _note(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self.first_numbers and self.first_numbers[-1] == number:
            self.modules[-1] = self.stack[-1] if self.stack else ""
            return
        self.first_numbers.append(number)
        self.modules.append(self.stack[-1] if self.stack else "")


class StorageRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Records birth and death of every meta storage made while it is active."""

    def __init__(
        self,
        transients: Transients | None = None,
        *,
        ignored: Callable[[Any, int], bool] | None = None,
        all_holds: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trail = ModuleTrail()
        self.records: list[StorageRecord] = []
        self.time = 0
        self.allocated_bytes = 0
        self.phases: list[Peak] = []
        self._transients = transients or {}
        self._ignored = ignored
        self._all_holds = all_holds
        self._live: dict[int, tuple[StorageRecord, weakref.ref[torch.UntypedStorage]]] = {}
        self._phase: Peak | None = None

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self._answer(args[0])
        outputs = func(*args, **(kwargs or {}))
        born = self._adopt(func, outputs)
        transient = self._transients.get(func)
        extra = transient(*args, **(kwargs or {})) if transient else 0
        if (born or extra) and self._phase is not None:
            self._note_peak(self._phase, str(func), extra)
        return outputs

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Peak]:
        """Collect the peak of what runs inside under `name`."""
        previous, self._phase = self._phase, Peak(phase=name)
        self._note_peak(self._phase, "(start)", 0)
        self.phases.append(self._phase)
        try:
            yield self._phase
        finally:
            self._phase = previous

    @property
    def current_phase(self) -> str:
        return self._phase.phase if self._phase else ""

    def live_records(self) -> list[StorageRecord]:
        return [record for record, _ in self._live.values()]

    def relabel(self, tensor: torch.Tensor, module: str, op: str) -> None:
        """Name a storage whose maker says less than its role (a parameter, a buffer, an input)."""
        record, _ = self._live[tensor.untyped_storage()._cdata]
        record.module, record.op = module, op
        record.shape, record.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def _answer(self, question: torch.Tensor) -> bool:
        """What the program is told when it looks at data that do not exist.

        The questions that models ask are "is every token real?" and "is each row one sequence?". A batch without
        padding and packing answers yes to all() and no to any(); with `all_holds=False` it is the other way round.
        """
        record, _ = self._live[question.untyped_storage()._cdata]
        if question.dtype != torch.bool:
            raise NotImplementedError(f"{record.module} asks for the value of a {record.op}: it depends on the data")
        return self._all_holds != record.op.startswith("aten.any")

    def _adopt(self, func: Any, outputs: Any) -> bool:
        if isinstance(outputs, torch.Tensor):
            return self._adopt_tensor(func, outputs, 0)
        born = False
        if isinstance(outputs, (tuple, list)):
            for index, output in enumerate(outputs):
                if isinstance(output, torch.Tensor):
                    born = self._adopt_tensor(func, output, index) or born
        return born

    def _adopt_tensor(self, func: Any, tensor: torch.Tensor, index: int) -> bool:
        if tensor.device.type != "meta":
            return False
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._live or not num_bytes or (self._ignored and self._ignored(func, index)):
            return False
        self.time += 1
        record = StorageRecord(
            module=self.trail.current(),
            op=str(func).removesuffix(".default"),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            num_bytes=num_bytes,
            birth=self.time,
        )
        self.records.append(record)
        self._live[key] = (record, weakref.ref(storage, functools.partial(self._on_death, key)))
        self.allocated_bytes += round_to_block(num_bytes)
        return True

    def _on_death(self, key: int, _: object) -> None:
        record, _reference = self._live.pop(key)
        self.time += 1
        record.death = self.time
        self.allocated_bytes -= round_to_block(record.num_bytes)

    def _note_peak(self, peak: Peak, op: str, transient_bytes: int) -> None:
        if self.allocated_bytes + transient_bytes > peak.allocated_bytes:
            peak.allocated_bytes = self.allocated_bytes + transient_bytes
            peak.transient_bytes, peak.time = transient_bytes, self.time
            peak.op, peak.module = op.removesuffix(".default"), self.trail.current()
