"""The caching allocator, rule by rule, with numbers worked out by hand."""

from __future__ import annotations

import pytest

from memplan.allocator.caching import CachingAllocator
from memplan.allocator.capacity import smallest_capacity
from memplan.allocator.expandable import ExpandableAllocator
from memplan.allocator.layout import ACTIVE, INACTIVE, PENDING, segments
from memplan.allocator.replay import AllocatorEvent, new_allocator, replay, segments_at_peak
from memplan.allocator.rounding import fitting, round_size
from memplan.allocator.settings import AllocatorSettings, parse_alloc_conf
from memplan.errors import MemplanError, UsageError
from memplan.units import MIB

DEFAULTS = AllocatorSettings()
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def sizes(allocator: CachingAllocator) -> list[list[tuple[int, str]]]:
    """Bytes and state of every block, segment by segment."""
    return [[(block.num_bytes, block.state) for block in segment.blocks] for segment in segments(allocator)]


# ------------------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize(("asked", "block"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)])
def test_requests_are_rounded_to_512_bytes(asked: int, block: int) -> None:
    assert round_size(asked, DEFAULTS) == block


@pytest.mark.parametrize(
    ("asked", "block"),
    [
        (2000, 2048),  # not more than 512 * 4: rounded to 512
        (5000, 5120),  # between 4096 and 8192 in steps of 1024
        (8192, 8192),  # a power of two
        (17 * MIB, 20 * MIB),  # between 16 and 32 MiB in steps of 4 MiB
        (20 * MIB, 20 * MIB),
        (29 * MIB, 32 * MIB),
    ],
)
def test_requests_are_rounded_to_divisions_of_powers_of_two(asked: int, block: int) -> None:
    assert round_size(asked, parse_alloc_conf("roundup_power2_divisions:4")) == block


def test_divisions_by_size() -> None:
    """Below 256 MiB the first entry's divisions, from 512 MiB to 1 GiB two, above four."""
    settings = parse_alloc_conf("roundup_power2_divisions:[256:1,512:2,>:4]")
    assert settings.roundup_power2_divisions == (1,) * 9 + (2,) + (4,) * 6
    assert round_size(300 * MIB + 1, settings) == 300 * MIB + 512
    assert round_size(600 * MIB, settings) == 768 * MIB
    assert round_size(1100 * MIB, settings) == 1280 * MIB
    assert parse_alloc_conf("roundup_power2_divisions:[>:8]").roundup_power2_divisions == (0,) + (8,) * 15


@pytest.mark.parametrize(
    ("asked", "segment", "is_large"),
    [
        (1, 2 * MIB, False),
        (MIB, 2 * MIB, False),
        (MIB + 1, 20 * MIB, True),
        (10 * MIB - 512, 20 * MIB, True),
        (10 * MIB, 10 * MIB, True),
        (10 * MIB + 1, 12 * MIB, True),
    ],
)
def test_pool_and_segment_of_a_request(asked: int, segment: int, is_large: bool) -> None:
    need = fitting(asked, DEFAULTS)
    assert (need.segment_bytes, need.is_large) == (segment, is_large)


def test_large_segments_may_be_larger() -> None:
    assert fitting(2 * MIB, parse_alloc_conf("large_segment_size_mb:64")).segment_bytes == 64 * MIB


# ------------------------------------------------------------------------------------------------- splitting, best fit


def test_a_small_request_splits_a_segment_of_2_mib() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate("a", 100)
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (100, 512, 2 * MIB)
    assert allocator.inactive_split == 2 * MIB - 512
    assert sizes(allocator) == [[(512, ACTIVE), (2 * MIB - 512, INACTIVE)]]


def test_a_rest_of_up_to_1_mib_of_a_large_block_counts_as_allocated() -> None:
    """11 MiB take a segment of 12; the rest of 1 MiB is not split off.  10.5 MiB leave 1.5 MiB, which is."""
    allocator = CachingAllocator()
    allocator.allocate("a", 11 * MIB)
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (11 * MIB, 12 * MIB, 12 * MIB)
    assert allocator.inactive_split == 0
    allocator.allocate("b", 10 * MIB + 512 * 1024)
    assert allocator.allocated == 12 * MIB + 10 * MIB + 512 * 1024
    assert allocator.inactive_split == 3 * MIB // 2


