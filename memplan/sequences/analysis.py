"""What does each candidate for the maximum length cost: in tokens that are lost, in padding, in rows?

Left out: memory and time, which the planner has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memplan.sequences import padding
from memplan.sequences.packing import (
    TRL_GROUP,
    Packing,
    best_fit_decreasing,
    first_fit,
    first_fit_decreasing,
    wrapped,
)
from memplan.sequences.truncation import Truncation, truncate
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from memplan.sequences.lengths import Lengths
    from memplan.sequences.padding import Padding

    Integers = NDArray[np.int64]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


def best_fit_split(tokens: Integers, most: int) -> Packing:
    """Each thousand sequences, split where they are longer than a row, by themselves: the longest part first."""
    there = tokens[tokens > 0]
    groups = [split(there[at : at + TRL_GROUP], most) for at in range(0, there.size, TRL_GROUP)]
    parts = [best_fit_decreasing(some, most, group=None) for some in groups]
    rows = np.concatenate([tokens[:0], *(one.tokens for one in parts)])
    return Packing(most, rows, sum(one.num_samples for one in parts))


class Strategy(NamedTuple):
    """A way to pack."""

    name: str
    who: str
    """Whose it is."""
    splits: bool
    """Whether what is longer than a row is split rather than cut off."""
    pack: Callable[[Integers, int], Packing]
    """Takes the tokens of each sequence, cut to a row where it does not split, and of a row."""
    joins: bool = False
    """Whether a row has the room of a whole micro-batch, which then is this row alone."""
    pads: bool = False
    """Whether rows are padded until they are full; otherwise those of a micro-batch lie end to end, or are full."""


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("bfd", "TRL 1.16, its default", False, best_fit_decreasing),
        Strategy("bfd-split", "TRL 1.16", True, best_fit_split),
        Strategy("wrapped", "TRL 1.16", True, wrapped),
        Strategy("first-fit", "axolotl 0.19", False, first_fit, joins=True, pads=True),
        Strategy("ffd", "all together, longest first", False, first_fit_decreasing),
    )
}


class Summary(NamedTuple):
    """How lengths are spread."""

    num_samples: int
    num_tokens: int
    num_supervised: int
    mean: float
    quantiles: dict[float, int]
    """Share of the samples -> tokens that so many have at most."""


class Candidate(NamedTuple):
    """A maximum length."""

    most: int
    truncation: Truncation
    paddings: dict[str, Padding]
    """``fixed``, ``longest`` and ``grouped``."""
    packings: dict[str, Packing]
    """Name of a strategy -> its rows."""


def summary(lengths: Lengths) -> Summary:
    """The spread of the lengths.

    Raises:
        ValueError: there are none.
    """
    tokens = lengths.tokens
    if not tokens.size:
        raise ValueError("no lengths")
    values = np.quantile(tokens, QUANTILES, method="inverted_cdf")
    return Summary(
        num_samples=lengths.num_samples,
        num_tokens=lengths.num_tokens,
        num_supervised=int(lengths.supervised().sum()),
        mean=float(tokens.mean()),
        quantiles=dict(zip(QUANTILES, map(int, values), strict=True)),
    )


def candidate(
    lengths: Lengths, most: int, *, side: str = "right", micro_batch: int = 1, strategies: Sequence[str] = ("bfd",)
) -> Candidate:
    """What becomes of the data at a maximum length.

    Args:
        lengths: The data.
        most: The maximum length, of sequences and of packed rows.
        side: Where longer ones are cut: one of `truncation.SIDES`.
        micro_batch: Rows of a micro-batch.
        strategies: Names of `STRATEGIES`.
    """
    cut = truncate(lengths, most, side)
    left = cut.lengths.tokens[cut.lengths.tokens > 0]
    return Candidate(
        most=most,
        truncation=cut,
        paddings={
            "fixed": padding.fixed(left, most),
            "longest": padding.longest(left, micro_batch),
            "grouped": padding.grouped(left, micro_batch),
        },
        packings={name: _packed(STRATEGIES[name], lengths.tokens, left, most, micro_batch) for name in strategies},
    )


def _packed(strategy: Strategy, tokens: Integers, cut: Integers, most: int, micro_batch: int) -> Packing:
    if not strategy.splits:
        return strategy.pack(cut, most * micro_batch if strategy.joins else most)
    return strategy.pack(tokens, most)


def split(tokens: Integers, most: int) -> Integers:
    """The parts of sequences that are split where they are longer than `most`, in the order of the data.

    Each is some parts of `most` tokens, and the rest.
    """
    parts = np.maximum(-(-tokens // most), 1)
    found = np.full(int(parts.sum()), most, np.int64)
    found[np.cumsum(parts) - 1] = tokens - (parts - 1) * most
    return found
