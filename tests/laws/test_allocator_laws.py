"""Laws of the simulated caching allocator, and its agreement with two slow references written another way.

The references keep no linked blocks and no sorted lists: the ordinary one scans all segments for every request, the
expandable one knows only which pages are mapped and which stretches are taken, and works free blocks out anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from memplan.allocator.blocks import ADDRESS_BITS
from memplan.allocator.caching import FIRST_ADDRESS, CachingAllocator
from memplan.allocator.capacity import smallest_capacity
from memplan.allocator.layout import ACTIVE, INACTIVE, segments
from memplan.allocator.replay import new_allocator, replay
from memplan.allocator.rounding import fitting, round_up
from memplan.allocator.settings import AllocatorSettings, parse_alloc_conf
from memplan.estimation.dimensions import dimensions
from memplan.estimation.timeline import timeline
from memplan.memory.events import Sizes
from memplan.units import MIB
from tests.laws.models import RECORDINGS, all_setups, models

if TYPE_CHECKING:
    from memplan.specs.training import Setup

CONFS = (
    "",
    "max_split_size_mb:24",
    "roundup_power2_divisions:4",
    "large_segment_size_mb:32,max_split_size_mb:32",
    "expandable_segments:True",
    "expandable_segments:True,max_split_size_mb:24,roundup_power2_divisions:[1:2,>:8]",
    "garbage_collection_threshold:0.4,per_process_memory_fraction:0.9",
)

Event = tuple[int, int, int, int]


@st.composite
def traces(draw: st.DrawFn) -> list[Event]:
    """Allocations of all size classes on up to two streams, freed in any order, some not at all."""
    size = st.one_of(
        st.integers(1, 4096),
        st.integers(MIB - 1024, MIB + 1024),
        st.integers(1, 80).map(lambda half: half * MIB // 2),
        st.integers(1, 40 * MIB),
    )
    steps = draw(st.lists(st.tuples(st.booleans(), size, st.integers(0, 1), st.integers(0, 10**6)), max_size=60))
    events: list[Event] = []
    alive: list[tuple[int, int, int]] = []
    for key, (frees, num_bytes, stream, pick) in enumerate(steps):
        if frees and alive:
            events.append((*alive.pop(pick % len(alive))[:2], -1, 0))
        else:
            alive.append((key, num_bytes, stream))
            events.append((key, num_bytes, 1, stream))
    return events


confs = st.sampled_from(CONFS).map(parse_alloc_conf)
capacities = st.one_of(st.none(), st.integers(8, 120).map(lambda pages: pages * 2 * MIB))


def play(allocator: CachingAllocator, events: list[Event]) -> Any:
    """Every event, refused tensors left out; yields after each."""
    refused = set()
    for key, num_bytes, sign, stream in events:
        if sign > 0 and not allocator.allocate(key, num_bytes, stream):
            refused.add(key)
        elif sign < 0 and key not in refused:
            allocator.free(key)
        yield key, key not in refused


def check(allocator: CachingAllocator) -> None:
    """Everything that must hold at any time."""
    all_segments = segments(allocator)
    assert allocator.requested <= allocator.allocated <= allocator.active <= allocator.reserved
    assert allocator.reserved == sum(segment.num_bytes for segment in all_segments)
    assert allocator.allocated == sum(segment.bytes_in(ACTIVE) for segment in all_segments)
    for before, after in pairwise(all_segments):
        assert before.address + before.num_bytes <= after.address
    inactive_split = 0
    for segment in all_segments:
        address = segment.address
        for block in segment.blocks:
            assert block.address == address
            address += block.num_bytes
            if block.state == INACTIVE and len(segment.blocks) > 1:
                inactive_split += block.num_bytes
        for left, right in pairwise(segment.blocks):
            assert (left.state, right.state) != (INACTIVE, INACTIVE)
    if not allocator.is_expandable:
        assert allocator.inactive_split == inactive_split
    for pool in allocator.all_pools():
        assert pool.keys == sorted((block.size << ADDRESS_BITS) + block.address for block in pool.blocks)
        assert [block.address for block in pool.unmapped] == sorted(block.address for block in pool.unmapped)
    assert allocator.reserved <= allocator.limit()
    assert allocator.largest_cached_bytes() <= allocator.reserved - allocator.active


@given(events=traces(), settings=confs, capacity=capacities)
def test_at_any_time(events: list[Event], settings: AllocatorSettings, capacity: int | None) -> None:
    """Requested <= allocated <= active <= reserved <= what is allowed.

    Blocks tile their segments, none overlap, and cached neighbours are one block.
    """
    allocator = new_allocator(settings, capacity_bytes=capacity)
    for _ in play(allocator, events):
        check(allocator)


@given(model=models, setup=all_setups)
def test_a_run_reserves_at_least_its_peak(model: str, setup: Setup) -> None:
    """The formula's own timeline, replayed: requested is its peak, and allocated and reserved are no less."""
    program = RECORDINGS[model].program(setup)
    sizes = Sizes(dimensions(setup))
    events = [
        (moment.key, moment.num_bytes, moment.sign)
        for moment in timeline(program, sizes, setup.gradient_accumulation_steps)
    ]
    run = replay(events)
    height = highest = 0
    for _, num_bytes, sign in events:
        height += sign * num_bytes
        highest = max(highest, height)
    assert run.peak_requested_bytes == highest
    assert highest <= run.peak_allocated_bytes <= run.peak_reserved_bytes
    assert run.end.requested == height


