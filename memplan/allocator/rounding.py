"""How many bytes does a request take, in which pool, and from what segment?

    request -> block: up to 512 bytes, or to a division of a power of two where that is set
    block <= 1 MiB  -> small pool, segments of 2 MiB
    block <  10 MiB -> large pool, segments of 20 MiB
    else            -> large pool, a segment of its own, rounded up to 2 MiB

Source: round_size, roundup_power2_next_division and get_allocation_size in c10/cuda/CUDACachingAllocator.cpp,
constants in c10/core/AllocatorConfig.h, PyTorch 2.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.allocator.settings import MIN_LARGE_ALLOC_BYTES, NUM_ROUNDUP_INTERVALS
from memplan.specs.values import NamedTuple
from memplan.units import MIB

if TYPE_CHECKING:
    from memplan.allocator.settings import AllocatorSettings

MIN_BLOCK_BYTES = 512
"""kMinBlockSize (c10/core/AllocatorConfig.h)."""

SMALL_BYTES = MIB
"""kSmallSize (c10/core/AllocatorConfig.h): the largest block of the small pool."""

SMALL_SEGMENT_BYTES = 2 * MIB
"""kSmallBuffer (c10/core/AllocatorConfig.h)."""

ROUND_LARGE_BYTES = 2 * MIB
"""kRoundLarge (c10/core/AllocatorConfig.h)."""


class Fitting(NamedTuple):
    """What a request of some size asks of the allocator."""

    block_bytes: int
    """The request rounded up."""
    is_large: bool
    """Which pool serves it."""
    segment_bytes: int
    """What cudaMalloc is asked for where no cached block fits."""


def fitting(num_bytes: int, settings: AllocatorSettings) -> Fitting:
    """Block, pool and segment for a request of `num_bytes` > 0."""
    block = round_size(num_bytes, settings)
    return Fitting(block, block > SMALL_BYTES, segment_size(block, settings))


def round_size(num_bytes: int, settings: AllocatorSettings) -> int:
    """Bytes of the block for a request."""
    if num_bytes < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    interval = min(max(num_bytes.bit_length() - 1 - 20, 0), NUM_ROUNDUP_INTERVALS - 1)  # 2^20 bytes: 1 MiB
    divisions = settings.roundup_power2_divisions[interval]
    if divisions > 1 and num_bytes > MIN_BLOCK_BYTES * divisions:
        step = (1 << (num_bytes.bit_length() - 1)) // divisions
        return round_up(num_bytes, step)
    return round_up(num_bytes, MIN_BLOCK_BYTES)


def segment_size(block_bytes: int, settings: AllocatorSettings) -> int:
    """Bytes asked of cudaMalloc for a block."""
    if block_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < MIN_LARGE_ALLOC_BYTES:
        return settings.large_segment_bytes
    return round_up(block_bytes, ROUND_LARGE_BYTES)


def round_up(number: int, step: int) -> int:
    """The least multiple of `step` that is not less than `number`."""
    return -(-number // step) * step
