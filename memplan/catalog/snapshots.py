"""How are PyTorch's memory snapshots read, and compared with the simulated allocator?

    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    ...                                                  # a few training steps
    torch.cuda.memory._dump_snapshot("snapshot.pickle")

    for device in read_snapshot("snapshot.pickle"):
        compare_reserved(device)                         # recorded and simulated peak of reserved bytes

A snapshot is a dict: `segments`, the state at the end; `device_traces`, for each device the last actions of its
allocator.  Where the recording began after tensors were allocated, those tensors are known only from their release or
from the segments at the end: they become allocations before the first event, by address.

Source: docstring of torch.cuda.memory._snapshot and torch/cuda/_memory_viz.py, PyTorch 2.13.

Left out: explicit calls of torch.cuda.empty_cache, which a trace does not tell from releases under pressure, and
private pools (CUDA graphs, torch.cuda.MemPool), whose tensors are replayed in the common pool: they are counted.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memplan.allocator.replay import ALLOCATE, FREE, RETIRE, AllocatorEvent, replay
from memplan.allocator.settings import AllocatorSettings, parse_alloc_conf
from memplan.catalog.pickles import load_plain
from memplan.catalog.snapshot_writing import Frame, write_snapshot
from memplan.errors import ConfigError, MemplanError
from memplan.specs.values import NamedTuple, dataclass
from memplan.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "DeviceSnapshot",
    "Frame",
    "ReservedComparison",
    "compare_reserved",
    "read_snapshot",
    "write_snapshot",
]

MAX_FILE_BYTES = 2 * GIB
"""Larger files are refused: once loaded they take about ten times as much."""

MAX_NUMBER = 2**63
"""Addresses and sizes lie below."""

CURE = "Write it with torch.cuda.memory._dump_snapshot and copy the whole file."

STATES = {"active_allocated", "active_pending_free", "active_awaiting_free", "inactive"}
"""States of a block; the documentation says `awaiting`, the code `pending`."""


@dataclass(frozen=True, kw_only=True)
class DeviceSnapshot:
    """What a snapshot says about one device."""

    device: int
    """CUDA's number of it."""

    events: tuple[AllocatorEvent, ...]
    """Its allocations and releases, those of tensors from before the recording first; for `replay`."""

    num_prior_tensors: int
    """Tensors that were allocated before the recording began."""

    num_private_pool_events: int
    """Recorded actions in private pools."""

    num_ooms: int
    """Recorded allocations that failed."""

    num_segments: int
    """At the end, as are the next four."""

    reserved_bytes: int
    """In all segments."""

    active_bytes: int
    """In blocks that a tensor or a stream uses."""

    allocated_bytes: int
    """In blocks of tensors."""

    requested_bytes: int
    """Asked for by tensors."""

    peak_reserved_bytes: int
    """Most that was reserved since the recording began."""

    alloc_conf: str
    """PYTORCH_ALLOC_CONF of the recorded process."""

    @property
    def settings(self) -> AllocatorSettings:
        """`alloc_conf` as settings; a `UsageError` where memplan does not model it."""
        return parse_alloc_conf(self.alloc_conf)


class ReservedComparison(NamedTuple):
    """Recorded against simulated."""

    recorded_bytes: int
    simulated_bytes: int

    @property
    def relative_error(self) -> float:
        """Simulated over recorded, less 1; 0 where nothing was recorded."""
        return self.simulated_bytes / self.recorded_bytes - 1.0 if self.recorded_bytes else 0.0


