"""What is the largest micro-batch that a data set can give, and how likely is one that is too large?

An epoch hands every sequence over once, in an order drawn at random, b at a time.  Of rows that are padded to the
longest of their micro-batch, a sequence that is too long makes its micro-batch too large wherever it comes; the last
micro-batch alone, where it has fewer rows, may hold it.  With k of n sequences too long and r rows in the last:

    P(all k in the last one) = r (r - 1) ... (r - k + 1) / (n (n - 1) ... (n - k + 1))

Where sequences lie end to end their sum counts.  It is certain that none is too large where the b longest together are
not, and that one is where a single sequence is; between the two, epochs are drawn.

Of a sample of the data, drawn at random: the k that are too long come in an epoch of all n, with others that it lacks,
so that the first is a lower bound; an epoch that is drawn takes n of the sample's, each as often as it is drawn.  Where
none of m is too long, no more than a share p of the data is, (1 - p)^m = 5 %: 3 / m nearly (Hanley and Lippman-Hand
1983, the rule of three).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]

CONFIDENCE = 0.95
DRAWN_LENGTHS = 20_000_000
"""Lengths that are put in order, all epochs together."""
LEAST_EPOCHS, MOST_EPOCHS = 20, 1000


class Chance(NamedTuple):
    """Probability that some micro-batch of an epoch is too large."""

    value: float
    num_epochs: int = 0
    """Epochs that were drawn; 0: it is exact, or what it is at the least."""
    is_exact: bool = True
    """Whether it is neither drawn nor a lower bound."""


def largest_sums(tokens: Integers, num: int) -> Integers:
    """Tokens of the 1, 2, ... up to `num` longest sequences together; fewer where there are fewer."""
    return np.cumsum(np.sort(tokens)[::-1][:num])


def most_in_row(tokens: Integers, capacity: int) -> int:
    """No row of `capacity` tokens holds more sequences than this: so many of the shortest fit; 1 at the least."""
    sums = np.cumsum(np.sort(tokens[tokens > 0]))
    return max(int(np.searchsorted(sums, capacity, side="right")), 1)


def share_unseen(num: int) -> float:
    """Share of the data that may be of a kind of which a sample of `num` has none, with 95 % confidence."""
    return float(1 - (1 - CONFIDENCE) ** (1 / num))


def chance_of_long_row(tokens: Integers, micro_batch: int, most: int, *, num_records: int | None = None) -> Chance:
    """That a row of more than `most` tokens comes in a micro-batch that has all of its rows.

    Args:
        tokens: Of each sequence.
        micro_batch: Rows of a micro-batch.
        most: Tokens that all of them may have.
        num_records: Sequences of an epoch, where `tokens` are a sample of them; None: these are all.
    """
    size, longer = num_records or int(tokens.size), int((tokens > most).sum())
    if not longer:
        return Chance(0.0)
    last = size % micro_batch
    missed = prod((last - i) / (size - i) for i in range(longer)) if longer <= last else 0.0
    return Chance(1 - missed, is_exact=not missed)


def chance_of_long_sum(
    tokens: Integers, micro_batch: int, most: int, *, num_records: int | None = None, seed: int = 0
) -> Chance:
    """That some `micro_batch` sequences which come together have more than `most` tokens.

    Args:
        tokens: Of each sequence.
        micro_batch: Sequences of a micro-batch.
        most: Tokens that they may have together.
        num_records: Sequences of an epoch, where `tokens` are a sample of them; None: these are all.
        seed: Of the epochs that are drawn.
    """
    longest = int(tokens.max())
    if (int(largest_sums(tokens, micro_batch)[-1]) if num_records is None else micro_batch * longest) <= most:
        return Chance(0.0)
    if longest > most:
        return Chance(1.0)
    size = num_records or int(tokens.size)
    num = min(max(DRAWN_LENGTHS // size, LEAST_EPOCHS), MOST_EPOCHS)
    draw = np.random.default_rng(seed)
    starts = np.arange(0, size, micro_batch)

    def epoch() -> Integers:
        return draw.permutation(tokens) if num_records is None else draw.choice(tokens, size)

    exceeded = sum(int(np.add.reduceat(epoch(), starts).max()) > most for _ in range(num))
    return Chance(exceeded / num, num, is_exact=False)
