"""What does PyTorch's CUDA caching allocator reserve, and when does it run out?

A request is rounded (see `rounding`), and the smallest cached block of its stream and pool that is large enough is
taken; a rest of at least 512 bytes (small pool) or more than 1 MiB (large pool) is split off and stays cached.  Where
no block fits, cudaMalloc is asked for a segment; where that fails, cached segments are given back (see `pressure`) and
it is asked again.  A freed block merges with its cached neighbours at once.

The numbers are those of `torch.cuda.memory_stats`:

    requested <= allocated <= active <= reserved       inactive_split <= reserved - active

`allocated` counts whole blocks: a rest of up to 1 MiB that is not split off counts as allocated.  A tensor that is gone
while another stream still uses its block leaves `allocated` at once, and `requested` and `active` with the block.

Source: DeviceCachingAllocator::malloc, alloc_found_block, free and free_block in c10/cuda/CUDACachingAllocator.cpp,
PyTorch 2.13.  Left out: private pools (CUDA graphs, torch.cuda.MemPool), several devices, and the addresses that CUDA
would choose: segments lie one after the other in the order of their allocation, a freed one's place is taken by the
next of its size.  Addresses decide only between cached blocks of equal size.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from memplan.allocator.blocks import ADDRESS_BITS, Block, Pool
from memplan.allocator.counters import Counters
from memplan.allocator.pressure import collect_garbage, release_available, release_cached
from memplan.allocator.rounding import MIN_BLOCK_BYTES, SMALL_BYTES, Fitting, fitting
from memplan.allocator.settings import AllocatorSettings
from memplan.errors import MemplanError, UsageError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

FIRST_ADDRESS = 0x7F00_0000_0000
"""Where the first segment lies: the region in which CUDA's addresses usually are; exact in a JavaScript number."""

UNLIMITED_BYTES = 2**60
"""Stands for no limit."""

_ABSENT: Any = object()


