"""What is the least memory with which a run completes?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.allocator.replay import ALLOCATE, FREE, replay
from memplan.allocator.rounding import ROUND_LARGE_BYTES, round_size, round_up
from memplan.allocator.settings import AllocatorSettings
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Capacity(NamedTuple):
    """The least bytes for the allocator with which a run completes."""

    num_bytes: int
    """With cached segments given back under pressure; 2 MiB less are not enough."""
    without_release_bytes: int
    """Without: no cudaMalloc ever fails, so that no step is slowed."""


def smallest_capacity(events: Iterable[Sequence[Any]], settings: AllocatorSettings | None = None) -> Capacity:
    """The least capacity with which the run completes, by bisection in steps of cudaMalloc's 2 MiB.

    A little more memory may let blocks lie where they hurt later, so that in theory a run may complete on one device
    and fail on a slightly larger one.  The answer completes, and 2 MiB less does not; it is not proved that no still
    smaller capacity happens to complete.  `memory_fraction` and garbage collection, being shares of a device, are
    switched off.
    """
    events = list(events)
    settings = replace(settings or AllocatorSettings(), memory_fraction=1.0, garbage_collection_threshold=0.0)
    most = replay(events, settings).peak_reserved_bytes
    fails, completes = _lower_bound(events, settings) // ROUND_LARGE_BYTES - 1, -(-most // ROUND_LARGE_BYTES)
    while completes - fails > 1:
        middle = (fails + completes) // 2
        if replay(events, settings, capacity_bytes=middle * ROUND_LARGE_BYTES).out_of_memory is None:
            completes = middle
        else:
            fails = middle
    return Capacity(min(completes * ROUND_LARGE_BYTES, most), most)


def _lower_bound(events: list[Sequence[Any]], settings: AllocatorSettings) -> int:
    """Bytes of rounded live tensors at their highest: no allocator does with less than these in 2 MiB pages."""
    live: dict[Any, int] = {}
    height = highest = 0
    for event in events:
        if event[2] == ALLOCATE:
            live[event[0]] = size = round_size(event[1], settings) if event[1] else 0
            height += size
            highest = max(highest, height)
        elif event[2] == FREE:
            height -= live.pop(event[0])
    return round_up(highest, ROUND_LARGE_BYTES)
