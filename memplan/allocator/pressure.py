"""What does the caching allocator give back to the device when memory is short?

Three ways, the cheapest first:
    collect_garbage    before every cudaMalloc once more than a set share of the allowed bytes is reserved: segments
                       of the large pool that have lain unused for longer than the average
    release_available  after cudaMalloc failed, only with max_split_size: just enough oversize blocks of the same pool
    release_cached     after that: every cached block that is a whole segment (an "alloc retry")

Source: garbage_collect_cached_blocks, release_available_cached_blocks and release_cached_blocks in
c10/cuda/CUDACachingAllocator.cpp, PyTorch 2.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memplan.allocator.blocks import Block, Pool
    from memplan.allocator.caching import CachingAllocator


def release_cached(allocator: CachingAllocator) -> None:
    """Wait for other streams, so that retired blocks are cached; then give back all cached segments."""
    for key in sorted(allocator.retired, key=lambda key: _address(allocator, key)):
        allocator.free(key)
        allocator.finished.add(key)
    for pool in list(allocator.all_pools()):
        allocator.release_pool(pool)


def release_available(allocator: CachingAllocator, pool: Pool, size: int) -> bool:
    """Give back the smallest oversize block that makes room for `size` bytes, or several, the largest first.

    Returns:
        Whether enough came free; what was given back by then stays given back.
    """
    max_split = allocator.settings.max_split_size_bytes
    if max_split is None:
        return False
    target = max(size, max_split)
    index = pool.first_of(target)
    if index < len(pool.blocks) and not allocator.is_expandable:
        allocator.release(pool.blocks[index])
        return True
    released = 0
    for block in reversed(pool.blocks[:index]):
        if released >= target or block.size < max_split:
            break
        if not allocator.is_expandable:
            released += block.size
            allocator.release(block)
    return released >= target


def collect_garbage(allocator: CachingAllocator) -> None:
    """Give back segments at least as old as the average, again and again until enough came free or none is left.

    The age of a block is the number of searches of the large pools since it was cached.
    """
    threshold = int(allocator.settings.garbage_collection_threshold * (allocator.allowed or 0))
    target = allocator.reserved - threshold
    candidates = _whole_segments(allocator) if target > 0 else []
    total_age = sum(_age(allocator, block) for block in candidates)
    reclaimed = 0
    while reclaimed < target and candidates:
        average = total_age / len(candidates)
        old = [block for block in candidates if _age(allocator, block) >= average]
        if not old:
            break
        for block in old:
            reclaimed += block.size
            total_age -= _age(allocator, block)
            allocator.release(block)
        candidates = [block for block in candidates if block.is_cached]


def _whole_segments(allocator: CachingAllocator) -> list[Block]:
    large = [pools[True] for pools in allocator.pools.values()]
    return [block for pool in large for block in pool.blocks if not block.is_split()]


def _age(allocator: CachingAllocator, block: Block) -> int:
    return allocator.large_searches - block.born


def _address(allocator: CachingAllocator, key: object) -> int:
    block = allocator.live[key]
    return 0 if block is None else block.address