class CachingAllocator(Counters):
    """The allocator of one device; each method is one call of PyTorch's."""

    is_expandable = False

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        device_bytes: int | None = None,
        record: bool = False,
    ) -> None:
        """An empty allocator.

        Args:
            settings: of PYTORCH_ALLOC_CONF; PyTorch's defaults unless given.
            capacity_bytes: bytes that cudaMalloc can hand out in all: the device less the context and other processes.
            device_bytes: bytes of the device, of which `memory_fraction` is a share; `capacity_bytes` unless given.
            record: keep every action in `actions`.
        """
        super().__init__(record=record)
        self.settings = settings = settings or AllocatorSettings()
        if capacity_bytes is not None and capacity_bytes < 0:
            raise UsageError(f"The capacity is negative: {capacity_bytes} bytes.", "Give bytes of 0 or more.")
        self.capacity = UNLIMITED_BYTES if capacity_bytes is None else capacity_bytes
        self.device_bytes = device_bytes or self.capacity
        self.allowed: int | None = None
        """Bytes that `memory_fraction` allows; None where it is 1 (DeviceCachingAllocator::setMemoryFraction)."""
        if settings.memory_fraction < 1.0 and self.device_bytes < UNLIMITED_BYTES:
            self.allowed = int(settings.memory_fraction * self.device_bytes)
        self.ages_count = self.allowed is not None and settings.garbage_collection_threshold > 0.0
        """Whether garbage is collected, and so whether blocks age."""
        self.max_split = settings.max_split_size_bytes or UNLIMITED_BYTES
        self.large_searches = 0
        self.pools: dict[int, tuple[Pool, Pool]] = {}
        """Stream -> its small and its large pool."""
        self.live: dict[Any, Block | None] = {}
        """Key -> its block, also where only another stream still uses it; None for a tensor without bytes."""
        self.retired: set[Any] = set()
        """Keys that were freed while another stream still uses their block."""
        self.finished: set[Any] = set()
        """Retired keys whose block was taken back under pressure, before their release was announced."""
        self._fittings: dict[int, Fitting] = {}
        self._vacant: dict[int, list[int]] = {}
        self._next_address = FIRST_ADDRESS

    # ------------------------------------------------------------------------------------------ calls of the program

    def allocate(self, key: Hashable, num_bytes: int, stream: int = 0) -> bool:
        """Hand out a block to the tensor `key`; False where the device has no room for it, even after releasing."""
        if key in self.live:
            raise MemplanError("A tensor is allocated twice without being freed.", "Give every tensor its own key.")
        if num_bytes <= 0:
            return self._allocate_nothing(key, num_bytes)
        need = self._fittings.get(num_bytes)
        if need is None:
            need = self._fittings[num_bytes] = fitting(num_bytes, self.settings)
        pools = self.pools.get(stream)
        if pools is None:
            pools = self.pools[stream] = self._new_pools(stream)
        pool = pools[need[1]]
        block = self.take_cached(pool, need[0]) or self._obtain(pool, need)
        if block is None:
            self.num_ooms += 1
            self.note("oom", self.free_device_bytes(), need[0], stream, key)
            return False
        block = self._hand_out(block, need[0])
        block.requested = num_bytes
        self.live[key] = block
        self.count_block(block.size, num_bytes)
        if self.actions is not None:
            self.note("alloc", block.address, num_bytes, stream, key)
        return True

    def retire(self, key: Hashable) -> None:
        """The tensor is gone, but another stream (`record_stream`) still uses its block: `free` comes later."""
        block = self.live.get(key, _ABSENT)
        if block is _ABSENT or key in self.retired:
            raise _unknown_key()
        if block is None:
            return
        self.allocated -= block.size
        self.retired.add(key)
        self.note("free_requested", block.address, block.requested, block.pool.stream, key)

    def free(self, key: Hashable) -> None:
        """Take the block of a tensor back; it merges with cached neighbours and is cached itself."""
        block = self.live.pop(key, _ABSENT)
        if block is _ABSENT or block is None:
            if block is not None:
                self._forget_finished(key)
            return
        size = block.size
        if self.retired and key in self.retired:
            self.retired.remove(key)
        else:
            self.allocated -= size
            if self.actions is not None:
                self.note("free_requested", block.address, block.requested, block.pool.stream, key)
        if self.actions is not None:
            self.note("free_completed", block.address, block.requested, block.pool.stream, key)
        self.active -= size
        self.requested -= block.requested
        self._give_back(block)

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache()."""
        release_cached(self)

    # ------------------------------------------------------------------------------------------------------- answers

    def free_device_bytes(self) -> int:
        """Bytes that cudaMalloc could still hand out."""
        return self.capacity - self.reserved

    def largest_cached_bytes(self) -> int:
        """The largest block that is cached."""
        return max((pool.keys[-1] >> ADDRESS_BITS for pool in self.all_pools() if pool.keys), default=0)

    def all_pools(self) -> Iterator[Pool]:
        """The pools of all streams, the large ones first."""
        for which in (True, False):
            for _, pools in sorted(self.pools.items()):
                yield pools[which]

    # ------------------------------------------------------------------------------------- the device; for `pressure`

    def take_cached(self, pool: Pool, size: int) -> Block | None:
        """The cached block that fits best, no longer cached; None where none fits (get_free_block)."""
        if self.ages_count and pool.is_large:
            self.large_searches += 1
        keys = pool.keys
        index = bisect_left(keys, size << ADDRESS_BITS)
        if index == len(keys):
            return None
        if self.max_split < UNLIMITED_BYTES and not self.may_serve(pool.blocks[index], size):
            return None
        del keys[index]
        block = pool.blocks.pop(index)
        block.is_cached = False
        return block

    def may_serve(self, block: Block, size: int) -> bool:
        """The rules about blocks too large to split: none for a smaller request, and no great waste for a large one."""
        if size < self.max_split:
            return block.size < self.max_split
        return block.size < size + self.settings.max_non_split_rounding_bytes

    def grow(self, pool: Pool, need: Fitting) -> Block | None:
        """A new segment as one block; None where the device has no room for it (alloc_block)."""
        size = need.segment_bytes
        if self.reserved + size > self.limit():
            return None
        vacant = self._vacant.get(size)
        address = heappop(vacant) if vacant else self.take_addresses(size)
        self.count_reserved(size)
        self.note("segment_alloc", address, size, pool.stream, None)
        return Block(pool, address, size)

    def limit(self) -> int:
        """The most bytes that may be reserved."""
        return self.capacity if self.allowed is None else min(self.capacity, self.allowed)

    def release(self, block: Block) -> None:
        """Give a segment back to the device, which is one cached block (release_block)."""
        block.pool.remove(block)
        heappush(self._vacant.setdefault(block.size, []), block.address)
        self.count_reserved(-block.size)
        self.note("segment_free", block.address, block.size, block.pool.stream, None)

    def release_pool(self, pool: Pool) -> None:
        """Give all segments of a pool back that are one cached block each (release_blocks)."""
        for block in [block for block in pool.blocks if not block.is_split()]:
            self.release(block)

    def take_addresses(self, size: int) -> int:
        """Addresses that nothing lies at yet."""
        address = self._next_address
        self._next_address += size
        return address

    # --------------------------------------------------------------------------------------------------------- inside

    def _obtain(self, pool: Pool, need: Fitting) -> Block | None:
        """A block from the device, at the third attempt with everything given back that can be (malloc)."""
        if self.ages_count:
            collect_garbage(self)
        block = self.grow(pool, need)
        if block is None and release_available(self, pool, need.block_bytes):
            block = self.grow(pool, need)
        if block is None:
            release_cached(self)
            self.num_alloc_retries += 1
            block = self.grow(pool, need)
        return block

    def _new_pools(self, stream: int) -> tuple[Pool, Pool]:
        """The small and the large pool of a stream, with the rules of should_split."""
        small = Pool(stream, False, MIN_BLOCK_BYTES, UNLIMITED_BYTES)
        if self.is_expandable:
            return small, Pool(stream, True, MIN_BLOCK_BYTES, UNLIMITED_BYTES)
        return small, Pool(stream, True, SMALL_BYTES + 1, self.max_split)

    def _hand_out(self, block: Block, size: int) -> Block:
        """The front `size` bytes of a block that is not cached, the rest cached where it may be split off."""
        before = block.prev
        was_split = before is not None or block.next is not None
        rest = block.size - size
        pool = block.pool
        if rest >= pool.least_rest and size < pool.split_below:
            front = Block(pool, block.address, size)
            front.prev = before
            if before is not None:
                before.next = front
            front.next = block
            block.prev = front
            block.address += size
            block.size = rest
            block.born = self.large_searches
            pool.insert(block)
            change = -size if was_split else rest
            block = front
        else:
            change = -block.size if was_split else 0
        if change and not self.is_expandable:
            self.count_inactive_split(change)
        return block

    def _give_back(self, block: Block) -> None:
        """Merge with cached neighbours and cache (free_block)."""
        pool = block.pool
        change = 0
        before, after = block.prev, block.next
        if before is not None and before.is_cached:
            pool.remove(before)
            change -= before.size
            block.address = before.address
            block.size += before.size
            block.prev = before = before.prev
            if before is not None:
                before.next = block
        if after is not None and after.is_cached:
            pool.remove(after)
            change -= after.size
            block.size += after.size
            block.next = after = after.next
            if after is not None:
                after.prev = block
        if before is not None or after is not None:
            change += block.size
        block.born = self.large_searches
        pool.insert(block)
        if change and not self.is_expandable:
            self.count_inactive_split(change)

    def _allocate_nothing(self, key: Hashable, num_bytes: int) -> bool:
        """A tensor without bytes takes no block (NativeCachingAllocator::allocate)."""
        if num_bytes < 0:
            raise MemplanError(f"A tensor has a negative size: {num_bytes} bytes.", "Sizes are 0 or more.")
        self.live[key] = None
        return True

    def _forget_finished(self, key: Hashable) -> None:
        if key not in self.finished:
            raise _unknown_key()
        self.finished.remove(key)


def _unknown_key() -> MemplanError:
    return MemplanError(
        "A tensor is freed that is not allocated.", "Free each tensor once, under its allocation's key."
    )