@given(events=traces(), settings=confs)
def test_freeing_everything(events: list[Event], settings: AllocatorSettings) -> None:
    """Allocated is 0 again, every segment is one cached block, and emptying the cache gives all back."""
    allocator = new_allocator(settings, capacity_bytes=2**33)
    list(play(allocator, events))
    for key in list(allocator.live):
        allocator.free(key)
    assert allocator.requested == allocator.allocated == allocator.active == allocator.inactive_split == 0
    assert all(len(segment.blocks) == 1 for segment in segments(allocator))
    allocator.empty_cache()
    assert allocator.reserved == 0
    assert segments(allocator) == ()


@given(events=traces(), settings=confs)
def test_reserved_never_falls_without_a_release(events: list[Event], settings: AllocatorSettings) -> None:
    """Where memory is no object, reserved only grows."""
    run = replay(events, settings, sample_every=1)
    reserved = [sample.reserved for sample in run.samples]
    assert reserved == sorted(reserved)
    assert run.num_device_frees == run.num_alloc_retries == 0


@given(events=traces(), settings=confs, capacity=capacities)
def test_replays_are_deterministic(events: list[Event], settings: AllocatorSettings, capacity: int | None) -> None:
    """The same events give the same answer, block for block; and recording changes none of it."""
    run = replay(events, settings, capacity_bytes=capacity, record=True)
    assert run == replay(events, settings, capacity_bytes=capacity, record=True)
    assert run.segments == replay(events, settings, capacity_bytes=capacity).segments


@given(events=traces(), settings=confs)
def test_the_smallest_capacity_completes_and_less_does_not(events: list[Event], settings: AllocatorSettings) -> None:
    """2 MiB less fail; what is needed without releases is what an unlimited device reserves."""
    plain = AllocatorSettings(
        max_split_size_bytes=settings.max_split_size_bytes, expandable_segments=settings.expandable_segments
    )
    capacity = smallest_capacity(events, plain)
    assert capacity.num_bytes <= capacity.without_release_bytes
    assert replay(events, plain, capacity_bytes=capacity.num_bytes).out_of_memory is None
    assert replay(events, plain, capacity_bytes=capacity.without_release_bytes).num_alloc_retries == 0
    if capacity.num_bytes:
        assert replay(events, plain, capacity_bytes=capacity.num_bytes - 2 * MIB).out_of_memory is not None


@given(events=traces(), settings=confs, capacity=capacities)
def test_the_slow_references_agree(events: list[Event], settings: AllocatorSettings, capacity: int | None) -> None:
    """Allocated, reserved, retries, refusals and the place of every block are the same after every event."""
    settings = AllocatorSettings(
        max_split_size_bytes=settings.max_split_size_bytes,
        roundup_power2_divisions=settings.roundup_power2_divisions,
        expandable_segments=settings.expandable_segments,
        large_segment_bytes=settings.large_segment_bytes,
    )
    limit = capacity or 2**40
    fast = new_allocator(settings, capacity_bytes=limit)
    slow: Any = Expandable(settings, limit) if settings.expandable_segments else Ordinary(settings, limit)
    event_by_key = {event[0]: event for event in events if event[2] > 0}
    played = play(fast, events)
    for key, num_bytes, sign, stream in events:
        _, was_taken = next(played)
        if sign > 0:
            assert slow.allocate(key, num_bytes, stream) == was_taken
        elif was_taken:
            slow.free(key)
        taken = {(block.key, block.num_bytes) for s in segments(fast) for block in s.blocks if block.state == ACTIVE}
        assert taken == slow.taken()
        assert (fast.reserved, fast.num_alloc_retries) == (slow.reserved(), slow.retries)
    assert all(key in event_by_key for key, _ in slow.taken())


