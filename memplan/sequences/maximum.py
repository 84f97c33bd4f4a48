"""Which maximum length does a data set need, where so much of what has a label may be lost?

The smallest of the candidates, powers of two and the longest sequence, that loses at most that share of the tokens with
a label; where none has one, of all tokens.  What is fixed, or the positions of the model, go before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memplan.sequences.survey import share
from memplan.sequences.truncation import Truncation, truncate
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.sequences.lengths import Lengths

SHORTEST = 64
"""No candidate is shorter."""

GIVEN, LONGEST, LOSS, POSITIONS = "given", "longest", "loss", "positions"
"""Why a maximum length is what it is: it was said, nothing is cut at all, the loss is small enough, or the model has no
more positions."""


class Loss(NamedTuple):
    """What a maximum length costs, as shares from 0 to 1."""

    most: int
    num_cut: int
    """Sequences that lose something."""
    of_sequences: float
    of_tokens: float
    of_supervised: float
    """Of the tokens with a label; of all where none has one."""
    num_without: int
    """Sequences that have no label left."""


class Maximum(NamedTuple):
    """A maximum length."""

    why: str
    """`GIVEN`, `LONGEST`, `LOSS` or `POSITIONS`."""
    cut: Truncation
    """What is left of the data."""
    loss: Loss
    shorter: Loss | None
    """The candidate below, with more loss than was allowed; None where there is none."""

    @property
    def most(self) -> int:
        """Tokens of a sequence, at most."""
        return self.cut.most


def choose(
    lengths: Lengths, *, max_loss: float, side: str = "right", given: int | None = None, positions: int | None = None
) -> Maximum:
    """The maximum length.

    Args:
        lengths: The data, with a token at least.
        max_loss: Share of the tokens with a label that may be lost.
        side: Where longer sequences are cut: one of `memplan.sequences.truncation.SIDES`.
        given: The maximum length that is fixed; None: it is chosen.
        positions: How many tokens the model takes; None: any number.
    """
    if given is not None:
        return _at(lengths, given, GIVEN, side)
    longest = int(lengths.tokens.max())
    shorter = None
    for most in candidates(longest):
        found = _at(lengths, most, LONGEST if most == longest else LOSS, side)
        if positions is not None and most > positions:
            return _at(lengths, positions, POSITIONS, side)
        if found.loss.of_supervised <= max_loss:
            break
        shorter = found.loss
    return found._replace(shorter=shorter)


def candidates(longest: int) -> list[int]:
    """Powers of two below the longest sequence, ascending, and it."""
    found = []
    power = SHORTEST
    while power < longest:
        found.append(power)
        power *= 2
    return [*found, longest]


def losses(lengths: Lengths, maximum: Maximum, side: str) -> tuple[Loss, ...]:
    """What a maximum length costs, beside the candidates from the median on and the one below it; ascending."""
    half, longest = np.quantile(lengths.tokens, (0.5, 1), method="inverted_cdf")
    found = {one for one in candidates(int(longest)) if one >= half} | {maximum.most}
    found |= set() if maximum.shorter is None else {maximum.shorter.most}
    return tuple(_at(lengths, one, maximum.why, side).loss for one in sorted(found))


def _at(lengths: Lengths, most: int, why: str, side: str) -> Maximum:
    cut = truncate(lengths, most, side)
    labelled = int(lengths.supervised().sum())
    tokens = share(cut.tokens_lost, lengths.num_tokens)
    loss = Loss(
        most=most,
        num_cut=cut.num_cut,
        of_sequences=share(cut.num_cut, lengths.num_samples),
        of_tokens=tokens,
        of_supervised=share(cut.supervised_lost, labelled) if labelled else tokens,
        num_without=cut.num_without,
    )
    return Maximum(why, cut, loss, None)
