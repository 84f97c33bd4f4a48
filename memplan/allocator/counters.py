"""What does the caching allocator count?

The numbers of `torch.cuda.memory_stats`, current and peak, and the actions that `torch.cuda.memory._snapshot` lists:

    requested    bytes that live tensors asked for
    allocated    bytes of their blocks
    active       the same with blocks that only another stream still uses
    reserved     bytes of all segments
    inactive_split   bytes of cached blocks of segments that are in use in part (0 with expandable segments)

Source: struct DeviceStats and struct TraceEntry in c10/core/CachingDeviceAllocator.h, PyTorch 2.13.
"""

from __future__ import annotations

from typing import Any

from memplan.specs.values import NamedTuple


class Action(NamedTuple):
    """One action of the allocator, in the words of `torch.cuda.memory._snapshot()`."""

    name: str
    """alloc, free_requested, free_completed, segment_alloc, segment_free, segment_map, segment_unmap or oom."""
    address: int
    """Of the block or segment; for oom the bytes that are free on the device."""
    num_bytes: int
    """Requested bytes of a block, bytes of a segment."""
    stream: int
    key: Any
    """The tensor; for segments None."""


class Counters:
    """Counts of one device's allocator; bytes unless they are numbers of calls."""

    def __init__(self, *, record: bool) -> None:
        self.actions: list[Action] | None = [] if record else None
        """Every action so far, where they are recorded."""
        self.requested = self.allocated = self.active = self.reserved = self.inactive_split = 0
        self.peak_requested = self.peak_allocated = self.peak_active = self.peak_reserved = 0
        self.peak_inactive_split = 0
        self.num_alloc_retries = 0
        """How often everything cached was given back because cudaMalloc failed."""
        self.num_ooms = 0
        self.num_device_allocs = 0
        """Calls of cudaMalloc, or pages mapped at once."""
        self.num_device_frees = 0

    def count_block(self, size: int, num_bytes: int) -> None:
        """A block of `size` bytes is handed out for `num_bytes`."""
        self.requested += num_bytes
        self.allocated += size
        self.active += size
        if self.requested > self.peak_requested:  # noqa: PLR1730 - max() doubles the time of this line
            self.peak_requested = self.requested
        if self.allocated > self.peak_allocated:  # noqa: PLR1730 - max() doubles the time of this line
            self.peak_allocated = self.allocated
        if self.active > self.peak_active:  # noqa: PLR1730 - max() doubles the time of this line
            self.peak_active = self.active

    def count_inactive_split(self, change: int) -> None:
        """Cached blocks beside blocks in use have become more (change > 0) or fewer bytes."""
        self.inactive_split += change
        if self.inactive_split > self.peak_inactive_split:  # noqa: PLR1730 - max() doubles the time of this line
            self.peak_inactive_split = self.inactive_split

    def count_reserved(self, change: int) -> None:
        """Segments have come (change > 0) or gone."""
        self.reserved += change
        if change > 0:
            self.num_device_allocs += 1
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        else:
            self.num_device_frees += 1

    def note(self, name: str, address: int, num_bytes: int, stream: int, key: Any) -> None:
        """Keep an action, where actions are recorded."""
        if self.actions is not None:
            self.actions.append(Action(name, address, num_bytes, stream, key))
