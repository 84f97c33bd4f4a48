"""Which sequence lies in which row: as TRL's and axolotl's own examples have it, and against the definitions."""

from __future__ import annotations

import numpy as np
import pytest

from memplan.sequences import placement
from memplan.sequences.analysis import STRATEGIES, best_fit_split
from memplan.sequences.lengths import Lengths, at_the_end
from memplan.sequences.placement import PLACING_BY_STRATEGY, Placement


def array(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def contents(found: Placement) -> list[list[tuple[int, int, int]]]:
    """(sequence, first token, first behind it) of the parts of each row."""
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(found.num_rows)]
    for row, *part in zip(*(one.tolist() for one in found[1:]), strict=True):
        rows[row].append(tuple(part))
    return rows


def test_every_strategy_is_placed() -> None:
    assert PLACING_BY_STRATEGY.keys() == STRATEGIES.keys()


def test_the_example_of_trl() -> None:
    """Lengths 5, 2, 3, 1 in rows of 4, as in pack_dataset: the fifth token is cut off, or lies behind the third."""
    assert contents(PLACING_BY_STRATEGY["bfd"].place(array(4, 2, 3, 1), 4)) == [
        [(0, 0, 4)],
        [(2, 0, 3), (3, 0, 1)],
        [(1, 0, 2)],
    ]
    assert contents(PLACING_BY_STRATEGY["bfd-split"].place(array(5, 2, 3, 1), 4)) == [
        [(0, 0, 4)],
        [(2, 0, 3), (0, 4, 5)],
        [(1, 0, 2), (3, 0, 1)],
    ]


def test_wrapped_by_hand() -> None:
    """5, 0, 2, 3 and 1 tokens in rows of 4; a thousand sequences are laid end to end, and the next begin a row."""
    assert contents(PLACING_BY_STRATEGY["wrapped"].place(array(5, 0, 2, 3, 1), 4)) == [
        [(0, 0, 4)],
        [(0, 4, 5), (2, 0, 2), (3, 0, 1)],
        [(3, 1, 3), (4, 0, 1)],
    ]
    found = PLACING_BY_STRATEGY["wrapped"].place(array(*[1] * 1001), 3)
    assert found.tokens().tolist() == [3] * 333 + [1, 1]


def test_first_fit_keeps_the_order_in_which_sequences_come() -> None:
    assert contents(PLACING_BY_STRATEGY["first-fit"].place(array(3, 2, 4, 1, 2), 5)) == [
        [(0, 0, 3), (1, 0, 2)],
        [(2, 0, 4), (3, 0, 1)],
        [(4, 0, 2)],
    ]
    assert PLACING_BY_STRATEGY["first-fit"].place(array(*[1] * 401), 1000).tokens().tolist() == [200, 200, 1]


def test_parts_are_packed_with_those_of_their_thousand() -> None:
    """TRL packs a thousand examples by themselves, however many parts they have."""
    tokens = array(*[5] * 1000, *[3] * 1000)
    found = PLACING_BY_STRATEGY["bfd-split"].place(tokens, 4)
    rows = contents(found)
    assert all(len({sample // 1000 for sample, _, _ in row}) == 1 for row in rows)
    assert len(rows) == 1000 + 250 + 1000
    assert sorted(found.tokens().tolist()) == sorted(best_fit_split(tokens, 4).tokens.tolist())


@pytest.mark.parametrize("seed", range(10))
def test_rows_against_the_definitions(seed: int) -> None:
    """Best fit: the row with the least room that is enough, of equal ones the one that has waited longest."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    tokens = rng.integers(1, capacity + 1, rng.integers(1, 150))
    line: list[list[int]] = []
    begun: list[list[int]] = []
    for n in np.argsort(-tokens, kind="stable").tolist():
        enough = [row for row in line if capacity - tokens[row].sum() >= tokens[n]]
        row = min(enough, key=lambda row: capacity - tokens[row].sum(), default=None)
        if row is None:
            begun.append(row := [])
        else:
            line.remove(row)
        row.append(n)
        line.append(row)
    assert [[part[0] for part in row] for row in contents(PLACING_BY_STRATEGY["bfd"].place(tokens, capacity))] == begun


@pytest.mark.parametrize("seed", range(10))
def test_runs_of_one_length_are_placed_as_one_after_the_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 400))
    tokens = rng.choice(rng.integers(1, capacity + 1, 6), 300)
    as_runs = contents(PLACING_BY_STRATEGY["ffd"].place(tokens, capacity))
    monkeypatch.setattr(placement, "MOST_WORK", 0)
    assert contents(PLACING_BY_STRATEGY["ffd"].place(tokens, capacity)) == as_runs


def test_labels_by_hand() -> None:
    """Two sequences of 4 and 3 tokens, the last 4 and 2 of them with a label, in one row."""
    lengths = at_the_end([4, 3], [4, 2])
    for name in ("bfd", "first-fit"):
        found = PLACING_BY_STRATEGY[name].place(lengths.tokens, 8)
        assert found.predicted(lengths, restarts=True).tolist() == [3 + 2]
        assert found.predicted(lengths, restarts=False).tolist() == [3 + 2]
    whole = Lengths(lengths.tokens)  # all have one: the first of the second is learnt where nothing masks it
    assert found.predicted(whole, restarts=True).tolist() == [3 + 2]
    assert found.predicted(whole, restarts=False).tolist() == [3 + 3]
    cut = PLACING_BY_STRATEGY["wrapped"].place(lengths.tokens, 5)
    assert cut.predicted(whole, restarts=False).tolist() == [4, 1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_has_no_rows(name: str) -> None:
    for tokens in (array(), array(0, 0)):
        found = PLACING_BY_STRATEGY[name].place(tokens, 4)
        assert (found.num_rows, found.row.size, found.tokens().size) == (0, 0, 0)
        assert found.predicted(Lengths(tokens), restarts=False).size == 0
