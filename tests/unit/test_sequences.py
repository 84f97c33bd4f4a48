"""Lengths by hand: truncation, padding and packing of a few sequences, and against the definitions on many."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from memplan.sequences import packing, padding
from memplan.sequences.analysis import STRATEGIES, candidate, split, summary
from memplan.sequences.batching import batchings
from memplan.sequences.lengths import Lengths, Spans, at_the_end
from memplan.sequences.rows import Rows
from memplan.sequences.truncation import SIDES, truncate


def array(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


# -- truncation --------------------------------------------------------------------------------------------------------


def test_a_long_input_loses_what_is_beyond_the_maximum() -> None:
    """1,500 tokens at a maximum of 1,024."""
    found = truncate(Lengths(array(1500, 80)), 1024)
    assert (found.num_cut, found.tokens_lost, found.supervised_lost, found.num_without) == (1, 476, 476, 0)
    assert found.lengths.tokens.tolist() == [1024, 80]


@pytest.mark.parametrize(
    ("side", "lost", "left", "without"),
    [
        ("right", 1200, [0, 50, 0], 2),
        ("left", 0, [300, 50, 900], 0),
        ("middle", 388, [300, 50, 512], 0),
        ("drop", 1200, [0, 50, 0], 2),
    ],
)
def test_labels_at_the_end(side: str, lost: int, left: list[int], without: int) -> None:
    """Completions of 300, 50 and 900 tokens behind prompts of 1,200, 50 and 1,100, cut to 1,024."""
    found = truncate(at_the_end([1500, 100, 2000], [300, 50, 900]), 1024, side)
    assert found.lengths.supervised().tolist() == left
    assert (found.supervised_lost, found.num_without) == (lost, without)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 13])
def test_truncation_against_lists_of_tokens(side: str, most: int) -> None:
    """Each token written out: 1 with a label, 0 without."""
    rng = np.random.default_rng(3)
    samples = [rng.integers(0, 2, rng.integers(0, 12)).tolist() for _ in range(200)]
    spans = [(n, at, at + 1) for n, one in enumerate(samples) for at, token in enumerate(one) if token]
    columns = [np.array(column, np.int64) for column in zip(*spans, strict=True)]
    lengths = Lengths(np.array([len(one) for one in samples], np.int64), Spans(*columns))
    found = truncate(lengths, most, side)
    half = -(-most // 2)
    cut = {
        "right": lambda one: one[:most],
        "left": lambda one: one[-most:],
        "middle": lambda one: one if len(one) <= most else one[:half] + one[len(one) - (most - half) :],
        "drop": lambda one: one if len(one) <= most else [],
    }[side]
    left = [cut(one) for one in samples]
    assert found.lengths.tokens.tolist() == [len(one) for one in left]
    assert found.lengths.supervised().tolist() == [sum(one) for one in left]
    assert found.num_cut == sum(len(one) > most for one in samples)
    assert found.num_without == sum(sum(a) > 0 and sum(b) == 0 for a, b in zip(samples, left, strict=True))


def test_truncation_refuses_what_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="upper"):
        truncate(Lengths(array(1)), 4, "upper")
    with pytest.raises(ValueError, match="cut to 0"):
        truncate(Lengths(array(1)), 0)
    with pytest.raises(ValueError, match="label"):
        at_the_end([3], [4])


# -- padding -----------------------------------------------------------------------------------------------------------


def test_padding_by_hand() -> None:
    tokens = array(1, 2, 3, 10)
    assert padding.fixed(tokens, 10) == (40, 16)
    assert padding.fixed(tokens, 10).waste == pytest.approx(0.6)
    assert padding.longest(tokens, 1).waste == 0
    assert all(0 <= padding.longest(array(*[7] * num), 1).waste < 1e-12 for num in range(1, 50))
    assert padding.longest(tokens, 4).slots == 40


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5])
def test_the_expected_padding_is_that_of_all_orders(micro_batch: int) -> None:
    tokens = array(1, 2, 4, 7, 7)
    slots = []
    for order in permutations(tokens.tolist()):
        batches = [order[at : at + micro_batch] for at in range(0, len(order), micro_batch)]
        slots.append(sum(max(batch) * len(batch) for batch in batches))
    assert padding.longest(tokens, micro_batch).slots == pytest.approx(sum(slots) / len(slots))


def test_grouping_is_that_of_transformers() -> None:
    """The same shuffle handed to both gives the same order of lengths."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers.trainer_pt_utils")
    tokens = np.random.default_rng(1).integers(1, 5000, 1003)
    ours = padding.length_grouped(tokens, 4, seed=7)
    shuffle = torch.tensor(np.random.default_rng(7).permutation(tokens.size))
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(torch, "randperm", lambda *_, **__: shuffle)
        theirs = transformers.get_length_grouped_indices(tokens.tolist(), 4)
    assert tokens[ours].tolist() == tokens[theirs].tolist()
    assert sorted(ours.tolist()) == list(range(tokens.size))
    assert padding.grouped(tokens, 4, seed=7).waste < padding.longest(tokens, 4).waste / 5


