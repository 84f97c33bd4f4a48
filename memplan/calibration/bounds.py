"""How far above the prediction does a bound have to lie, so that a given share of runs stays under it?

Split-conformal prediction (Vovk et al., 2005; Lei et al., 2018, section 2.2): the coefficients come from one half of
the records, the errors of the other half are the scores

    score = (measured - predicted) / predicted

and the bound at confidence p is the prediction times 1 + the k-th smallest score, k = ceil((n + 1) p).  If the next run
is exchangeable with the n that were scored, it stays under the bound with probability of at least p, whatever the
distribution of errors.  With k > n there is no finite bound: n scores vouch for n / (n + 1) at most.

A run that ran out of memory where the prediction says that it fits has an infinite score: nobody knows how much it
would have taken.

Left out: runs that are not comparable (another model family, another kind of card) have no such guarantee.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Bound(NamedTuple):
    """What is added to a prediction."""

    ratio: float
    """Share of the predicted bytes; never negative, as a bound is no second prediction."""
    confidence: float
    """Probability that a comparable run stays under it, at least."""
    is_attained: bool
    """Whether this is the confidence that was asked for; else there are too few scores for it."""


def least_scores(confidence: float) -> int:
    """Scores that are needed for a finite bound: the least n with ceil((n + 1) p) <= n."""
    n = max(math.ceil(confidence / (1 - confidence)) - 1, 1)
    while _rank(n, confidence) > n:
        n += 1
    return n


def bound(scores: Sequence[float], confidence: float) -> Bound:
    """The bound that `scores` vouch for; the largest score and what it vouches for, where they are too few.

    Raises:
        ValueError: there are no scores, or the confidence is no probability between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}")
    finite = sorted(score for score in scores if score < math.inf)
    n = len(scores)
    if not finite:
        raise ValueError("there are no scores")
    k = _rank(n, confidence)
    if k > len(finite):
        return Bound(max(finite[-1], 0.0), len(finite) / (n + 1), False)
    return Bound(max(finite[k - 1], 0.0), confidence, True)


def confidence_of(scores: Sequence[float], ratio: float) -> float:
    """The confidence that `scores` vouch for, of a bound of so much above the prediction: k / (n + 1)."""
    return bisect_right(sorted(scores), ratio) / (len(scores) + 1)


def _rank(n: int, confidence: float) -> int:
    """ceil((n + 1) p), where a product that is whole but for its last bits is taken as whole."""
    return math.ceil(round((n + 1) * confidence, 9))
