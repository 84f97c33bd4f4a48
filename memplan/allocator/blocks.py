"""What is a block, and how is the cached block that fits best found quickly?

Blocks of a segment are linked to their neighbours.  The cached ones of a pool lie in two lists that run in parallel:
`keys`, sorted, and `blocks`.  A key is one integer, `size * 2^64 + address`, so that the order is by size and then by
address, bisection compares machine-near integers, and the best fit for n bytes is the first key >= n * 2^64.

Source: struct Block, struct BlockPool and BlockComparatorSize in c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.13.
There the set of a pool holds all streams; here each stream has pools of its own, which is the same order cut in pieces.
"""

from __future__ import annotations

from bisect import bisect_left

ADDRESS_BITS = 64
"""Low bits of a key that hold the address."""


class Block:
    """A stretch of a segment: handed out, cached, or (expandable segments only) without memory behind it."""

    __slots__ = ("address", "born", "is_cached", "is_mapped", "next", "pool", "prev", "requested", "size")

    def __init__(self, pool: Pool, address: int, size: int) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.requested = 0
        """Bytes that the tensor asked for; of a cached block, those of the last one."""
        self.prev: Block | None = None
        self.next: Block | None = None
        self.is_cached = False
        """Free for reuse, and in the lists of its pool."""
        self.is_mapped = True
        self.born = 0
        """Searches of the pool until the block was cached: its age for garbage collection."""

    def is_split(self) -> bool:
        """Whether it is not a whole segment."""
        return self.prev is not None or self.next is not None

    def link(self, before: Block | None, after: Block | None) -> None:
        """Put between two neighbours."""
        self.prev, self.next = before, after
        if before is not None:
            before.next = self
        if after is not None:
            after.prev = self


class Pool:
    """The cached blocks of one size class (small or large) on one stream."""

    __slots__ = ("blocks", "is_large", "keys", "least_rest", "split_below", "stream", "unmapped")

    def __init__(self, stream: int, is_large: bool, least_rest: int, split_below: int) -> None:
        self.stream = stream
        self.is_large = is_large
        self.least_rest = least_rest
        """Bytes of the smallest rest that is split off a block."""
        self.split_below = split_below
        """Requests of this size or more take whole blocks."""
        self.keys: list[int] = []
        self.blocks: list[Block] = []
        self.unmapped: list[Block] = []
        """Stretches of expandable segments without memory, by address."""

    def insert(self, block: Block) -> None:
        """Cache a block."""
        key = (block.size << ADDRESS_BITS) + block.address
        index = bisect_left(self.keys, key)
        self.keys.insert(index, key)
        self.blocks.insert(index, block)
        block.is_cached = True

    def remove(self, block: Block) -> None:
        """Take a cached block out, whose size and address are those it was inserted with."""
        index = bisect_left(self.keys, (block.size << ADDRESS_BITS) + block.address)
        del self.keys[index]
        del self.blocks[index]
        block.is_cached = False

    def first_of(self, size: int) -> int:
        """Index of the smallest cached block of at least `size` bytes; the length of the lists where there is none."""
        return bisect_left(self.keys, size << ADDRESS_BITS)
