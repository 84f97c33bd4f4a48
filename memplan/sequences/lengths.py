"""How long are the sequences of a data set, and which of their tokens have a label?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]


class Spans(NamedTuple):
    """Stretches of tokens that have a label; arrays of shape (num_spans,)."""

    sample: Integers
    """Which sequence it lies in, ascending."""
    start: Integers
    """First token."""
    stop: Integers
    """First token behind it."""


class Lengths(NamedTuple):
    """A data set, as lengths."""

    tokens: Integers
    """Tokens of each sequence; shape (num_samples,)."""
    spans: Spans | None = None
    """Which of them have a label; None: all."""

    @property
    def num_samples(self) -> int:
        """How many sequences there are."""
        return int(self.tokens.size)

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return int(self.tokens.sum())

    def supervised(self) -> Integers:
        """Tokens with a label, of each sequence."""
        if self.spans is None:
            return self.tokens
        return summed(self.spans, self.spans.stop - self.spans.start, self.num_samples)


def summed(spans: Spans, numbers: Integers, num_samples: int) -> Integers:
    """The sum of a number a span, for each sequence."""
    return np.bincount(spans.sample, numbers, num_samples).astype(np.int64)


def at_the_end(tokens: Any, supervised: Any) -> Lengths:
    """Sequences whose last tokens have a label: a prompt and a completion.

    Args:
        tokens: Of each sequence.
        supervised: How many of them, at the end, have a label.

    Raises:
        ValueError: a sequence has more tokens with a label than tokens.
    """
    tokens, supervised = np.asarray(tokens, np.int64), np.asarray(supervised, np.int64)
    if tokens.shape != supervised.shape or (supervised > tokens).any() or (supervised < 0).any():
        raise ValueError("a sequence has from none to all of its tokens with a label")
    return Lengths(tokens, Spans(np.arange(tokens.size), tokens - supervised, tokens))
