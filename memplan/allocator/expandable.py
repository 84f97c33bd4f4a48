"""What changes with `expandable_segments:True`?

Each stream and pool has one segment: a range of addresses for 9/8 of the device, of which only pages are backed by
memory, 2 MiB each in the small pool and 20 MiB each in the large one.  A request that no cached block fits maps pages
where the lowest unmapped addresses are, next to the cached block before them if there is one; so the segment's end
grows by just what is missing.  Under pressure, whole pages within cached blocks are unmapped.  Any rest of at least 512
bytes is split off, in the large pool too, and `inactive_split` stays 0, as in PyTorch.

Source: Note [Expandable Segments], ExpandableSegment, find_expandable_block, map_block, try_allocate_expandable_block,
unmap_block and release_blocks in c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.13.

Left out: switching the option while a program runs, sharing between processes.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from memplan.allocator.blocks import Block, Pool
from memplan.allocator.caching import UNLIMITED_BYTES, CachingAllocator
from memplan.allocator.rounding import SMALL_SEGMENT_BYTES, round_up

if TYPE_CHECKING:
    from memplan.allocator.rounding import Fitting

UNLIMITED_RANGE_BYTES = 2**44
"""Addresses of a segment where the device has no limit: more than any device's memory."""


class ExpandableAllocator(CachingAllocator):
    """The allocator of one device with expandable segments."""

    is_expandable = True

    def take_cached(self, pool: Pool, size: int) -> Block | None:
        """As without expandable segments, but the end of a segment counts with the addresses it may grow into."""
        if self.ages_count and pool.is_large:
            self.large_searches += 1
        blocks = pool.blocks
        index = pool.first_of(size)
        if index == len(blocks):
            return None
        while index + 1 < len(blocks) and _reach(blocks[index + 1]) < _reach(blocks[index]):
            index += 1
        block = blocks[index]
        if not self.may_serve(block, size):
            return None
        pool.remove(block)
        return block

    def grow(self, pool: Pool, need: Fitting) -> Block | None:
        """A block of at least the wanted size with newly mapped pages in it; None where the device has no room."""
        if self.allowed is not None and self.reserved + need.segment_bytes > self.allowed:
            return None
        size = need.block_bytes
        block = self._find_range(pool, size)
        if not block.is_mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            after = block.next
            if after is None or not self._map(after, min(size - block.size, after.size)):
                return None
            block = after
        pool.remove(block)
        return block

    def release_pool(self, pool: Pool) -> None:
        """Unmap all pages that lie within cached blocks."""
        for block in list(pool.blocks):
            self._unmap(block)
            if not block.is_split() and not block.is_mapped:
                pool.unmapped.remove(block)

    def _page_bytes(self, pool: Pool) -> int:
        return self.settings.large_segment_bytes if pool.is_large else SMALL_SEGMENT_BYTES

    def _find_range(self, pool: Pool, size: int) -> Block:
        """The lowest unmapped block, or the cached one before it, from which `size` bytes can be had in a row."""
        for unmapped in pool.unmapped:
            before = unmapped.prev
            start = before if before is not None and before.is_cached else unmapped
            if _has_room(start, size):
                return start
        return self._new_range(pool)

    def _new_range(self, pool: Pool) -> Block:
        page = self._page_bytes(pool)
        total = self.device_bytes
        wanted = UNLIMITED_RANGE_BYTES if total >= UNLIMITED_BYTES else total + total // 8
        size = round_up(max(wanted, page), page)
        address = round_up(self.take_addresses(size + page), page)
        block = Block(pool, address, size)
        block.is_mapped = False
        insort(pool.unmapped, block, key=_address_of)
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Back the first `size` bytes of an unmapped block with pages, and cache it, merged with its neighbours."""
        pool = block.pool
        num_bytes = min(round_up(size, self._page_bytes(pool)), block.size)
        if self.reserved + num_bytes > self.capacity:
            return False
        pool.unmapped.remove(block)
        block.is_mapped = True
        address = block.address
        if num_bytes < block.size:
            rest = Block(pool, address + num_bytes, block.size - num_bytes)
            rest.is_mapped = False
            rest.link(block, block.next)
            block.size = num_bytes
            insort(pool.unmapped, rest, key=_address_of)
        self._give_back(block)
        self.count_reserved(num_bytes)
        self.note("segment_map", address, num_bytes, pool.stream, None)
        return True

    def _unmap(self, block: Block) -> None:
        """Take the whole pages out of a cached block; what lies before and after them stays cached."""
        pool, page = block.pool, self._page_bytes(block.pool)
        begin, end = round_up(block.address, page), (block.address + block.size) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.address:
            front = Block(pool, block.address, begin - block.address)
            front.link(block.prev, block)
            self._cache(front)
        if end < block.address + block.size:
            back = Block(pool, end, block.address + block.size - end)
            back.link(block, block.next)
            self._cache(back)
        block.address, block.size, block.is_mapped = begin, end - begin, False
        _merge_unmapped(block)
        insort(pool.unmapped, block, key=_address_of)
        self.count_reserved(begin - end)
        self.note("segment_unmap", begin, end - begin, pool.stream, None)

    def _cache(self, block: Block) -> None:
        block.born = self.large_searches
        block.pool.insert(block)


def _reach(block: Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and not after.is_mapped else 0)


def _has_room(start: Block, size: int) -> bool:
    room, block = 0, start
    while room < size:
        room += block.size
        after = block.next
        if after is None or not (after.is_cached or not after.is_mapped):
            break
        block = after
    return room >= size


def _merge_unmapped(block: Block) -> None:
    """Merge with unmapped neighbours, which leave their pool's list."""
    unmapped = block.pool.unmapped
    before, after = block.prev, block.next
    if before is not None and not before.is_mapped:
        unmapped.remove(before)
        block.address = before.address
        block.size += before.size
        block.link(before.prev, block.next)
    if after is not None and not after.is_mapped:
        unmapped.remove(after)
        block.size += after.size
        block.link(block.prev, after.next)


def _address_of(block: Block) -> int:
    return block.address