def test_best_fit_is_the_smallest_block_then_the_lowest_address() -> None:
    allocator = CachingAllocator()
    for key, size in (("a", 30), ("b", 20), ("c", 20), ("d", 40)):
        allocator.allocate(key, size * MIB)
    b = allocator.live["b"].address
    for key in "dcba":
        allocator.free(key)
    allocator.allocate("e", 20 * MIB)
    assert allocator.live["e"].address == b
    allocator.allocate("f", 25 * MIB)
    assert allocator.live["f"].size == 25 * MIB  # out of the 30
    assert allocator.reserved == 110 * MIB


def test_freed_blocks_merge_with_their_neighbours() -> None:
    """Three of 4 MiB in one segment of 20; the middle one is freed last."""
    allocator = CachingAllocator()
    for key in "abc":
        allocator.allocate(key, 4 * MIB)
    assert allocator.inactive_split == 8 * MIB
    allocator.free("a")
    assert sizes(allocator) == [[(4 * MIB, INACTIVE), (4 * MIB, ACTIVE), (4 * MIB, ACTIVE), (8 * MIB, INACTIVE)]]
    assert allocator.inactive_split == 12 * MIB
    allocator.free("c")
    assert sizes(allocator) == [[(4 * MIB, INACTIVE), (4 * MIB, ACTIVE), (12 * MIB, INACTIVE)]]
    allocator.free("b")
    assert sizes(allocator) == [[(20 * MIB, INACTIVE)]]
    assert (allocator.inactive_split, allocator.allocated, allocator.reserved) == (0, 0, 20 * MIB)


def test_streams_and_size_classes_have_pools_of_their_own() -> None:
    allocator = CachingAllocator()
    allocator.allocate("a", 20 * MIB, 0)
    allocator.free("a")
    allocator.allocate("b", 20 * MIB, 7)  # another stream
    allocator.allocate("c", 512, 0)  # another size class
    assert allocator.reserved == 42 * MIB


def test_a_tensor_without_bytes_takes_no_block() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate("a", 0)
    allocator.free("a")
    assert allocator.reserved == 0


def test_a_block_that_another_stream_uses_is_active_but_not_allocated() -> None:
    allocator = CachingAllocator()
    allocator.allocate("a", 20 * MIB)
    allocator.retire("a")
    assert (allocator.allocated, allocator.active) == (0, 20 * MIB)
    assert sizes(allocator) == [[(20 * MIB, PENDING)]]
    allocator.allocate("b", 20 * MIB)
    allocator.free("a")
    assert (allocator.allocated, allocator.active, allocator.reserved) == (20 * MIB, 20 * MIB, 40 * MIB)


def test_pressure_waits_for_other_streams() -> None:
    """Where the device is full, the retired block is waited for and given back; its later release is no event."""
    allocator = CachingAllocator(capacity_bytes=20 * MIB)
    allocator.allocate("a", 20 * MIB)
    allocator.retire("a")
    assert allocator.allocate("b", 16 * MIB)
    allocator.free("a")
    assert (allocator.active, allocator.reserved, allocator.num_alloc_retries) == (16 * MIB, 16 * MIB, 1)


# -------------------------------------------------------------------------------------------- oversize blocks, pressure