@dataclass
class Ordinary:
    """Segments are lists of [key or None, bytes]; every question is answered by a scan."""

    settings: AllocatorSettings
    limit: int
    retries: int = 0
    segments: list[tuple[int, tuple[int, bool], list[list[Any]]]] = field(default_factory=list)
    """(address, (stream, is_large), blocks)."""
    vacant: list[tuple[int, int]] = field(default_factory=list)
    """(bytes, address) of given back segments."""
    end: int = FIRST_ADDRESS

    def reserved(self) -> int:
        return sum(sum(size for _, size in blocks) for _, _, blocks in self.segments)

    def taken(self) -> set[tuple[Any, int]]:
        return {(key, size) for _, _, blocks in self.segments for key, size in blocks if key is not None}

    def allocate(self, key: int, num_bytes: int, stream: int) -> bool:
        need = fitting(num_bytes, self.settings)
        pool, size = (stream, need.is_large), need.block_bytes
        place = self.best(pool, size) or self.grow(pool, need.segment_bytes)
        if place is None and self.release_some(pool, size):
            place = self.grow(pool, need.segment_bytes)
        if place is None:
            self.retries += 1
            for segment in [s for s in self.segments if len(s[2]) == 1 and s[2][0][0] is None]:
                self.release(segment)
            place = self.grow(pool, need.segment_bytes)
        if place is None:
            return False
        blocks, index = place
        rest = blocks[index][1] - size
        splits = rest >= 512
        if need.is_large:
            splits = rest > MIB and size < (self.settings.max_split_size_bytes or 2**60)
        if splits:
            blocks[index : index + 1] = [[key, size], [None, rest]]
        else:
            blocks[index][0] = key
        return True

    def best(self, pool: tuple[int, bool], size: int) -> tuple[list[list[Any]], int] | None:
        found = []
        for address, owner, blocks in self.segments:
            at = address
            for index, (key, num_bytes) in enumerate(blocks):
                if owner == pool and key is None and num_bytes >= size:
                    found.append((num_bytes, at, index, blocks))
                at += num_bytes
        if not found:
            return None
        num_bytes, _, index, blocks = min(found, key=lambda block: block[:2])
        top = self.settings.max_split_size_bytes or 2**60
        if (size < top <= num_bytes) or (size >= top and num_bytes >= size + 20 * MIB):
            return None
        return blocks, index

    def grow(self, pool: tuple[int, bool], size: int) -> tuple[list[list[Any]], int] | None:
        if self.reserved() + size > self.limit:
            return None
        places = [address for num_bytes, address in self.vacant if num_bytes == size]
        address = min(places, default=self.end)
        if places:
            self.vacant.remove((size, address))
        else:
            self.end += size
        self.segments.append((address, pool, [[None, size]]))
        return self.segments[-1][2], 0

    def release(self, segment: tuple[int, tuple[int, bool], list[list[Any]]]) -> None:
        self.segments.remove(segment)
        self.vacant.append((segment[2][0][1], segment[0]))

    def release_some(self, pool: tuple[int, bool], size: int) -> bool:
        top = self.settings.max_split_size_bytes
        if top is None:
            return False
        whole = [
            s for s in self.segments if s[1] == pool and len(s[2]) == 1 and s[2][0][0] is None and s[2][0][1] >= top
        ]
        whole.sort(key=lambda s: (s[2][0][1], s[0]))
        target, released = max(size, top), 0
        for segment in whole:
            if segment[2][0][1] >= target:
                self.release(segment)
                return True
        for segment in reversed(whole):
            if released < target:
                released += segment[2][0][1]
                self.release(segment)
        return released >= target

    def free(self, key: int) -> None:
        for _, _, blocks in self.segments:
            for block in blocks:
                if block[0] == key:
                    block[0] = None
            merged: list[list[Any]] = []
            for block in blocks:
                if merged and merged[-1][0] is None and block[0] is None:
                    merged[-1][1] += block[1]
                else:
                    merged.append(block)
            blocks[:] = merged


