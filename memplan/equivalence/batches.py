"""What does naive averaging do to a data set, for each way to make batches of it?

    rows       b sequences a micro-batch, drawn at random; padded or end to end, they have the same tokens with a loss
    grouped    the same of about the same length: transformers 5.23 sorts some batches of b x K sequences (trainer.py,
               ``LengthGroupedSampler(train_batch_size * gradient_accumulation_steps)``)
    packed     rows that hold several, by the strategies of `memplan.sequences.placement`

The K x R micro-batches of a step come one behind the other: accelerate 1.15 deals them out to the ranks in turn
(data_loader.py, ``BatchSamplerShard``).

Left out: sequences that were cut down to a prompt stay in ``rows`` and ``grouped``, as tokens without a loss; TRL 1.16
takes them out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memplan.equivalence.weights import FEWEST_STEPS, LARGEST_DRAW, drawn_steps, predicted, summary, token_weights
from memplan.errors import UsageError
from memplan.sequences.analysis import STRATEGIES
from memplan.sequences.packing import AXOLOTL_GROUP
from memplan.sequences.padding import length_grouped
from memplan.sequences.placement import PLACING_BY_STRATEGY
from memplan.sequences.truncation import truncate
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from memplan.equivalence.weights import TokenWeights
    from memplan.sequences.lengths import Lengths

    Integers = NDArray[np.int64]

ROWS, GROUPED = "rows", "grouped"

MOST_PLACED = 500_000
"""Sequences that are put in rows, at most, over several epochs."""


class Step(NamedTuple):
    """How a step is cut."""

    micro_batch_size: int
    accumulation: int = 1
    ranks: int = 1

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.micro_batch_size * self.accumulation * self.ranks


class Weighed(NamedTuple):
    """A way to make batches, and what it does to the weights of tokens."""

    batching: str
    """`ROWS`, `GROUPED` or the name of a strategy to pack."""
    row_tokens: int | None
    """Tokens of a packed row; None: a row is a sequence."""
    weights: TokenWeights | None
    """None: there are too few rows for a step, or none of their tokens has a loss."""
    why: str
    """Why there are none."""


def weigh(
    lengths: Lengths,
    step: Step,
    *,
    most: int | None = None,
    side: str = "right",
    strategies: Sequence[str] = ("bfd",),
    seed: int = 0,
) -> tuple[Weighed, ...]:
    """All ways beside each other.

    Args:
        lengths: The data.
        step: How a step is cut.
        most: Tokens of a sequence and of a packed row, at most; None: as many as the longest sequence has.
        side: Where longer ones are cut: one of `memplan.sequences.truncation.SIDES`.
        strategies: Names of `memplan.sequences.analysis.STRATEGIES`.
        seed: Of what is drawn.

    Raises:
        UsageError: the data set is smaller than a step, or none of its tokens has a loss.
    """
    cut = lengths if most is None else truncate(lengths, most, side).lengths
    there = cut.tokens > 0
    tokens, held = predicted(cut)[there], cut.tokens[there]
    if most is not None and not tokens.any():
        raise UsageError(f"Cut to {most} tokens, no sequence has a token with a loss left.", "Raise --seq-len.")
    plain = token_weights(tokens, **step._asdict(), seed=seed)
    found = [Weighed(ROWS, None, plain, ""), Weighed(GROUPED, None, _grouped(tokens, held, step, seed), "")]
    room = int(held.max()) if most is None else most
    for name in strategies:
        found.append(_packed(name, lengths if STRATEGIES[name].splits else cut, room, step, seed))
    return tuple(found)


def _grouped(tokens: Integers, held: Integers, step: Step, seed: int) -> TokenWeights:
    """Sequences of about the same length together."""

    def epoch(seed: int) -> Integers:
        order = length_grouped(held, step.micro_batch_size * step.accumulation, seed=seed)
        return _in_turn(tokens[order], step)

    return summary(_epochs(epoch, seed, LARGEST_DRAW // tokens.size))


def _packed(name: str, lengths: Lengths, most: int, step: Step, seed: int) -> Weighed:
    """Rows of several sequences."""
    strategy, placing = STRATEGIES[name], PLACING_BY_STRATEGY[name]
    room = most
    if strategy.joins:  # a row is a whole micro-batch
        room, step = most * step.micro_batch_size, step._replace(micro_batch_size=1)

    def rows_of(samples: Integers) -> Integers:
        placed = placing.place(lengths.tokens[samples], room)
        return placed._replace(sample=samples[placed.sample]).predicted(lengths, restarts=placing.restarts)

    samples = np.flatnonzero(lengths.supervised() if placing.needs_labels else lengths.tokens)

    def epoch(seed: int) -> Integers:
        return _in_turn(rows_of(np.random.default_rng(seed).permutation(samples)[:AXOLOTL_GROUP]), step)

    if placing.draws:
        counts = _epochs(epoch, seed, MOST_PLACED // max(min(samples.size, AXOLOTL_GROUP), 1))
    else:
        counts = drawn_steps(rows_of(samples), **step._asdict(), seed=seed)
    if not counts.size:
        return Weighed(name, room, None, f"fewer rows than the {step.batch:,} of a step")
    if not counts.any():
        return Weighed(name, room, None, "no token has a loss")
    return Weighed(name, room, summary(counts), "")


def _in_turn(tokens: Integers, step: Step) -> Integers:
    """Tokens of the micro-batches of each whole step, where rows come as they are; shape (num_steps, K x R)."""
    whole = tokens.size // step.batch * step.batch
    counts: Integers = tokens[:whole].reshape(-1, step.accumulation * step.ranks, step.micro_batch_size).sum(axis=2)
    return counts


def _epochs(epoch: Callable[[int], Integers], seed: int, most: int) -> Integers:
    """The steps of as many epochs as it takes, of a limited number."""
    counts = [epoch(seed)]
    if counts[0].size:
        counts += [epoch(seed + n) for n in range(1, min(-(-FEWEST_STEPS // len(counts[0])), most))]
    return np.concatenate(counts)
