"""How much of a batch is padding, and how long does it get?

    fixed     every row is padded to the maximum length
    longest   to the longest row of its batch, samples in random order: the expectation is exact, over all orders
    grouped   the same where samples of about the same length come together: one shuffle, as transformers 5.23 groups
              (``train_sampling_strategy="group_by_length"``, trainer_pt_utils.get_length_grouped_indices)

Left out: rounding up (``pad_to_multiple_of``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]

MOST_MEGABATCHES = 50
"""Batches among which transformers sorts, at most; a quarter of the data where that is less."""


class Padding(NamedTuple):
    """What batches of rows hold, over one epoch."""

    slots: float
    """Tokens of all batches, padding included; an expectation, where the order is random."""
    tokens: int
    """Tokens of the data in them."""

    @property
    def waste(self) -> float:
        """Share of the slots that is padding; 0 without any."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


def fixed(tokens: Integers, most: int) -> Padding:
    """Every row is `most` tokens long.

    Args:
        tokens: Of each sequence, none above `most`.
        most: The maximum length.
    """
    return Padding(float(most * tokens.size), int(tokens.sum()))


def longest(tokens: Integers, micro_batch: int) -> Padding:
    """Every batch is as long as its longest row; the last, smaller batch counts with what it has."""
    ordered = np.sort(tokens)
    whole, rest = divmod(int(ordered.size), micro_batch)
    slots = whole * micro_batch * expected_longest(ordered, micro_batch) if whole else 0.0
    slots += rest * expected_longest(ordered, rest) if rest else 0.0
    held = int(tokens.sum())
    return Padding(max(float(slots), float(held)), held)  # rounding takes nothing away from what is there


def expected_longest(ordered: Integers, num: int) -> float:
    """The mean length of the longest of `num` sequences drawn without putting back.

    The i-th of n in ascending order is the longest of them with probability C(i - 1, num - 1) / C(n, num).

    Args:
        ordered: Tokens of each sequence, ascending.
        num: From 1 up to as many as there are.
    """
    chances = chances_of_longest(int(ordered.size), num)
    return float((chances * ordered).sum())


def chances_of_longest(size: int, num: int) -> NDArray[np.float64]:
    """Probability of each of `size` sequences in ascending order to be the longest of `num`.

    Worked down from the longest, whose chance is num / size: each next one's is that of the one above times
    (i - num + 1) / i, with i the number of sequences below the one above.
    """
    below = np.arange(size - 1, 0, -1, dtype=np.float64)
    factors = np.maximum(below - num + 1, 0) / below
    return np.concatenate([[1.0], np.cumprod(factors)])[::-1] * num / size


def grouped(tokens: Integers, micro_batch: int, *, seed: int = 0) -> Padding:
    """Batches of samples of about the same length, for one shuffle.

    Args:
        tokens: Of each sequence.
        micro_batch: Rows of a batch.
        seed: Of the shuffle.
    """
    order = length_grouped(tokens, micro_batch, seed=seed)
    return Padding(float(_slots(tokens[order], micro_batch)), int(tokens.sum()))


def length_grouped(tokens: Integers, micro_batch: int, *, seed: int = 0) -> Integers:
    """The order of the samples: shuffled, then sorted longest first within some batches, the longest of all first."""
    size = int(tokens.size)
    group = max(min(size // (4 * micro_batch), MOST_MEGABATCHES), 1) * micro_batch
    order = np.random.default_rng(seed).permutation(size)
    whole = size // group * group
    for some in (order[:whole].reshape(-1, group), order[whole:].reshape(1, -1)):
        some[:] = np.take_along_axis(some, np.argsort(-tokens[some], axis=1, kind="stable"), axis=1)
    if size:
        firsts = order[::group]
        at = int(np.argmax(tokens[firsts])) * group
        order[0], order[at] = order[at], order[0]
    return order


def _slots(ordered: Integers, micro_batch: int) -> int:
    """Rows times the longest of them, summed over the batches of consecutive rows."""
    whole = ordered.size // micro_batch * micro_batch
    slots = int(ordered[:whole].reshape(-1, micro_batch).max(axis=1).sum()) * micro_batch if whole else 0
    rest = ordered[whole:]
    return slots + (int(rest.max()) * rest.size if rest.size else 0)