def test_nothing_has_no_padding() -> None:
    for found in (padding.fixed(array(), 8), padding.longest(array(), 2), padding.grouped(array(), 2)):
        assert (found.slots, found.tokens, found.waste) == (0, 0, 0)


# -- packing -----------------------------------------------------------------------------------------------------------


def rows(found: packing.Packing) -> list[int]:
    return sorted(found.tokens.tolist())


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """TRL's definition, word by word: the row with the least room that is enough, of equal ones the first in line."""
    line: list[list[int]] = []
    full: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        enough = [row for row in line if capacity - sum(row) >= length]
        row = min(enough, key=lambda row: capacity - sum(row), default=None)
        if row is None:
            row = []
        else:
            line.remove(row)
        row.append(length)
        (line if sum(row) < capacity else full).append(row)
    return sorted(map(sum, line + full))


def first_fit(lengths: list[int], capacity: int, most: int) -> list[int]:
    found: list[list[int]] = []
    for length in lengths:
        row = next((row for row in found if sum(row) + length <= capacity and len(row) < most), None)
        if row is None:
            found.append(row := [])
        row.append(length)
    return sorted(map(sum, found))


@pytest.mark.parametrize("seed", range(20))
def test_packing_against_the_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    lengths = rng.integers(0, capacity + 1, rng.integers(1, 150))
    some = [one for one in lengths.tolist() if one]
    assert rows(packing.best_fit_decreasing(lengths, capacity, group=None)) == best_fit(some, capacity)
    assert rows(packing.first_fit(lengths, capacity, most=3)) == first_fit(some, capacity, 3)
    decreasing = first_fit(sorted(some, reverse=True), capacity, len(some))
    assert rows(packing.first_fit_decreasing(lengths, capacity)) == decreasing


@pytest.mark.parametrize("most", [4, 200])
def test_first_fit_into_thousands_of_rows(most: int) -> None:
    """Lengths as of chats: many rows keep a little room for a long time, and some are closed before they are full."""
    lengths = np.minimum(np.random.default_rng(most).lognormal(6.3, 0.9, 8000).astype(np.int64) + 1, 4096)
    rooms: list[int] = []
    counts: list[int] = []
    for length in lengths.tolist():
        row = next((at for at, room in enumerate(rooms) if room >= length and counts[at] < most), len(rooms))
        if row == len(rooms):
            rooms.append(4096)
            counts.append(0)
        rooms[row] -= length
        counts[row] += 1
    assert len(rooms) > 1500
    assert packing.first_fit(lengths, 4096, most=most).tokens.tolist() == [4096 - room for room in rooms]


def test_rows_by_hand() -> None:
    """Three sequences a row, at most: the first row that has room takes them, and says how much the others have."""
    some = Rows(3)
    assert [some.append(2, 1), some.append(7, 2), some.append(5, 1)] == [2, 7, 7]
    assert some.put(3) == 5  # the second row, which now is closed with room for 4
    assert some.put(4) == 2  # the third one
    assert some.put(2) == 1  # the first one
    assert some.append(9, 3) == 1  # closed from the beginning
    assert some.rooms() == [0, 4, 1, 9]
    assert some.put(1) == 0  # the third one, which is full and closed; the first one is full
    assert some.rooms() == [0, 4, 0, 9]


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_one_length_are_packed_as_one_after_the_other(seed: int) -> None:
    """Few different lengths and many of each, up to rows that take dozens."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 400))
    lengths = rng.choice(rng.integers(1, capacity + 1, 6), 600)
    alone = packing.first_fit(np.sort(lengths)[::-1], capacity, group=None, most=None)
    assert packing.first_fit_decreasing(lengths, capacity).tokens.tolist() == alone.tokens.tolist()


def test_many_different_lengths_are_packed_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 10**6, 300)
    as_runs = packing.first_fit_decreasing(lengths, 10**6)
    monkeypatch.setattr(packing, "MOST_WORK", 0)
    assert packing.first_fit_decreasing(lengths, 10**6).tokens.tolist() == as_runs.tokens.tolist()


def test_the_example_of_trl() -> None:
    """pack_dataset's own: lengths 5, 2, 3, 1 in rows of 4; the one of 5 cut to 4, or split into 4 and 1."""
    assert rows(packing.best_fit_decreasing(array(4, 2, 3, 1), 4)) == [2, 4, 4]
    assert rows(packing.best_fit_decreasing(array(4, 1, 2, 3, 1), 4)) == [3, 4, 4]


def test_groups_are_packed_by_themselves() -> None:
    lengths = array(*[3] * 1000, *[1] * 1000)
    assert packing.best_fit_decreasing(lengths, 4).num_rows == 1250
    assert packing.best_fit_decreasing(lengths, 4, group=None).num_rows == 1000
    assert packing.first_fit(array(*[1] * 401), 1000).tokens.tolist() == [200, 200, 1]


