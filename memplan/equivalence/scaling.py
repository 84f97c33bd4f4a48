"""What does another effective batch mean for the learning rate, the warm-up and the number of steps?

    k = B' / B, in tokens with a loss where both are known, in sequences otherwise

SGD       lr' = k lr          "when the minibatch size is multiplied by k, multiply the learning rate by k", with a
                              gradual warm-up; Goyal et al. 2017, section 2.1, arXiv 1706.02677
Adam      lr' = sqrt(k) lr    the square-root rule from the stochastic differential equations of Adam and RMSprop; with
                              beta' = 1 - k (1 - beta) and eps' = eps / sqrt(k); Malladi et al. 2022, arXiv 2205.10287
steps     / k                 for the same number of epochs; warm-up in steps likewise, for the same share of the data

Both rules hold while noise dominates a step: up to the critical batch, beyond which larger batches do not shorten the
run (McCandlish et al. 2018, arXiv 1812.06162; `memplan.GradientNoise` measures it).  Nothing here is applied: which
rule a model follows is for its user to try.
"""

from __future__ import annotations

import math

from memplan.errors import UsageError
from memplan.specs.values import NamedTuple

LINEAR, SQUARE_ROOT, UNKNOWN = "linear", "square root", "unknown"

SOURCE_BY_RULE = {
    LINEAR: "Goyal et al. 2017, section 2.1 (arXiv 1706.02677)",
    SQUARE_ROOT: "Malladi et al. 2022 (arXiv 2205.10287)",
    UNKNOWN: "no rule is known for it",
}
CRITICAL_BATCH = "McCandlish et al. 2018 (arXiv 1812.06162)"

LINEAR_OPTIMIZERS = ("sgd",)
SQUARE_ROOT_OPTIMIZERS = ("adam", "rmsprop")
"""What the names of optimizers with the rule contain; of others, such as Lion's and Adafactor's, no source says."""

NOT_PLAIN_ADAM = ("galore", "apollo", "grok", "schedule-free", "schedulefree", "adamp", "4bit")
"""Updates of Adam's family that the analysis does not cover."""

DEFAULT_BETAS = (0.9, 0.999)
"""Of torch.optim.AdamW."""

USUAL_ACCUMULATION = 16
"""More micro-steps than that are rare: see `accumulation_warning`."""


class Advice(NamedTuple):
    """What follows from another batch; numbers that nobody gave are None."""

    ratio: float
    """k: the new batch by the old one."""
    rule: str
    """One of the keys of `SOURCE_BY_RULE`."""
    factor: float | None
    """Of the learning rate; None: no rule is known."""
    linear_factor: float
    square_root_factor: float
    learning_rate: float | None
    betas: tuple[float, float] | None
    """Of Adam, by the whole rule; None: not Adam's, or the rule does not reach so far (k (1 - beta) is 1 or more)."""
    warmup_steps: int | None
    total_steps: int | None

    @property
    def is_same(self) -> bool:
        """Whether the batch is as large as before, so that nothing changes."""
        return self.ratio == 1


def rule_of(optimizer: str) -> str:
    """The rule that a source gives for an optimizer, by its name."""
    name = optimizer.lower()
    if any(part in name for part in NOT_PLAIN_ADAM):
        return UNKNOWN
    if any(part in name for part in SQUARE_ROOT_OPTIMIZERS):
        return SQUARE_ROOT
    return LINEAR if any(name.startswith(part) for part in LINEAR_OPTIMIZERS) else UNKNOWN


def advise(
    previous_batch: float,
    batch: float,
    *,
    optimizer: str,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    total_steps: int | None = None,
    betas: tuple[float, float] = DEFAULT_BETAS,
) -> Advice:
    """What to consider when the batch changes from `previous_batch` to `batch`, both in the same unit.

    Raises:
        UsageError: a batch is not above zero.
    """
    if not (previous_batch > 0 and batch > 0):
        raise UsageError(f"The batches are {previous_batch:g} and {batch:g}.", "Give numbers above zero.")
    ratio = batch / previous_batch
    rule = rule_of(optimizer)
    factor = {LINEAR: ratio, SQUARE_ROOT: math.sqrt(ratio), UNKNOWN: None}[rule]
    if ratio == 1:
        factor = 1.0
    return Advice(
        ratio=ratio,
        rule=rule,
        factor=factor,
        linear_factor=ratio,
        square_root_factor=math.sqrt(ratio),
        learning_rate=None if learning_rate is None or factor is None else learning_rate * factor,
        betas=_scaled(betas, ratio) if rule == SQUARE_ROOT else None,
        warmup_steps=_fewer(warmup_steps, ratio),
        total_steps=_fewer(total_steps, ratio),
    )


def _scaled(betas: tuple[float, float], ratio: float) -> tuple[float, float] | None:
    first, second = (1 - ratio * (1 - beta) for beta in betas)
    return (first, second) if min(first, second) > 1e-9 else None


def _fewer(steps: int | None, ratio: float) -> int | None:
    """As many steps as see the same data; those begun count."""
    return None if steps is None else math.ceil(round(steps / ratio, 6))


def accumulation_warning(accumulation: int) -> str | None:
    """What there is to say of a long accumulation; None where it is usual."""
    if accumulation <= USUAL_ACCUMULATION:
        return None
    return (
        f"{accumulation} micro-steps are more than the usual 1 to {USUAL_ACCUMULATION}: a step takes {accumulation} "
        "forward and backward passes, each too small to keep a GPU busy if the micro-batch is. A larger micro-batch "
        "(checkpointing, a chunked loss, an 8-bit optimizer, LoRA) or more GPUs lower it"
    )
