"""What is lost where sequences are cut to a maximum length, on the right, on the left or in the middle.

right    the first tokens stay (TRL's ``truncation_mode="keep_start"``, its default; LLaMA-Factory; axolotl's
``excess_length_strategy: truncate``)
left     the last tokens stay (``keep_end``)
middle   the first half stays, rounded up, and the last half
drop     a sequence that is too long is left out altogether (axolotl's default)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memplan.sequences.lengths import Lengths, Spans
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDES = ("right", "left", "middle", "drop")


class Truncation(NamedTuple):
    """A data set after it was cut to `most` tokens a sequence."""

    most: int
    side: str
    lengths: Lengths
    """What is left; dropped sequences have no tokens."""
    num_cut: int
    """Sequences that lost something."""
    tokens_lost: int
    supervised_lost: int
    num_without: int
    """Sequences that had a token with a label and have none left."""


def truncate(lengths: Lengths, most: int, side: str = "right") -> Truncation:
    """Cut every sequence to at most `most` tokens.

    Raises:
        ValueError: `side` is none of `SIDES`, or `most` below 1.
    """
    if side not in SIDES or most < 1:
        raise ValueError(f"cut to {most} tokens, {side}")
    tokens = lengths.tokens
    too_long = tokens > most
    kept = np.where(too_long, 0, tokens) if side == "drop" else np.minimum(tokens, most)
    left = Lengths(kept, None if lengths.spans is None else _cut(lengths.spans, tokens, kept, side))
    before, after = lengths.supervised(), left.supervised()
    return Truncation(
        most=most,
        side=side,
        lengths=left,
        num_cut=int(too_long.sum()),
        tokens_lost=int((tokens - kept).sum()),
        supervised_lost=int((before - after).sum()),
        num_without=int(((before > 0) & (after == 0)).sum()),
    )


def _cut(spans: Spans, tokens: NDArray[np.int64], kept: NDArray[np.int64], side: str) -> Spans:
    """The spans in what is left; those of which nothing is left are empty."""
    there, all_of_it = kept[spans.sample], tokens[spans.sample]
    head = {"right": there, "drop": there, "left": 0 * there, "middle": -(-there // 2)}[side]
    head = np.where(there == all_of_it, there, head)
    gone = all_of_it - there  # tokens between the head and the tail

    def moved(place: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(place <= head, place, np.maximum(place - gone, head))

    return Spans(spans.sample, moved(spans.start), moved(spans.stop))
