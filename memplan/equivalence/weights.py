"""How much does averaging the means of micro-batches change the weight of a token?

    whole batch   sum_i L_i / sum_i n_i                   every token weighs 1 / N,          N = sum_i n_i
    naive         (1 / M) sum_i (L_i / n_i)               a token of i weighs 1 / (M n_i) = (mean(n) / n_i) / N

L_i is the sum of the losses of micro-batch i and n_i how many there are; M = K x R micro-batches of K micro-steps on R
ranks share an optimizer step.  Relative to the whole batch a token weighs mean(n) / n_i: 1 where all n_i are equal.

The effective share of the tokens is (sum w)^2 / (N sum w^2), Kish's effective sample size over the tokens (Kish 1965,
Survey Sampling, section 8.2): a step on weighted tokens has the noise of a smaller one.

Sources: the derivation above; transformers pull request 34191 and torchtune pull request 1875 for what it did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memplan.errors import UsageError
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memplan.sequences.lengths import Lengths

    Counts = NDArray[np.int64]

LARGEST_DRAW = 2_000_000
"""Samples that are drawn, at most: enough for percentiles, whatever the data set."""

FEWEST_STEPS = 200
"""Steps that are drawn from a small data set, over several epochs."""


class TokenWeights(NamedTuple):
    """Weights of tokens under naive averaging, relative to the whole batch; percentiles are over tokens."""

    num_steps: int
    """Optimizer steps that were drawn."""
    mean_tokens: float
    """Tokens with a loss in a micro-batch, on average."""
    variation: float
    """Standard deviation of the n_i of a step by their mean, averaged over steps (root of the mean square)."""
    smallest: float
    p5: float
    p50: float
    p95: float
    largest: float
    effective_share: float
    """Of the tokens, from 0 to 1."""
    empty_share: float
    """Of the micro-batches, those without a token with a loss: their mean is 0 / 0, and the step not a number."""

    @property
    def spread(self) -> float:
        """How many times as much a token at the 95th percentile weighs as one at the 5th."""
        return self.p95 / self.p5


def predicted(lengths: Lengths) -> Counts:
    """Tokens of each sequence that a causal language model is trained to predict: all with a label but a first one."""
    with_label = lengths.supervised()
    if lengths.spans is None:
        return np.maximum(with_label - 1, 0)
    spans = lengths.spans
    first = np.zeros(lengths.num_samples, np.int64)
    first[spans.sample[(spans.start == 0) & (spans.stop > 0)]] = 1
    return with_label - first


def step_weights(counts: Counts) -> NDArray[np.float64]:
    """The weight of a token of each micro-batch, mean(n) / n_i; those of an empty one are not a number.

    Args:
        counts: Shape (num_steps, micro-batches of a step).
    """
    weights = np.full(counts.shape, np.nan)
    np.divide(counts.mean(axis=1, keepdims=True), counts, out=weights, where=counts > 0)
    return weights


def token_weights(
    tokens: Counts, *, micro_batch_size: int, accumulation: int = 1, ranks: int = 1, seed: int = 0
) -> TokenWeights:
    """What naive averaging does to a data set.

    Steps are drawn as a shuffling sampler draws them: without replacement, over as many epochs as it takes; the last,
    partial step of an epoch is left out.

    Args:
        tokens: With a loss, of each sample; shape (num_samples,).
        micro_batch_size: Samples of one micro-batch on one rank.
        accumulation: Micro-steps of a step.
        ranks: With different data.
        seed: Of the draw.

    Raises:
        UsageError: the data set is smaller than a step, or none of its tokens has a loss.
    """
    counts = drawn_steps(tokens, micro_batch_size=micro_batch_size, accumulation=accumulation, ranks=ranks, seed=seed)
    if not counts.size:
        batch = micro_batch_size * accumulation * ranks
        raise UsageError(
            f"The data has {tokens.size:,} samples and a step takes {batch:,}.", "Give more data, or a smaller step."
        )
    if not counts.any():
        raise UsageError("No token of the data has a loss.", "Check which tokens have a label.")
    return summary(counts)


def drawn_steps(tokens: Counts, *, micro_batch_size: int, accumulation: int, ranks: int, seed: int) -> Counts:
    """Tokens of the micro-batches of steps that are drawn; shape (num_steps, K x R), no steps of too few samples."""
    num = accumulation * ranks
    batch = micro_batch_size * num
    if tokens.size < batch:
        return np.zeros((0, num), np.int64)
    counts: Counts = _drawn(tokens, batch, seed).reshape(-1, num, micro_batch_size).sum(axis=2)
    return counts


def _drawn(tokens: Counts, batch: int, seed: int) -> Counts:
    """Samples of whole steps; shape (num_steps x batch,)."""
    draw = np.random.default_rng(seed)
    per_epoch = tokens.size // batch
    steps = max(1, min(per_epoch, LARGEST_DRAW // batch)) if per_epoch >= FEWEST_STEPS else per_epoch
    epochs = max(1, min(-(-FEWEST_STEPS // steps), LARGEST_DRAW // (steps * batch)))
    return np.concatenate([draw.permutation(tokens)[: steps * batch] for _ in range(epochs)])


def summary(counts: Counts) -> TokenWeights:
    """The weights of steps whose n_i are known; shape (num_steps, micro-batches of a step).

    Steps without a token with a loss are left out; one at least has some.
    """
    counts = counts[counts.any(axis=1)]
    weights = step_weights(counts)
    there = counts > 0
    order = np.argsort(weights[there], kind="stable")
    sizes, found = counts[there][order], weights[there][order]
    behind = np.cumsum(sizes)

    def percentile(share: float) -> float:
        return float(found[np.searchsorted(behind, share * behind[-1])])

    total = float(sizes.sum())
    mean = counts.mean(axis=1)
    return TokenWeights(
        num_steps=len(counts),
        mean_tokens=float(counts.mean()),
        variation=float(np.sqrt(np.mean((counts.std(axis=1) / mean) ** 2))),
        smallest=float(found[0]),
        p5=percentile(0.05),
        p50=percentile(0.5),
        p95=percentile(0.95),
        largest=float(found[-1]),
        effective_share=float((sizes * found).sum() ** 2 / (total * (sizes * found**2).sum())),
        empty_share=float(1 - there.mean()),
    )
