"""What does a run's sequence of allocations and releases do to the caching allocator, and does it run out?

    replay(events)                             reserved bytes where memory is no object
    replay(events, capacity_bytes=24 * GIB)    does it run out, and at which event?

An event is (key, num_bytes, sign) or (key, num_bytes, sign, stream): sign +1 allocates `num_bytes` under the name
`key`, -1 frees it (its bytes are not looked at), 0 says that the tensor is gone but another stream still uses its
block, and the -1 follows later.  The replay ends at the first event for which there is no memory, as training does.

Left out: what lies outside the allocator (CUDA context, NCCL): take it off the capacity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.allocator.caching import CachingAllocator
from memplan.allocator.expandable import ExpandableAllocator
from memplan.allocator.layout import segments
from memplan.allocator.rounding import fitting
from memplan.allocator.settings import AllocatorSettings
from memplan.errors import MemplanError, UsageError
from memplan.specs.values import NamedTuple, dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memplan.allocator.counters import Action
    from memplan.allocator.layout import Segment

ALLOCATE, FREE, RETIRE = 1, -1, 0
"""Signs of an event."""


class AllocatorEvent(NamedTuple):
    """One call of the allocator; a plain tuple of three or four will do as well."""

    key: Any
    """Names the tensor from its allocation to its release."""
    num_bytes: int
    sign: int
    """`ALLOCATE`, `FREE` or `RETIRE`."""
    stream: int = 0


class Sample(NamedTuple):
    """Bytes after an event."""

    event_index: int
    """From 0."""
    requested: int
    allocated: int
    active: int
    reserved: int
    inactive_split: int


class OutOfMemory(NamedTuple):
    """The event that there was no memory for."""

    event_index: int
    """From 0."""
    key: Any
    requested_bytes: int
    """What the tensor asked for."""
    segment_bytes: int
    """What cudaMalloc was asked for; with expandable segments at most this."""
    free_bytes: int
    """Free on the device, after everything that could be was given back."""
    cached_bytes: int
    """Reserved but in no tensor's block: what fragmentation holds."""
    largest_cached_bytes: int
    """The largest of these blocks."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What the allocator did; bytes throughout, in the words of torch.cuda.memory_stats."""

    num_events: int
    """Events replayed, the one that failed included."""

    peak_requested_bytes: int
    """Most bytes in live tensors."""

    peak_allocated_bytes: int
    """Most bytes in blocks of live tensors (`torch.cuda.max_memory_allocated`)."""

    peak_active_bytes: int
    """The same with blocks that only another stream still uses."""

    peak_reserved_bytes: int
    """Most bytes in segments (`torch.cuda.max_memory_reserved`)."""

    peak_reserved_index: int
    """The first event after which `peak_reserved_bytes` were reserved; -1 where nothing was."""

    peak_inactive_split_bytes: int
    """Most bytes in cached blocks that cannot be given back because a part of their segment is in use."""

    end: Sample
    """The state after the last event."""

    largest_cached_bytes: int
    """The largest cached block at the end."""

    num_alloc_retries: int
    """How often everything cached was given back because cudaMalloc failed: each stalls the device."""

    num_device_allocs: int
    """Calls of cudaMalloc, or pages mapped at once."""

    num_device_frees: int
    """Calls of cudaFree, or pages unmapped at once."""

    out_of_memory: OutOfMemory | None
    """None where the run completes."""

    segments: tuple[Segment, ...]
    """All segments at the end."""

    samples: tuple[Sample, ...] = ()
    """The state after every n-th event, where asked for."""

    actions: tuple[Action, ...] = ()
    """Every action of the allocator, where asked for."""

    @property
    def num_ooms(self) -> int:
        """1 where the run ran out, as torch.cuda.memory_stats counts; else 0."""
        return int(self.out_of_memory is not None)


