"""What is the largest micro-batch that a data set can give, and how likely is one that is too large?

An epoch hands every sequence over once, in an order drawn at random, b at a time.  Of rows that are padded to the
longest of their micro-batch, a sequence that is too long makes its micro-batch too large wherever it comes; the last
micro-batch alone, where it has fewer rows, may hold it.  With k of n sequences too long and r rows in the last:

    P(all k in the last one) = r (r - 1) ... (r - k + 1) / (n (n - 1) ... (n - k + 1))

Where sequences lie end to end their sum counts.  It is certain that none is too large where the b longest together are
not, and that one is where a single sequence is; between the two, epochs are drawn.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]

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


def chance_of_long_row(tokens: Integers, micro_batch: int, most: int) -> Chance:
    """That a row of more than `most` tokens comes in a micro-batch that has all of its rows.

    Args:
        tokens: Of each sequence.
        micro_batch: Rows of a micro-batch.
        most: Tokens that all of them may have.
    """
    size, longer = int(tokens.size), int((tokens > most).sum())
    if not longer:
        return Chance(0.0)
    last = size % micro_batch
    missed = prod((last - i) / (size - i) for i in range(longer)) if longer <= last else 0.0
    return Chance(1 - missed, is_exact=not missed)


def chance_of_long_sum(tokens: Integers, micro_batch: int, most: int, *, seed: int = 0) -> Chance:
    """That some `micro_batch` sequences which come together have more than `most` tokens.

    Args:
        tokens: Of each sequence.
        micro_batch: Sequences of a micro-batch.
        most: Tokens that they may have together.
        seed: Of the epochs that are drawn.
    """
    if int(largest_sums(tokens, micro_batch)[-1]) <= most:
        return Chance(0.0)
    if int(tokens.max()) > most:
        return Chance(1.0)
    num = min(max(DRAWN_LENGTHS // int(tokens.size), LEAST_EPOCHS), MOST_EPOCHS)
    draw = np.random.default_rng(seed)
    starts = np.arange(0, tokens.size, micro_batch)
    exceeded = sum(int(np.add.reduceat(draw.permutation(tokens), starts).max()) > most for _ in range(num))
    return Chance(exceeded / num, num, is_exact=False)
