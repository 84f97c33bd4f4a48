"""How do sequences of many lengths fill rows of one length?  The algorithms of the trainers, by lengths alone.

    best_fit_decreasing   TRL 1.16, ``packing_strategy="bfd"`` and ``"bfd_split"`` (data_utils.py): each thousand
                          examples by themselves, as ``Dataset.map`` hands them over, the longest first, each into the
                          row in which it leaves the least room
    first_fit             axolotl 0.19 (utils/samplers/multipack.py): each 100,000 by themselves, in the sampler's
                          order -- its documentation says decreasing, its code does not sort --, each into the first row
                          that has room and fewer than 200 samples
    first_fit_decreasing  the same of the longest first, as the literature has it (Johnson 1973)
    wrapped               TRL, ``"wrapped"``: laid end to end and cut, each thousand by themselves

Rows are told by how many tokens they hold; which sequence went where is not kept.  One that is longer than a row is the
caller's to truncate or to split (`memplan.sequences.truncation`, `memplan.sequences.analysis.split`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

import numpy as np

from memplan.sequences.rows import NO_ROOM, Rows
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Lengths = NDArray[np.int64]

TRL_GROUP = 1000
"""``batch_size`` of ``datasets.Dataset.map``, which TRL leaves as it is."""
AXOLOTL_GROUP = 100_000
"""``sample_packing_group_size``."""
AXOLOTL_MOST = 200
"""``sample_packing_bin_size``: samples in a row, at most."""

MOST_WORK = 1000
"""Rows that are looked at for each sequence, up to which packing runs of one length is faster."""


class Packing(NamedTuple):
    """Rows, one an element."""

    capacity: int
    """Tokens that a row has room for."""
    tokens: Lengths
    """Tokens of each row."""
    num_samples: int
    """Sequences, or parts of them, in all rows together."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return int(self.tokens.size)

    @property
    def efficiency(self) -> float:
        """Tokens over room for tokens; 1 without rows."""
        return float(self.tokens.sum() / (self.num_rows * self.capacity)) if self.num_rows else 1.0


def best_fit_decreasing(lengths: Lengths, capacity: int, *, group: int | None = TRL_GROUP) -> Packing:
    """Longest first, each into the row in which it leaves the least room.

    Args:
        lengths: Tokens of each sequence, in the order of the data; empty ones are left out.
        capacity: Tokens of a row.
        group: Sequences that are packed by themselves; None: all together.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    there = _checked(lengths, capacity)
    parts = [_best_fit(np.sort(some)[::-1], capacity) for some in _groups(there, group)]
    return Packing(capacity, _joined(parts), there.size)


def _best_fit(longest_first: Lengths, capacity: int) -> Lengths:
    """The rows of one group.

    Those of more than half a row have one each: none fits beside another, so none finds room.
    """
    alone = int(np.count_nonzero(2 * longest_first > capacity))
    full = int(np.count_nonzero(longest_first == capacity))
    rooms = (capacity - longest_first[full:alone]).tolist()  # ascending, of rows that are not full
    for length in longest_first[alone:].tolist():
        at = bisect_left(rooms, length)
        room = (rooms.pop(at) if at < len(rooms) else capacity) - length
        if room:
            insort(rooms, room)
        else:
            full += 1
    return capacity - np.array([0] * full + rooms, np.int64)


def first_fit(
    lengths: Lengths, capacity: int, *, group: int | None = AXOLOTL_GROUP, most: int | None = AXOLOTL_MOST
) -> Packing:
    """Each in its turn into the first row that has room.

    Args:
        lengths: Tokens of each sequence, in the order in which they come; empty ones are left out.
        capacity: Tokens of a row.
        group: Sequences that are packed by themselves; None: all together.
        most: Sequences in a row, at most; None: any number.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    there = _checked(lengths, capacity)
    parts = [_first_fit(some.tolist(), capacity, most or some.size) for some in _groups(there, group)]
    return Packing(capacity, _joined(parts), there.size)


