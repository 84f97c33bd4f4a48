"""How lengths are spread, as plain data: a histogram and the cumulative curve, with the candidates in their places.

Bins are as wide as a power of two, so that most candidates lie on an edge: the share up to a bin's end is that of the
records which such a maximum leaves whole.  The last bin takes whatever is longer than the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Document = dict[str, Any]
    Integers = NDArray[np.int64]

BINS = 15
"""Of one width; the last one may be wider."""
WITHIN = 0.99
"""Share of the records that these hold at least."""
CURVE = np.linspace(0, 1, 101)
"""Shares of which the cumulative curve has the length."""


def histogram(tokens: Integers, candidates: Sequence[int]) -> list[Document]:
    """Records by length: above `over` up to `to` tokens, the empty ones in the first bin.

    Args:
        tokens: Of each record, at least one.
        candidates: Maximum lengths; those beyond the longest stand in the last bin.
    """
    longest = max(int(tokens.max()), 1)
    most = int(np.quantile(tokens, WITHIN, method="inverted_cdf"))
    width = 1 << max(-(-most // BINS) - 1, 0).bit_length()
    edges = [0, *(edge for edge in range(width, width * BINS + 1, width) if edge < longest), longest]
    counts = np.bincount(np.searchsorted(edges[1:], tokens), minlength=len(edges) - 1)
    shares = np.cumsum(counts) / tokens.size
    held: list[list[int]] = [[] for _ in counts]
    for one in sorted(candidates):
        held[min(int(np.searchsorted(edges[1:], one)), len(held) - 1)].append(one)
    return [
        {"over": edges[n], "to": edges[n + 1], "num": int(num), "share": float(shares[n]), "candidates": held[n]}
        for n, num in enumerate(counts)
    ]


def cumulative(tokens: Integers, candidates: Sequence[int]) -> list[Document]:
    """Share of the records that are at most so long: at percentiles and at the candidates, ascending."""
    ordered = np.sort(tokens)
    places = np.quantile(ordered, CURVE, method="inverted_cdf")
    lengths = np.unique(np.concatenate([places, np.asarray(candidates, np.int64)]).astype(np.int64))
    shares = np.searchsorted(ordered, lengths, side="right") / ordered.size
    return [{"num_tokens": int(num), "share": float(to)} for num, to in zip(lengths, shares, strict=True)]
