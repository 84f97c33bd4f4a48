"""What lies where in the segments of a caching allocator?

Source: DeviceCachingAllocator::snapshot in c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.13: of an expandable segment
each contiguous mapped part counts as a segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.allocator.blocks import Block
    from memplan.allocator.caching import CachingAllocator

INACTIVE, ACTIVE, PENDING = "inactive", "active_allocated", "active_pending_free"
"""States of a block, in the words of `torch.cuda.memory._snapshot()`."""


class BlockState(NamedTuple):
    """A block as it stands."""

    address: int
    num_bytes: int
    requested_bytes: int
    state: str
    """`INACTIVE`, `ACTIVE` or `PENDING`."""
    key: object
    """The tensor that holds it; None where it is inactive."""


class Segment(NamedTuple):
    """Memory from one cudaMalloc, or a contiguous mapped part of an expandable segment."""

    address: int
    num_bytes: int
    stream: int
    is_large: bool
    is_expandable: bool
    blocks: tuple[BlockState, ...]

    def bytes_in(self, *states: str) -> int:
        """Bytes of its blocks in any of the given states."""
        return sum(block.num_bytes for block in self.blocks if block.state in states)


def segments(allocator: CachingAllocator) -> tuple[Segment, ...]:
    """All segments with their blocks, by address."""
    key_by_address = {block.address: key for key, block in allocator.live.items() if block is not None}
    blocks = [block for block in allocator.live.values() if block is not None]
    for pool in allocator.all_pools():
        blocks += pool.blocks
    heads = [block for block in blocks if block.prev is None or not block.prev.is_mapped]
    return tuple(_segment(allocator, head, key_by_address) for head in sorted(heads, key=lambda block: block.address))


def _segment(allocator: CachingAllocator, head: Block, key_by_address: dict[int, Any]) -> Segment:
    states: list[BlockState] = []
    block: Block | None = head
    while block is not None and block.is_mapped:
        key = None if block.is_cached else key_by_address[block.address]
        state = INACTIVE if block.is_cached else PENDING if key in allocator.retired else ACTIVE
        states.append(BlockState(block.address, block.size, block.requested, state, key))
        block = block.next
    num_bytes = sum(state.num_bytes for state in states)
    pool = head.pool
    return Segment(head.address, num_bytes, pool.stream, pool.is_large, allocator.is_expandable, tuple(states))