def read_snapshot(path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> tuple[DeviceSnapshot, ...]:
    """What a snapshot file says, for each device with segments or actions.  Nothing in the file is run.

    Raises:
        MemplanError: the file is not there, or too large.
        ConfigError: it is truncated, holds more than plain values, or is not a memory snapshot.
    """
    name = os.path.basename(path)
    data = _read_bytes(path, max_bytes)
    content = load_plain(data, source=name, cure=CURE)
    if isinstance(content, list):  # torch.cuda.memory_snapshot(): the segments alone
        content = {"segments": content}
    if not isinstance(content, dict) or "segments" not in content:
        raise ConfigError(f"{name} is a pickle, but not a memory snapshot.", CURE)
    return tuple(_Reader(name, most_entries=len(data)).devices(content))


def compare_reserved(device: DeviceSnapshot, settings: AllocatorSettings | None = None) -> ReservedComparison:
    """The recorded peak of reserved bytes against the replay's, with the recorded settings unless others are given."""
    simulated = replay(device.events, settings or device.settings)
    return ReservedComparison(device.peak_reserved_bytes, simulated.peak_reserved_bytes)


def _read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise MemplanError(f"{name} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(data) > max_bytes:
        raise MemplanError(
            f"{name} has more than {max_bytes:,} bytes.",
            "Record fewer steps: torch.cuda.memory._record_memory_history(max_entries=100_000).",
        )
    return data


class _Reader:
    """Checks and translates the content of one file."""

    def __init__(self, name: str, most_entries: int) -> None:
        """`most_entries`: as many as a file of this size may list, each with some bytes of its own."""
        self.name = name
        self.entries_left = most_entries

    def devices(self, content: dict[Any, Any]) -> Iterator[DeviceSnapshot]:
        segments: dict[int, list[dict[Any, Any]]] = {}
        for segment in self.dicts(content["segments"], "segments"):
            segments.setdefault(self.number(segment, "device", 0), []).append(segment)
        traces = content.get("device_traces", [])
        if not isinstance(traces, list):
            raise self.fault("device_traces is not a list")
        alloc_conf = self.alloc_conf(content.get("allocator_settings", {}))
        recorded = {n for n, trace in enumerate(traces) if trace}
        for device in sorted(recorded | set(segments)):
            trace = self.dicts(traces[device], f"device_traces[{device}]") if device in recorded else []
            yield self.device(device, segments.get(device, []), trace, alloc_conf)

    def device(self, device: int, segments: list[Any], trace: list[Any], alloc_conf: str) -> DeviceSnapshot:
        blocks = [block for segment in segments for block in self.blocks(segment)]
        live = {address: (requested, stream) for address, _, requested, state, stream in blocks if state != "inactive"}
        events, num_prior = _Translation(self).events(trace, live)
        reserved = sum(self.number(segment, "total_size") for segment in segments)
        return DeviceSnapshot(
            device=device,
            events=events,
            num_prior_tensors=num_prior,
            num_private_pool_events=sum(entry.get("pool_id", (0, 0)) != (0, 0) for entry in trace),
            num_ooms=sum(entry.get("action") == "oom" for entry in trace),
            num_segments=len(segments),
            reserved_bytes=reserved,
            active_bytes=sum(size for _, size, _, state, _ in blocks if state != "inactive"),
            allocated_bytes=sum(size for _, size, _, state, _ in blocks if state == "active_allocated"),
            requested_bytes=sum(requested for requested, _ in live.values()),
            peak_reserved_bytes=self.peak_reserved(trace, reserved),
            alloc_conf=alloc_conf,
        )

    def blocks(self, segment: dict[Any, Any]) -> Iterator[tuple[int, int, int, str, int]]:
        """Address, bytes, requested bytes, state and stream of each block of a segment."""
        address, stream = self.number(segment, "address"), self.number(segment, "stream", 0)
        for block in self.dicts(segment.get("blocks", []), "blocks"):
            size, state = self.number(block, "size"), block.get("state")
            if not isinstance(state, str) or state not in STATES:
                raise self.fault("a block has no known state")
            yield address, size, self.number(block, "requested_size", size), state, stream
            address += size

    def peak_reserved(self, trace: list[Any], reserved: int) -> int:
        """Backwards from what is reserved at the end."""
        peak = reserved
        for entry in reversed(trace):
            action = entry.get("action")
            if action in ("segment_alloc", "segment_map"):
                reserved -= self.number(entry, "size")
            elif action in ("segment_free", "segment_unmap"):
                reserved += self.number(entry, "size")
                peak = max(peak, reserved)
        return peak

    def alloc_conf(self, settings: Any) -> str:
        if not isinstance(settings, dict):
            return ""
        text = settings.get("PYTORCH_ALLOC_CONF") or settings.get("PYTORCH_CUDA_ALLOC_CONF") or ""
        return text if isinstance(text, str) else ""

    def dicts(self, value: Any, what: str) -> list[dict[Any, Any]]:
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.fault(f"{what} is not a list of dicts")
        self.entries_left -= len(value)
        if self.entries_left < 0:
            raise self.fault("it lists the same entries over and over")
        return value

    def number(self, entry: dict[Any, Any], name: str, default: int | None = None) -> int:
        value = entry.get(name, default)
        if type(value) is not int or not 0 <= value < MAX_NUMBER:
            raise self.fault(f"{name} is not a whole number from 0 to 2^63")
        return value

    def fault(self, cause: str) -> ConfigError:
        return ConfigError(f"{self.name} is not a memory snapshot: {cause}.", CURE)


class _Translation:
    """A trace as events."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader
        self.event_list: list[AllocatorEvent] = []
        self.prior: list[AllocatorEvent] = []
        self.live: dict[int, AllocatorEvent] = {}
        """Address -> the allocation that lies there."""

    def events(
        self, trace: list[Any], live_at_end: dict[int, tuple[int, int]]
    ) -> tuple[tuple[AllocatorEvent, ...], int]:
        """All events, and how many of them are tensors from before the recording."""
        number = self.reader.number
        for n, entry in enumerate(trace):
            action = entry.get("action")
            if action == "alloc":
                self.allocate(number(entry, "addr"), number(entry, "size"), number(entry, "stream", 0), n)
            elif action == "free_completed":
                event = self.known(entry)
                del self.live[event.key[0]]
                self.event_list.append(event._replace(sign=FREE))
            elif action == "free_requested" and not _completes(trace, n):
                self.event_list.append(self.known(entry)._replace(sign=RETIRE))
        for address, (requested, stream) in live_at_end.items():
            if address not in self.live:
                self.prior.append(AllocatorEvent((address, -1), requested, ALLOCATE, stream))
        self.prior.sort(key=lambda event: event.key)
        return (*self.prior, *self.event_list), len(self.prior)

    def allocate(self, address: int, size: int, stream: int, n: int) -> None:
        if address in self.live:
            raise self.reader.fault(f"entry {n} allocates a block that is in use")
        self.live[address] = event = AllocatorEvent((address, n), size, ALLOCATE, stream)
        self.event_list.append(event)

    def known(self, entry: dict[Any, Any]) -> AllocatorEvent:
        """The allocation that an entry frees; one before the recording where none is recorded."""
        number = self.reader.number
        address = number(entry, "addr")
        event = self.live.get(address)
        if event is None:
            event = AllocatorEvent((address, -1), number(entry, "size"), ALLOCATE, number(entry, "stream", 0))
            self.live[address] = event
            self.prior.append(event)
        return event


def _completes(trace: list[Any], n: int) -> bool:
    """Whether the release requested by entry `n` completes with the next entry: no other stream used the block."""
    after = trace[n + 1] if n + 1 < len(trace) else {}
    return after.get("action") == "free_completed" and after.get("addr") == trace[n].get("addr")
