"""Would a larger batch still help?  The gradient noise scale, from gradients at two batch sizes.

    B_simple = tr(S) / |G|^2                                        section 2.2 of McCandlish et al. 2018
    E |G_B|^2 = |G|^2 + tr(S) / B                                                           appendix A.1
    |G|^2 ~ (B2 |G_2|^2 - B1 |G_1|^2) / (B2 - B1),   tr(S) ~ (|G_1|^2 - |G_2|^2) / (1/B1 - 1/B2)

G is the true gradient, S the covariance of a token's, G_B the gradient of a batch of B tokens; G_1 that of a
micro-batch, G_2 that of the whole step.  Micro-batches have different numbers of tokens n_i: the mean of |G_i|^2 with
the weights n_i / N is that of B1 = N / K.  Both estimates are without bias and noisy, their quotient is neither, so
that each is averaged over steps before they are divided, as the paper does.

Micro-batches are taken to be independent draws.  Tokens of one sequence are not: B_simple is in tokens because a step
is measured in them, and sequences / tokens times as much in sequences.

A step on B tokens, at the best learning rate for it, does 1 / (1 + B_simple / B) of what one on the true gradient does
(section 2.2, where the loss is quadratic and its Hessian a multiple of the identity: a rule of thumb elsewhere).

Source: McCandlish, Kaplan, Amodei, the OpenAI Dota Team 2018, "An Empirical Model of Large-Batch Training",
https://arxiv.org/abs/1812.06162
"""

from __future__ import annotations

from memplan.errors import UsageError

DEFAULT_DECAY = 0.99
"""Of the averages: the last hundred steps count most."""

FEWEST_STEPS = 10
"""Before so many the estimate says next to nothing."""


class GradientNoise:
    """The simple noise scale, learned step by step.

    noise = memplan.GradientNoise()
    for batch in loader:
        memplan.accumulate(model, batch, micro_batch_size=4, noise=noise)
        ...
    print(noise.says())
    """

    def __init__(self, decay: float = DEFAULT_DECAY) -> None:
        """`decay`: how much of an average is left after a step, from 0 up to, but not including, 1."""
        if not 0 <= decay < 1:
            raise UsageError(f"decay is {decay}.", "Give a number from 0 up to, not including, 1.")
        self.decay = decay
        self.num_steps = 0
        """Steps that were learned from."""
        self.batch_tokens = 0.0
        """Tokens of the last step."""
        self._square = self._trace = self._weight = 0.0

    def update(self, small_square: float, small: float, large_square: float, large: float) -> None:
        """Learn from a step.

        Args:
            small_square: Mean of |G|^2 over the micro-batches, G being the gradient of a mean.
            small: Tokens of a micro-batch: all tokens by the number of micro-batches.
            large_square: |G|^2 of the whole step.
            large: Its tokens.

        Raises:
            UsageError: there are no two sizes.
        """
        if not 0 < small < large:
            raise UsageError(f"The batches have {small:g} and {large:g} tokens.", "Accumulate two micro-batches.")
        square = (large * large_square - small * small_square) / (large - small)
        trace = (small_square - large_square) / (1 / small - 1 / large)
        self._square = self.decay * self._square + (1 - self.decay) * square
        self._trace = self.decay * self._trace + (1 - self.decay) * trace
        self._weight = self.decay * self._weight + (1 - self.decay)
        self.num_steps += 1
        self.batch_tokens = large

    @property
    def gradient_square(self) -> float | None:
        """|G|^2 of the true gradient; None before the first step."""
        return self._square / self._weight if self.num_steps else None

    @property
    def trace(self) -> float | None:
        """tr(S), of the gradient of one token; None before the first step."""
        return self._trace / self._weight if self.num_steps else None

    @property
    def scale_tokens(self) -> float | None:
        """B_simple; None where the averages do not tell the gradient from the noise yet."""
        if not self.num_steps or self._square <= 0 or self._trace < 0:
            return None
        return self._trace / self._square

    def progress(self, batch_tokens: float) -> float | None:
        """What a step on so many tokens does of one on the true gradient, from 0 to 1; None: not known."""
        scale = self.scale_tokens
        return None if scale is None else 1 / (1 + scale / batch_tokens)

    def helps(self) -> bool | None:
        """Whether a larger batch would save more steps than it wastes tokens: it is below B_simple; None: not known."""
        scale = self.scale_tokens
        return None if scale is None or self.num_steps < FEWEST_STEPS else self.batch_tokens < scale

    def says(self) -> str:
        """In a sentence."""
        scale, helps = self.scale_tokens, self.helps()
        if scale is None or helps is None:
            return f"After {self.num_steps} steps the noise scale is not known yet."
        now, twice = self.progress(self.batch_tokens), self.progress(2 * self.batch_tokens)
        assert now is not None
        assert twice is not None
        verdict = "a larger batch would still help" if helps else "a larger batch would mostly waste tokens"
        return (
            f"The noise scale is {scale:,.0f} tokens and a step has {self.batch_tokens:,.0f}: {verdict} "
            f"(twice the batch would take {100 * now / twice:.0f} % of the steps and "
            f"{200 * now / twice:.0f} % of the tokens)."
        )