def test_oversize_blocks_serve_large_requests_only_and_are_not_split() -> None:
    """max_split_size 24 MiB: a cached block of 40 MiB serves 39 MiB whole, but neither 5 MiB nor 20 MiB."""
    allocator = CachingAllocator(parse_alloc_conf("max_split_size_mb:24"))
    allocator.allocate("a", 40 * MIB)
    allocator.free("a")
    allocator.allocate("b", 5 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.allocate("c", 39 * MIB)
    assert (allocator.reserved, allocator.allocated) == (60 * MIB, 45 * MIB)


def test_oversize_blocks_are_not_wasted() -> None:
    """24 MiB may not take a block of 44 MiB or more, 25 MiB may: 44 < 25 + 20."""
    settings = parse_alloc_conf("max_split_size_mb:24")
    for asked, reserved in ((24, 68), (25, 44)):
        allocator = CachingAllocator(settings)
        allocator.allocate("a", 44 * MIB)
        allocator.free("a")
        allocator.allocate("b", asked * MIB)
        assert allocator.reserved == reserved * MIB


def test_under_pressure_all_cached_segments_are_released() -> None:
    """40 MiB of device: 20 cached, 30 asked for.  One failed cudaMalloc, all released, one retry."""
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    allocator.allocate("a", 20 * MIB)
    allocator.allocate("small", 512)
    allocator.free("a")
    assert allocator.allocate("b", 30 * MIB)
    assert (allocator.reserved, allocator.num_alloc_retries) == (32 * MIB, 1)
    assert (allocator.num_device_allocs, allocator.num_device_frees) == (3, 1)


def test_with_max_split_size_just_enough_is_released() -> None:
    """No cached block is as large as 70 MiB: the largest go first.  60 is too large for 32: it goes, the 30 stays."""
    allocator = CachingAllocator(parse_alloc_conf("max_split_size_mb:20"), capacity_bytes=100 * MIB)
    for key, size in (("a", 30), ("b", 50)):
        allocator.allocate(key, size * MIB)
    for key in "ab":
        allocator.free(key)
    assert allocator.allocate("c", 70 * MIB)
    assert (allocator.reserved, allocator.num_alloc_retries) == (70 * MIB, 0)
    allocator = CachingAllocator(parse_alloc_conf("max_split_size_mb:20"), capacity_bytes=100 * MIB)
    for key, size in (("a", 30), ("b", 60)):
        allocator.allocate(key, size * MIB)
    for key in "ab":
        allocator.free(key)
    assert allocator.allocate("c", 32 * MIB)  # 60 >= 32 + 20
    assert (allocator.reserved, allocator.num_alloc_retries) == (62 * MIB, 0)


def test_garbage_collection_releases_blocks_older_than_the_average() -> None:
    """Allowed 100 MiB, threshold 50.  At the third request 70 MiB are reserved; a is 2 searches old, b 1."""
    settings = parse_alloc_conf("garbage_collection_threshold:0.5,per_process_memory_fraction:0.5")
    allocator = CachingAllocator(settings, capacity_bytes=200 * MIB)
    allocator.allocate("a", 30 * MIB)
    allocator.free("a")
    allocator.allocate("b", 40 * MIB)
    allocator.free("b")
    allocator.allocate("c", 50 * MIB)
    assert (allocator.reserved, allocator.num_alloc_retries) == (90 * MIB, 0)


def test_garbage_is_not_collected_without_a_memory_fraction() -> None:
    allocator = CachingAllocator(parse_alloc_conf("garbage_collection_threshold:0.1"), capacity_bytes=200 * MIB)
    for size in (30, 40, 50):
        allocator.allocate(size, size * MIB)
        allocator.free(size)
    assert allocator.reserved == 120 * MIB


def test_a_memory_fraction_limits_what_is_reserved() -> None:
    settings = AllocatorSettings(memory_fraction=0.5)
    assert replay([("a", 60 * MIB, 1)], settings, capacity_bytes=100 * MIB).num_ooms == 1
    assert replay([("a", 60 * MIB, 1)], settings, capacity_bytes=100 * MIB, device_bytes=120 * MIB).num_ooms == 0


# ------------------------------------------------------------------------------------------------- expandable segments


def test_an_expandable_segment_grows_by_pages_at_its_end() -> None:
    """21 MiB map two pages of 20; 30 MiB use the 19 left and map one page more."""
    allocator = ExpandableAllocator(EXPANDABLE, capacity_bytes=1024 * MIB)
    allocator.allocate("a", 21 * MIB)
    assert (allocator.reserved, allocator.allocated) == (40 * MIB, 21 * MIB)
    allocator.allocate("b", 30 * MIB)
    assert (allocator.reserved, allocator.allocated, allocator.inactive_split) == (60 * MIB, 51 * MIB, 0)
    assert sizes(allocator) == [[(21 * MIB, ACTIVE), (30 * MIB, ACTIVE), (9 * MIB, INACTIVE)]]
    allocator.allocate("c", 512)
    assert allocator.reserved == 62 * MIB  # the small pool's page


def test_pages_within_cached_blocks_are_unmapped() -> None:
    """a: 0 to 30 MiB, b: 30 to 50, c: 50 to 60.  Freed b holds no whole page of 20; a and b together hold two."""
    allocator = ExpandableAllocator(EXPANDABLE, capacity_bytes=1024 * MIB)
    for key, size in (("a", 30), ("b", 20), ("c", 10)):
        allocator.allocate(key, size * MIB)
    allocator.free("b")
    allocator.empty_cache()
    assert allocator.reserved == 60 * MIB
    allocator.free("a")
    allocator.empty_cache()
    assert sizes(allocator) == [[(10 * MIB, INACTIVE), (10 * MIB, ACTIVE)]]
    assert allocator.reserved == 20 * MIB
    allocator.allocate("d", 45 * MIB)  # the gap of 40 and the cached 10 after it, at the lowest address
    assert allocator.reserved == 60 * MIB
    assert sizes(allocator) == [[(45 * MIB, ACTIVE), (5 * MIB, INACTIVE), (10 * MIB, ACTIVE)]]


def test_an_expandable_segment_is_given_back_whole() -> None:
    allocator = ExpandableAllocator(EXPANDABLE, capacity_bytes=100 * MIB)
    allocator.allocate("a", 50 * MIB)
    allocator.free("a")
    allocator.empty_cache()
    assert (allocator.reserved, segments(allocator)) == (0, ())
    assert allocator.allocate("b", 100 * MIB)
    assert not allocator.allocate("c", 1)


def test_expandable_segments_run_out() -> None:
    """90 MiB of device: 50 + 30 take four pages of 20; a fifth does not fit, but 10 of the fourth are left."""
    allocator = new_allocator(EXPANDABLE, capacity_bytes=90 * MIB)
    assert allocator.allocate("a", 50 * MIB)
    assert allocator.allocate("b", 30 * MIB)
    assert not allocator.allocate("c", 2 * MIB)
    assert (allocator.reserved, allocator.num_ooms, allocator.num_alloc_retries) == (80 * MIB, 1, 1)


# -------------------------------------------------------------------------------------------------------------- replay


def test_a_replay_tells_peaks_end_and_samples() -> None:
    events = [
        AllocatorEvent("a", 11 * MIB, 1),
        ("b", 100, 1, 0),
        ("a", 11 * MIB, -1),
        ("c", 4 * MIB, 1),
    ]
    run = replay(events, sample_every=2)
    assert (run.num_events, run.num_ooms, run.num_alloc_retries) == (4, 0, 0)
    assert run.peak_requested_bytes == 11 * MIB + 100
    assert run.peak_allocated_bytes == run.peak_active_bytes == 12 * MIB + 512
    assert (run.peak_reserved_bytes, run.peak_reserved_index) == (14 * MIB, 1)
    assert run.peak_inactive_split_bytes == 8 * MIB + 2 * MIB - 512
    assert run.end.allocated == 4 * MIB + 512
    assert run.largest_cached_bytes == 8 * MIB
    assert [sample.event_index for sample in run.samples] == [0, 2]
    assert [sample.allocated for sample in run.samples] == [12 * MIB, 512]
    assert [len(segment.blocks) for segment in segments_at_peak(events)] == [1, 2]


def test_a_replay_tells_where_it_runs_out() -> None:
    """50 MiB of device: 30 + 16 taken, 12 asked for, 4 free; of the 30 freed nothing is cached any more: 28 + 2."""
    events = [("a", 30 * MIB, 1), ("b", 16 * MIB, 1), ("c", 11 * MIB, 1), ("never", 1, 1)]
    run = replay(events, capacity_bytes=50 * MIB)
    out = run.out_of_memory
    assert out is not None
    assert (out.event_index, out.key, out.requested_bytes, out.segment_bytes) == (2, "c", 11 * MIB, 12 * MIB)
    assert (out.free_bytes, out.cached_bytes, out.largest_cached_bytes) == (4 * MIB, 0, 0)
    assert (run.num_events, run.num_ooms, run.num_alloc_retries) == (3, 1, 1)


def test_the_smallest_capacity_with_and_without_releases() -> None:
    """20 MiB cached of which 30 can make no use: 50 if nothing may be released, else 30."""
    events = [("a", 20 * MIB, 1), ("a", 20 * MIB, -1), ("b", 30 * MIB, 1)]
    assert smallest_capacity(events) == (30 * MIB, 50 * MIB)
    assert replay(events, capacity_bytes=30 * MIB).num_alloc_retries == 1
    assert replay(events, capacity_bytes=28 * MIB).num_ooms == 1
    assert smallest_capacity([]) == (0, 0)


def test_faults_of_events_name_the_event() -> None:
    with pytest.raises(MemplanError, match="Event 1: A tensor is allocated twice"):
        replay([("a", 1, 1), ("a", 1, 1)])
    with pytest.raises(MemplanError, match="Event 0: A tensor is freed that is not allocated"):
        replay([("a", 1, -1)])
    with pytest.raises(MemplanError, match="Event 2: A tensor is freed"):
        replay([("a", 1, 1), ("a", 1, 0), ("a", 1, 0)])
    with pytest.raises(MemplanError, match="negative size"):
        replay([("a", -1, 1)])
    with pytest.raises(UsageError, match="negative"):
        replay([], capacity_bytes=-1)
    with pytest.raises(UsageError, match="sample_every"):
        replay([], sample_every=-1)


# ------------------------------------------------------------------------------------------------------------ settings

GOOD = [
    "",
    "expandable_segments:True",
    "  max_split_size_mb : 40 , expandable_segments:False ",
    "max_split_size_mb:20,max_non_split_rounding_mb:20",
    "max_split_size_mb:40,",
    "garbage_collection_threshold:0.8",
    "roundup_power2_divisions:1",
    "roundup_power2_divisions:[256:1,512:2,>:8]",
    "roundup_power2_divisions:[512:8,256:4]",
    "roundup_power2_divisions:[256:0]",
    "roundup_power2_divisions:[]",
    "large_segment_size_mb:11",
    "per_process_memory_fraction:0.5",
    "pinned_use_background_threads:True",
    "backend:native",
]
BAD = [
    "expandable_segments:true",
    "max_split_size_mb:19",
    "max_split_size_mb:abc",
    "max_split_size_mb",
    "max_split_size_mb:40 expandable_segments:True",
    "large_segment_size_mb:64,max_split_size_mb:30",
    "large_segment_size_mb:10",
    "max_non_split_rounding_mb:19",
    "garbage_collection_threshold:0",
    "garbage_collection_threshold:1.0",
    "roundup_power2_divisions:3",
    "roundup_power2_divisions:0",
    "roundup_power2_divisions:[3:1]",
    "roundup_power2_divisions:[256:3]",
    "roundup_power2_divisions:[256:2",
]
STRICTER = ["foo:1", "max_split_size_mb:40x", "max_split_size_mb:-1", "max_split_size_mb:40,max_split_size_mb:50"]
"""Slips that PyTorch lets pass."""


@pytest.mark.parametrize("text", GOOD)
def test_good_settings_are_read(text: str) -> None:
    assert isinstance(parse_alloc_conf(text), AllocatorSettings)


@pytest.mark.parametrize("text", [*BAD, *STRICTER, "backend:cudaMallocAsync"])
def test_bad_settings_are_usage_errors_with_a_cure(text: str) -> None:
    with pytest.raises(UsageError) as fault:
        parse_alloc_conf(text)
    assert fault.value.cure


def test_pytorch_takes_and_refuses_the_same_settings() -> None:
    """PyTorch's own parser, where it is installed (2.13 has it without CUDA too)."""
    torch = pytest.importorskip("torch")
    parse = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if parse is None:
        pytest.skip("this PyTorch has no common parser")
    try:
        for text in BAD:
            parse("large_segment_size_mb:20")
            with pytest.raises((ValueError, RuntimeError)):
                parse(text)
        for text in [*GOOD, *STRICTER]:
            parse("large_segment_size_mb:20")
            parse(text)
    finally:
        parse("large_segment_size_mb:20,expandable_segments:False")


def test_settings_in_full() -> None:
    settings = parse_alloc_conf(
        "max_split_size_mb:512,expandable_segments:True,garbage_collection_threshold:0.75,max_non_split_rounding_mb:64"
    )
    assert settings == AllocatorSettings(
        max_split_size_bytes=512 * MIB,
        expandable_segments=True,
        garbage_collection_threshold=0.75,
        max_non_split_rounding_bytes=64 * MIB,
    )


def test_an_unknown_option_is_met_with_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="Did you mean expandable_segments"):
        parse_alloc_conf("expandible_segments:True")