def replay(
    events: Iterable[Sequence[Any]],
    settings: AllocatorSettings | None = None,
    *,
    capacity_bytes: int | None = None,
    device_bytes: int | None = None,
    sample_every: int = 0,
    record: bool = False,
) -> Replay:
    """Run the events through the allocator.

    Args:
        events: (key, num_bytes, sign[, stream]); see above.
        settings: of PYTORCH_ALLOC_CONF.
        capacity_bytes: bytes of the device that are left for the allocator; None: no limit.
        device_bytes: bytes of the device, for `memory_fraction`; `capacity_bytes` unless given.
        sample_every: keep the state after every n-th event; 0: none.
        record: keep all actions, for a snapshot file.

    Raises:
        MemplanError: a key allocated while it is live, or freed while it is not; a negative size.
    """
    if sample_every < 0:
        raise UsageError(f"sample_every is {sample_every}.", "Give 1 or more, or 0 for no samples.")
    allocator = new_allocator(settings, capacity_bytes=capacity_bytes, device_bytes=device_bytes, record=record)
    run = _Run(allocator, sample_every)
    try:
        run.play(events)
    except MemplanError as error:
        raise MemplanError(f"Event {run.index}: {error.cause}", error.cure) from error
    return run.result()


def new_allocator(
    settings: AllocatorSettings | None = None,
    *,
    capacity_bytes: int | None = None,
    device_bytes: int | None = None,
    record: bool = False,
) -> CachingAllocator:
    """An empty allocator of the kind that the settings ask for."""
    settings = settings or AllocatorSettings()
    kind = ExpandableAllocator if settings.expandable_segments else CachingAllocator
    return kind(settings, capacity_bytes=capacity_bytes, device_bytes=device_bytes, record=record)


def segments_at_peak(
    events: Sequence[Sequence[Any]], settings: AllocatorSettings | None = None, *, capacity_bytes: int | None = None
) -> tuple[Segment, ...]:
    """The segments and their blocks at the moment when most is reserved; replays twice."""
    peak = replay(events, settings, capacity_bytes=capacity_bytes)
    return replay(events[: peak.peak_reserved_index + 1], settings, capacity_bytes=capacity_bytes).segments


class _Run:
    """A replay under way."""

    def __init__(self, allocator: CachingAllocator, sample_every: int) -> None:
        self.allocator = allocator
        self.sample_every = sample_every
        self.samples: list[Sample] = []
        self.index = -1
        self.peak_index = -1
        self.out_of_memory: OutOfMemory | None = None

    def play(self, events: Iterable[Sequence[Any]]) -> None:
        allocator = self.allocator
        allocate, free = allocator.allocate, allocator.free
        sample_every, peak = self.sample_every, 0
        for self.index, event in enumerate(events):
            sign = event[2]
            if sign > 0:
                if not allocate(event[0], event[1], event[3] if len(event) > 3 else 0):
                    self._note_out_of_memory(event)
                    return
                if allocator.peak_reserved > peak:
                    peak = allocator.peak_reserved
                    self.peak_index = self.index
            elif sign < 0:
                free(event[0])
            else:
                allocator.retire(event[0])
            if sample_every and self.index % sample_every == 0:
                self.samples.append(self._sample())

    def result(self) -> Replay:
        allocator = self.allocator
        return Replay(
            num_events=self.index + 1,
            peak_requested_bytes=allocator.peak_requested,
            peak_allocated_bytes=allocator.peak_allocated,
            peak_active_bytes=allocator.peak_active,
            peak_reserved_bytes=allocator.peak_reserved,
            peak_reserved_index=self.peak_index,
            peak_inactive_split_bytes=allocator.peak_inactive_split,
            end=self._sample(),
            largest_cached_bytes=allocator.largest_cached_bytes(),
            num_alloc_retries=allocator.num_alloc_retries,
            num_device_allocs=allocator.num_device_allocs,
            num_device_frees=allocator.num_device_frees,
            out_of_memory=self.out_of_memory,
            segments=segments(allocator),
            samples=tuple(self.samples),
            actions=tuple(allocator.actions or ()),
        )

    def _sample(self) -> Sample:
        a = self.allocator
        return Sample(self.index, a.requested, a.allocated, a.active, a.reserved, a.inactive_split)

    def _note_out_of_memory(self, event: Sequence[Any]) -> None:
        allocator = self.allocator
        if allocator.peak_reserved > 0 and self.peak_index < 0:
            self.peak_index = self.index
        self.out_of_memory = OutOfMemory(
            event_index=self.index,
            key=event[0],
            requested_bytes=event[1],
            segment_bytes=fitting(event[1], allocator.settings).segment_bytes,
            free_bytes=max(allocator.limit() - allocator.reserved, 0),
            cached_bytes=allocator.reserved - allocator.active,
            largest_cached_bytes=allocator.largest_cached_bytes(),
        )
