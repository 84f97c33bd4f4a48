"""Which sequence lies in which row, and how many tokens with a loss does a row have?

`memplan.sequences.packing` knows how many tokens the rows hold; here each part of a sequence has its row.  A causal
language model does not learn the first label of what it sees:

    restarts    positions begin anew in each part, and the label of its first token is masked: TRL 1.16 with ``bfd`` and
                ``bfd_split``, whose collator does so wherever a position is 0 (sft_trainer.py,
                DataCollatorForLanguageModeling); transformers 5.23 does the same where it lays sequences end to end
                (data_collator.py, DataCollatorWithFlattening)
    otherwise   the labels of the parts lie end to end as they are, and the shift loses the first of the row alone:
                TRL's ``wrapped``, whose collator makes no positions, and axolotl 0.19 (utils/collators/batching.py)

Where the first-fit-decreasing of the literature is used, it is taken to restart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from memplan.sequences.packing import AXOLOTL_GROUP, AXOLOTL_MOST, MOST_WORK, TRL_GROUP
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from memplan.sequences.lengths import Lengths

    Integers = NDArray[np.int64]


class Placement(NamedTuple):
    """Parts of sequences in rows, those of a row in the order in which they lie; arrays of shape (num_parts,)."""

    num_rows: int
    row: Integers
    """Which row it lies in, from 0, in the order in which rows are begun."""
    sample: Integers
    """Which sequence it is of."""
    start: Integers
    """Its first token."""
    stop: Integers
    """The first token behind it."""

    def tokens(self) -> Integers:
        """Tokens of each row."""
        return np.bincount(self.row, self.stop - self.start, self.num_rows).astype(np.int64)

    def predicted(self, lengths: Lengths, *, restarts: bool) -> Integers:
        """Tokens of each row that a causal language model is trained to predict.

        Args:
            lengths: The sequences that were placed.
            restarts: Whether the first label of each part is lost, or that of each row alone.
        """
        lost = np.ones(self.row.size, np.int64)
        if not restarts:
            lost[:] = 0
            lost[np.unique(self.row, return_index=True)[1]] = 1
        offset = (np.cumsum(lengths.tokens) - lengths.tokens)[self.sample]
        first = offset + np.minimum(self.start + lost, self.stop)
        num = _labels_before(lengths, offset + self.stop) - _labels_before(lengths, first)
        return np.bincount(self.row, num, self.num_rows).astype(np.int64)


def _labels_before(lengths: Lengths, place: Integers) -> Integers:
    """Tokens with a label before some places in all sequences laid end to end."""
    if lengths.spans is None:
        return place
    spans = lengths.spans
    offset = (np.cumsum(lengths.tokens) - lengths.tokens)[spans.sample]
    start = offset + spans.start
    order = np.argsort(start, kind="stable")
    start, size = start[order], (spans.stop - spans.start)[order]
    behind = np.concatenate([[0], np.cumsum(size)])
    at = np.searchsorted(start, place, side="right") - 1  # the span that begins last, before or at the place
    inside = np.clip(place - start[at], 0, size[at])
    return np.where(at < 0, 0, behind[at] + inside)


class Placing(NamedTuple):
    """How a strategy of `memplan.sequences.analysis.STRATEGIES` places sequences."""

    place: Callable[[Integers, int], Placement]
    """Takes the tokens of each sequence, in the order in which they come, and of a row; none is longer than a row where
    the strategy does not split."""
    restarts: bool
    draws: bool = False
    """Whether sequences come in an order that is drawn anew each epoch, and rows as they are begun (axolotl); otherwise
    in the order of the data, and the rows are shuffled (TRL)."""
    needs_labels: bool = False
    """Whether sequences without a label are left out before (axolotl 0.19, utils/trainer.py)."""


def best_fit(tokens: Integers, capacity: int) -> Placement:
    """The rows of `packing.best_fit_decreasing`; of several with the same room the one that has had it longest.

    A sequence that is longer than a row is split as `memplan.sequences.analysis.split` does.
    """
    there = np.flatnonzero(tokens > 0)
    num = -(-tokens[there] // capacity)
    before = np.cumsum(num) - num
    whole = np.repeat(np.arange(there.size), num)
    start = (np.arange(whole.size) - before[whole]) * capacity
    part = np.minimum(tokens[there[whole]] - start, capacity)
    order, row, num_rows = _in_groups(part, before[::TRL_GROUP], lambda some: _best_fit(some, capacity))
    return Placement(num_rows, row, there[whole[order]], start[order], start[order] + part[order])


def first_fit(tokens: Integers, capacity: int) -> Placement:
    """The rows of `packing.first_fit`."""
    there = np.flatnonzero(tokens > 0)
    starts = np.arange(0, there.size, AXOLOTL_GROUP)
    found = _in_groups(tokens[there], starts, lambda some: _first_fit(some.tolist(), capacity, AXOLOTL_MOST))
    return _whole(tokens, there[found[0]], found[1], found[2])


def first_fit_decreasing(tokens: Integers, capacity: int) -> Placement:
    """The rows of `packing.first_fit_decreasing`: sequences of one length at once, where that is less work."""
    order = np.argsort(-tokens, kind="stable")
    order = order[tokens[order] > 0]
    longest_first, num = (found[::-1] for found in np.unique(tokens[order], return_counts=True))
    if longest_first.size * -(-int(tokens.sum()) // capacity) > MOST_WORK * order.size:
        _, row, opened = _first_fit(tokens[order].tolist(), capacity, order.size)
    else:
        row, opened = _in_runs(longest_first, num, capacity)
    return _whole(tokens, order, row, opened)


def _in_runs(longest_first: Integers, num: Integers, capacity: int) -> tuple[Integers, int]:
    """The rows of so many sequences of each length, and how many there are."""
    room = np.zeros(int(num.sum()), np.int64)  # of the rows that are open, and of those that may follow
    rows, opened = [room[:0]], 0
    for length, all_of_it in zip(longest_first.tolist(), num.tolist(), strict=True):
        with_room = np.flatnonzero(room[:opened] >= length)[:all_of_it]
        more = -(-all_of_it // (capacity // length))  # rows, at most, that are begun
        takes = np.append(room[with_room], np.full(more, capacity)) // length
        takes = np.diff(np.minimum(np.cumsum(takes), all_of_it), prepend=0)
        at = np.append(with_room, np.arange(opened, opened + more))[takes > 0]
        takes = takes[takes > 0]
        begun = at >= opened
        room[at[begun]] = capacity
        room[at] -= length * takes
        opened += int(begun.sum())
        rows.append(np.repeat(at, takes))
    return np.concatenate(rows), opened


def wrapped(tokens: Integers, capacity: int) -> Placement:
    """The rows of `packing.wrapped`: a sequence that is cut has a part in every row that has some of it."""
    there = np.flatnonzero(tokens > 0)
    held = tokens[there]
    group = np.arange(there.size) // TRL_GROUP
    ends = np.cumsum(held)
    first = np.arange(0, there.size, TRL_GROUP)
    ahead = (ends - held)[first]  # tokens of the groups before
    rows = -(-np.diff(np.append(ahead, held.sum())) // capacity)
    begin, end = ends - held - ahead[group], ends - ahead[group]  # within the group
    num = (end - 1) // capacity - begin // capacity + 1
    part = np.repeat(np.arange(there.size), num)
    row = (begin // capacity)[part] + np.arange(part.size) - np.repeat(np.cumsum(num) - num, num)
    start = np.maximum(row * capacity, begin[part]) - begin[part]
    stop = np.minimum((row + 1) * capacity, end[part]) - begin[part]
    return Placement(int(rows.sum()), row + (np.cumsum(rows) - rows)[group[part]], there[part], start, stop)


def _in_groups(
    tokens: Integers, starts: Integers, pack: Callable[[Integers], tuple[Integers, Integers, int]]
) -> tuple[Integers, Integers, int]:
    """The order in which sequences are packed, the row of each, and how many rows, of groups by themselves."""
    orders, rows, opened = [tokens[:0]], [tokens[:0]], 0
    for start, stop in pairwise([*starts.tolist(), tokens.size]):
        order, row, num = pack(tokens[start:stop])
        orders.append(order + start)
        rows.append(row + opened)
        opened += num
    return np.concatenate(orders), np.concatenate(rows), opened


def _whole(tokens: Integers, sample: Integers, row: Integers, num_rows: int) -> Placement:
    return Placement(num_rows, row, sample, np.zeros_like(sample), tokens[sample])


def _best_fit(tokens: Integers, capacity: int) -> tuple[Integers, Integers, int]:
    order = np.argsort(-tokens, kind="stable")
    rows: list[int] = []
    rooms: list[int] = []  # the different rooms there are, ascending
    line: dict[int, deque[int]] = {}  # the rows with each of them
    opened = 0
    for length in tokens[order].tolist():
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = opened, capacity
            opened += 1
        else:
            room = rooms[at]
            row = line[room].popleft()
            if not line[room]:
                del line[room], rooms[at]
        rows.append(row)
        room -= length
        if room in line:
            line[room].append(row)
        elif room:
            insort(rooms, room)
            line[room] = deque((row,))
    return order, np.array(rows, np.int64), opened


def _first_fit(lengths: list[int], capacity: int, most: int) -> tuple[Integers, Integers, int]:
    """The rows of one group.  A tree over the rows knows in each node the largest room below it."""
    width = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * width)
    count = [0] * width
    rows = []
    for length in lengths:
        node = 1
        while node < width:
            node *= 2
            node += room[node] < length
        row = node - width
        rows.append(row)
        count[row] += 1
        room[node] = room[node] - length if count[row] < most else 0
        node //= 2
        while node:
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
            node //= 2
    return np.arange(len(rows)), np.array(rows, np.int64), max(rows) + 1


PLACING_BY_STRATEGY = {
    "bfd": Placing(best_fit, restarts=True),
    "bfd-split": Placing(best_fit, restarts=True),
    "wrapped": Placing(wrapped, restarts=False),
    "first-fit": Placing(first_fit, restarts=False, draws=True, needs_labels=True),
    "ffd": Placing(first_fit_decreasing, restarts=True),
}
"""Name of a strategy -> how it places."""