def test_wrapped_by_hand() -> None:
    found = packing.wrapped(array(5, 0, 2, 3, 1), 4)
    assert found.tokens.tolist() == [4, 4, 3]
    assert found.num_samples == 6
    assert packing.wrapped(array(4, 4), 4).num_samples == 2
    assert packing.wrapped(array(), 4).num_rows == 0


def test_what_is_longer_than_a_row_is_refused() -> None:
    for pack in (packing.best_fit_decreasing, packing.first_fit, packing.first_fit_decreasing):
        with pytest.raises(ValueError, match="5 tokens is longer than a row of 4"):
            pack(array(5), 4)


# -- candidates --------------------------------------------------------------------------------------------------------


def test_split_by_hand() -> None:
    assert split(array(5, 8, 0, 3), 4).tolist() == [4, 1, 4, 4, 0, 3]


def test_a_candidate_by_hand() -> None:
    """Lengths 5, 2, 3, 1 at a maximum of 4 in batches of 2."""
    found = candidate(Lengths(array(5, 2, 3, 1)), 4, micro_batch=2, strategies=tuple(STRATEGIES))
    assert found.truncation.tokens_lost == 1
    assert found.paddings["fixed"] == (16, 10)
    assert found.paddings["longest"].slots == pytest.approx(2 * 2 * (4 * 3 + 3 * 2 + 2 * 1) / 6)
    assert {name: (one.num_rows, int(one.tokens.sum())) for name, one in found.packings.items()} == {
        "bfd": (3, 10),
        "bfd-split": (3, 11),
        "wrapped": (3, 11),
        "first-fit": (2, 10),  # of rows of 2 x 4: 4, 2 and 1; 3
        "ffd": (3, 10),
    }


def test_a_summary_by_hand() -> None:
    found = summary(at_the_end([1, 2, 3, 4], [0, 1, 1, 2]))
    assert found[:4] == (4, 10, 4, 2.5)
    assert (found.quantiles[0.0], found.quantiles[0.5], found.quantiles[0.75], found.quantiles[1.0]) == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="no lengths"):
        summary(Lengths(array()))


# -- micro-batches and steps -------------------------------------------------------------------------------------------


def test_micro_batches_by_hand() -> None:
    """Lengths 5, 2, 3, 1, 0 at a maximum of 4, two rows a micro-batch, steps of 4 rows."""
    one = candidate(Lengths(array(5, 2, 3, 1, 0)), 4, micro_batch=2, strategies=tuple(STRATEGIES))
    ways = {found.name: found for found in batchings(one, 2)}
    assert list(ways) == ["fixed", "longest", "grouped", "padding-free", *STRATEGIES]
    fixed, free, bfd, joined = (ways[name] for name in ("fixed", "padding-free", "bfd", "first-fit"))
    assert (fixed.num_rows, fixed.num_tokens, fixed.num_slots, fixed.efficiency) == (4, 10, 16, 10 / 16)
    assert (fixed.slots_per_micro_batch, fixed.tokens_per_micro_batch, fixed.tokens_per_step(4)) == (8, 5, 10)
    assert (free.num_slots, free.efficiency, free.steps_per_epoch(4)) == (10, 1, 1)
    assert (bfd.num_rows, bfd.num_slots, bfd.room) == (3, 10, 12)
    assert bfd.samples_per_row == pytest.approx(4 / 3)
    assert bfd.tokens_per_step(4) == pytest.approx(10 / 3 * 4)
    assert [bfd.steps_per_epoch(target) for target in (2, 4)] == [2, 1]
    assert (joined.num_rows, joined.num_slots, joined.efficiency) == (2, 16, 10 / 16)
    assert (joined.tokens_per_micro_batch, joined.tokens_per_step(2), joined.steps_per_epoch(2)) == (5, 5, 2)


def test_no_samples_make_no_batches() -> None:
    one = candidate(Lengths(array(9)), 4, side="drop", strategies=("bfd", "first-fit", "ffd"))
    for found in batchings(one, 1):
        assert (found.num_rows, found.tokens_per_micro_batch, found.steps_per_epoch(8)) == (0, 0, 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_keep_samples_apart_where_no_cache_is_used(attention: str) -> None:
    """What `memplan.report.contamination` says of transformers: a packed row gives what its samples give alone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation=attention,
    )
    model = transformers.LlamaForCausalLM(config)
    first, second = torch.randint(0, 64, (1, 5)), torch.randint(0, 64, (1, 7))
    row = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    alone = model(second, use_cache=False).logits
    packed = model(row, position_ids=positions, use_cache=False).logits[:, 5:]
    cached = model(row, position_ids=positions, use_cache=True).logits[:, 5:]
    masked = model(row, torch.ones_like(row), position_ids=positions, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(packed, alone)
    assert (cached - alone).abs().max() > 1e-3
    assert (masked - alone).abs().max() > 1e-3
