"""Laws of truncation, padding and packing: no token is lost or doubled, no row too full, no bound broken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.sequences import padding
from memplan.sequences.analysis import STRATEGIES, split
from memplan.sequences.lengths import Lengths, Spans, at_the_end
from memplan.sequences.packing import best_fit_decreasing, first_fit, first_fit_decreasing
from memplan.sequences.placement import PLACING_BY_STRATEGY
from memplan.sequences.truncation import SIDES, truncate

TOKENS = st.lists(st.integers(0, 300), max_size=80).map(lambda found: np.array(found, np.int64))


@given(tokens=TOKENS, capacity=st.integers(1, 200), name=st.sampled_from(sorted(STRATEGIES)))
def test_rows_hold_all_tokens_once(tokens: np.ndarray, capacity: int, name: str) -> None:
    strategy = STRATEGIES[name]
    asked = split(tokens, capacity) if strategy.splits else np.minimum(tokens, capacity)
    found = strategy.pack(tokens if strategy.splits else asked, capacity)
    assert found.tokens.sum() == asked.sum()
    assert ((found.tokens > 0) & (found.tokens <= capacity)).all()
    assert 0 < found.efficiency <= 1
    if name != "wrapped":
        assert found.num_samples == (asked > 0).sum()


@given(tokens=TOKENS, capacity=st.integers(1, 200), name=st.sampled_from(sorted(STRATEGIES)), seed=st.integers(0, 99))
def test_placement_is_packing_with_names(tokens: np.ndarray, capacity: int, name: str, seed: int) -> None:
    """The rows have the tokens of the fast algorithms; each token of each sequence lies in one of them, once."""
    strategy = STRATEGIES[name]
    asked = tokens if strategy.splits else np.minimum(tokens, capacity)
    found = PLACING_BY_STRATEGY[name].place(asked, capacity)
    fast = strategy.pack(asked, capacity)
    assert sorted(found.tokens().tolist()) == sorted(fast.tokens.tolist())
    assert found.row.size == fast.num_samples
    lies_in: dict[tuple[int, int], int] = {}
    rows: list[list[tuple[int, int]]] = [[] for _ in range(found.num_rows)]
    for row, sample, start, stop in zip(*(one.tolist() for one in found[1:]), strict=True):
        for token in range(start, stop):
            assert (sample, token) not in lies_in
            lies_in[sample, token] = row
            rows[row].append((sample, token))
    assert lies_in.keys() == {(n, token) for n, size in enumerate(asked.tolist()) for token in range(size)}
    labels = [np.random.default_rng([seed, n]).integers(0, 2, size) for n, size in enumerate(asked.tolist())]
    lengths = with_labels(labels)
    begins = {(sample, start) for sample, start in zip(found.sample.tolist(), found.start.tolist(), strict=True)}
    for restarts, lost in ((True, begins), (False, {row[0] for row in rows})):
        learnt = [sum(int(labels[n][at]) for n, at in row if (n, at) not in lost) for row in rows]
        assert found.predicted(lengths, restarts=restarts).tolist() == learnt
    if not strategy.splits:
        firsts = sum(int(one[0]) for one in labels if one.size)
        assert found.predicted(lengths, restarts=True).sum() == sum(int(one.sum()) for one in labels) - firsts


def with_labels(labels: list[np.ndarray]) -> Lengths:
    """Sequences of which each token is written out: 1 with a label, 0 without."""
    spans = [(n, at, at + 1) for n, one in enumerate(labels) for at in np.flatnonzero(one).tolist()]
    columns = np.array(spans, np.int64).reshape(-1, 3).T
    return Lengths(np.array([one.size for one in labels], np.int64), Spans(*columns))


@given(tokens=TOKENS, capacity=st.integers(1, 600), group=st.integers(1, 80), most=st.integers(1, 9))
def test_first_fit_takes_the_first_row_that_has_room(tokens: np.ndarray, capacity: int, group: int, most: int) -> None:
    """Row by row, in the order of the rows; each group of sequences has its own."""
    asked = [one for one in np.minimum(tokens, capacity).tolist() if one]
    expected: list[int] = []
    for start in range(0, len(asked), group):
        rows: list[list[int]] = []
        for length in asked[start : start + group]:
            row = next((row for row in rows if len(row) < most and sum(row) + length <= capacity), None)
            if row is None:
                rows.append(row := [])
            row.append(length)
        expected += map(sum, rows)
    found = first_fit(np.minimum(tokens, capacity), capacity, group=group, most=most)
    assert found.tokens.tolist() == expected
    assert found.num_samples == len(asked)


@given(tokens=TOKENS, capacity=st.integers(1, 600), group=st.integers(1, 80))
def test_best_fit_takes_the_row_with_the_least_room(tokens: np.ndarray, capacity: int, group: int) -> None:
    asked = [one for one in np.minimum(tokens, capacity).tolist() if one]
    expected: list[int] = []
    for start in range(0, len(asked), group):
        rooms: list[int] = []
        for length in sorted(asked[start : start + group], reverse=True):
            room = min((one for one in rooms if one >= length), default=None)
            if room is None:
                room = capacity
            else:
                rooms.remove(room)
            rooms.append(room - length)
        expected += [capacity - room for room in rooms]
    found = best_fit_decreasing(np.minimum(tokens, capacity), capacity, group=group)
    assert sorted(found.tokens.tolist()) == sorted(expected)


@given(tokens=TOKENS, capacity=st.integers(1, 200))
def test_first_fit_decreasing_is_within_its_bound(tokens: np.ndarray, capacity: int) -> None:
    """At most 11/9 of the fewest rows and 6/9 (Dosa 2007); the fewest are at least the tokens over the capacity."""
    asked = np.minimum(tokens, capacity)
    rows = first_fit_decreasing(asked, capacity).num_rows
    alone = int((2 * asked > capacity).sum())  # no two of these share a row
    assert rows >= max(-(-int(asked.sum()) // capacity), alone)
    half_full = 2 * -(-int(asked.sum()) // capacity)
    assert rows <= max(half_full, 1)


@given(tokens=TOKENS, most=st.integers(1, 300), side=st.sampled_from(SIDES), data=st.data())
def test_truncation_loses_what_it_says(tokens: np.ndarray, most: int, side: str, data: st.DataObject) -> None:
    supervised = np.array([data.draw(st.integers(0, int(one))) for one in tokens], np.int64)
    lengths = at_the_end(tokens, supervised)
    found = truncate(lengths, most, side)
    left = found.lengths
    assert lengths.num_tokens == left.num_tokens + found.tokens_lost
    assert supervised.sum() == left.supervised().sum() + found.supervised_lost
    assert (left.tokens <= most).all()
    assert (left.supervised() <= np.minimum(supervised, left.tokens)).all()
    if most >= tokens.max(initial=0):
        assert (found.tokens_lost, found.supervised_lost, found.num_cut, found.num_without) == (0, 0, 0, 0)


@given(tokens=TOKENS, micro_batch=st.integers(1, 9))
def test_padding_grows_with_the_batch_and_ends_at_the_longest(tokens: np.ndarray, micro_batch: int) -> None:
    longest = padding.longest(tokens, micro_batch)
    assert longest.slots >= longest.tokens - 1e-6
    assert longest.slots <= tokens.max(initial=0) * tokens.size + 1e-6
    assert padding.longest(tokens, 1).slots == pytest.approx(int(tokens.sum()))
    grouped = padding.grouped(tokens, micro_batch)
    assert tokens.sum() <= grouped.slots <= tokens.max(initial=0) * tokens.size