def first_fit_decreasing(lengths: Lengths, capacity: int) -> Packing:
    """The same of all together, the longest first, with any number in a row.

    Sequences of one length are packed at once where that is less work than one after the other: each row that has
    room takes as many as fit, in the order of the rows, and the rest fills new ones.
    """
    there = _checked(lengths, capacity)
    longest_first, num = (found[::-1] for found in np.unique(there, return_counts=True))
    fewest = max(-(-int(there.sum()) // capacity), int((2 * there > capacity).sum()))
    if longest_first.size * fewest > MOST_WORK * there.size:
        return first_fit(np.sort(there)[::-1], capacity, group=None, most=None)
    return Packing(capacity, capacity - _rooms_of_runs(longest_first, num, capacity), there.size)


def _rooms_of_runs(longest_first: Lengths, num: Lengths, capacity: int) -> Lengths:
    """The room that is left in each row, after `num` sequences of each length."""
    rooms = np.zeros(int(num.sum()), np.int64)  # of the rows that are open, and of those that may follow
    rows = 0
    for length, all_of_it in zip(longest_first.tolist(), num.tolist(), strict=True):
        with_room = np.flatnonzero(rooms[:rows] >= length)[:all_of_it]
        fits = np.minimum(np.cumsum(rooms[with_room] // length), all_of_it)  # up to and with each row
        rooms[with_room] -= length * np.diff(fits, prepend=0)
        left = all_of_it - (int(fits[-1]) if fits.size else 0)
        per_row = capacity // length
        new = -(-left // per_row)
        rooms[rows : rows + new] = capacity - per_row * length
        if new:
            rooms[rows + new - 1] = capacity - (left - (new - 1) * per_row) * length
        rows += new
    return rooms[:rows]


def _first_fit(lengths: list[int], capacity: int, most: int) -> Lengths:
    """The rows of one group.

    Most sequences are longer than any room that earlier rows have left, and go into the last row, which is kept apart.
    """
    earlier = Rows(most)
    largest = NO_ROOM  # that they have
    room, count = capacity, 0  # of the last row
    for length in lengths:
        if length <= largest:
            largest = earlier.put(length)
        elif length <= room and count < most:
            room -= length
            count += 1
        else:
            largest = earlier.append(room, count)
            room, count = capacity - length, 1
    return capacity - np.array([*earlier.rooms(), room], np.int64)


def wrapped(lengths: Lengths, capacity: int, *, group: int | None = TRL_GROUP) -> Packing:
    """Laid end to end and cut into rows; a sequence that is cut counts in every row that has some of it.

    Args:
        lengths: Tokens of each sequence, in the order of the data; empty ones are left out.
        capacity: Tokens of a row.
        group: Sequences that are laid end to end; None: all.
    """
    tokens: list[Lengths] = []
    num_parts = 0
    for some in _groups(lengths[lengths > 0], group):
        ends = np.cumsum(some)
        rows = -(-int(ends[-1]) // capacity)
        filled = np.full(rows, capacity, np.int64)
        filled[-1] = int(ends[-1]) - (rows - 1) * capacity
        num_parts += int(((ends - 1) // capacity - (ends - some) // capacity + 1).sum())
        tokens.append(filled)
    return Packing(capacity, _joined(tokens), num_parts)


def _joined(parts: list[Lengths]) -> Lengths:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _checked(lengths: Lengths, capacity: int) -> Lengths:
    if lengths.size and int(lengths.max()) > capacity:
        raise ValueError(f"a sequence of {int(lengths.max())} tokens is longer than a row of {capacity}")
    return lengths[lengths > 0]


def _groups(lengths: Lengths, group: int | None) -> Iterator[Lengths]:
    size = group or max(lengths.size, 1)
    for start in range(0, lengths.size, size):
        yield lengths[start : start + size]