@dataclass
class Range:
    """Addresses from 0: mapped pages and taken stretches."""

    page: int
    size: int
    mapped: set[int] = field(default_factory=set)
    taken: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Key -> (address, bytes)."""

    def stretches(self) -> list[tuple[int, int, str]]:
        """(address, bytes, taken | free | unmapped), equal neighbours in one unless they are taken."""
        points = {0, self.size}
        for address, size in self.taken.values():
            points |= {address, address + size}
        for page in self.mapped:
            points |= {page * self.page, (page + 1) * self.page}
        result: list[tuple[int, int, str]] = []
        for left, right in pairwise(sorted(points)):
            kind = "free" if left // self.page in self.mapped else "unmapped"
            if any(address <= left < address + size for address, size in self.taken.values()):
                kind = "taken"
            if result and result[-1][2] == kind != "taken":
                result[-1] = (result[-1][0], result[-1][1] + right - left, kind)
            else:
                result.append((left, right - left, kind))
        return result


@dataclass
class Expandable:
    """One range for each pool; the tests' traces never need a second one."""

    settings: AllocatorSettings
    limit: int
    retries: int = 0
    ranges: dict[tuple[int, bool], Range] = field(default_factory=dict)

    def reserved(self) -> int:
        return sum(len(r.mapped) * r.page for r in self.ranges.values())

    def taken(self) -> set[tuple[Any, int]]:
        return {(key, size) for r in self.ranges.values() for key, (_, size) in r.taken.items()}

    def allocate(self, key: int, num_bytes: int, stream: int) -> bool:
        need = fitting(num_bytes, self.settings)
        pool, size = (stream, need.is_large), need.block_bytes
        page = self.settings.large_segment_bytes if need.is_large else 2 * MIB
        whole = round_up(max(self.limit + self.limit // 8, page), page)
        place = self.ranges.setdefault(pool, Range(page, whole))
        address = self.best(place, size)
        if address is None:
            address = self.grow(place, size)
        if address is None:
            self.retries += 1
            for r in self.ranges.values():
                for start, length, kind in r.stretches():
                    if kind == "free":
                        r.mapped -= set(range(-(-start // r.page), (start + length) // r.page))
            address = self.grow(place, size)
        if address is None:
            return False
        place.taken[key] = (address, size)
        return True

    def best(self, place: Range, size: int) -> int | None:
        stretches = place.stretches()
        fits = []
        for n, (address, length, kind) in enumerate(stretches):
            after = stretches[n + 1] if n + 1 < len(stretches) else (0, 0, "")
            if kind == "free" and length >= size:
                fits.append((length, address, length + (after[1] if after[2] == "unmapped" else 0)))
        fits.sort()
        if not fits:
            return None
        index = 0
        while index + 1 < len(fits) and fits[index + 1][2] < fits[index][2]:
            index += 1
        length, address, _ = fits[index]
        top = self.settings.max_split_size_bytes or 2**60
        if (size < top <= length) or (size >= top and length >= size + 20 * MIB):
            return None
        return address

    def grow(self, place: Range, size: int) -> int | None:
        stretches = place.stretches()
        for n, (_, _, kind) in enumerate(stretches):
            if kind != "unmapped":
                continue
            first = n - 1 if n and stretches[n - 1][2] == "free" else n
            room, last = 0, first
            while room < size and last < len(stretches) and stretches[last][2] != "taken":
                room += stretches[last][1]
                last += 1
            if room >= size:
                start = stretches[first][0]
                for at, length, state in stretches[first:last]:
                    missing = min(start + size - at, length)
                    pages = range(at // place.page, -(-(at + missing) // place.page))
                    if state == "unmapped" and missing > 0:
                        if self.reserved() + len(pages) * place.page > self.limit:
                            return None
                        place.mapped |= set(pages)
                return start
        return None

    def free(self, key: int) -> None:
        for r in self.ranges.values():
            r.taken.pop(key, None)
