"""Why is an accumulated gradient not that of the whole batch?  From measured facts alone.

Three questions, each answered by an experiment that `memplan.equivalence.runner` made:

1. Does the model let a batch be cut?  The sum over micro-batches, each token with the same weight, against one pass
   over the whole batch.  Where they differ, a suspect is what makes them agree once it is switched off (batch
   statistics, the balance loss); a softmax over the samples of the batch (in-batch negatives) is known by a loss
   that grows by log 2 when every sample is there twice; a sum differs from a mean by a factor alone; a module that
   draws random numbers differs from itself.
2. Which mean did a step take?  Its gradient against those of the means there are (all tokens; each micro-batch; each
   rank; each sample), up to a factor: g ~ r h.  The h with no residual names the mean, and r what is wrong in scale.
3. What else happened to the gradient on the way?  Scaled down by a power of two, clipping has nothing to clip: clipped
   once, the gradient is that one made shorter or cut off at a value; clipped between micro-steps, it has been changed
   between them and is neither.  All its numbers are representable in 16 bits only where it
   was kept in them.

Errors are relative L2 norms, |g - h| / |h|.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SAME_UPDATE = 1e-5
"""Sums of fp32 in another order differ by about 1e-6."""

FLOORS = 10
"""So many times the rounding error of the module itself are allowed where that is larger."""

LOG2 = math.log(2)

TOKEN, MICRO, RANK, SAMPLE = "tokens", "micro-batches", "ranks", "samples"
MEANS = {
    TOKEN: "the mean over all tokens",
    MICRO: "micro-averaging: the mean of the micro-batches' means, so that a token weighs mean(n) / n_i",
    RANK: "rank averaging: the mean of the ranks' token means, so that a token weighs mean(n) / n of its rank",
    SAMPLE: "sample averaging: the mean of the samples' means, so that a token weighs mean(n) / n of its sample",
}
"""What a step can average, and how it is called where it is wrong."""

BATCH_NORM, BALANCE_LOSS = "batch norm", "balance loss"
SUSPECTS = {
    BATCH_NORM: "BatchNorm: its statistics are those of a micro-batch; with running statistics the error goes",
    BALANCE_LOSS: "the balance loss of the mixture of experts is a statistic of a batch; without it the error goes",
}
"""What a module has that does not cut, and what is said once its absence has made the error go."""


class Cause(NamedTuple):
    """One reason."""

    kind: str
    says: str


class Subject(NamedTuple):
    """What was measured of a model: does it let a batch be cut?"""

    error: float
    """Micro-batches, each token with the same weight, against the whole batch."""
    repeat_error: float
    """The whole batch against itself."""
    floor: float
    """The whole batch against itself in another order: the rounding of the module."""
    without: Sequence[tuple[tuple[str, ...], float]]
    """Suspects that were switched off -> the error that was left."""
    doubled: float | None
    """By how much the loss grows when each sample is there twice; None: not measured."""
    residual: float = 1.0
    """What is left of the error once the best factor is taken out: |cut - r whole| / |cut|."""


class Match(NamedTuple):
    """g ~ ratio x h."""

    ratio: float
    residual: float
    """|g - ratio h| / |g|."""


class Window(NamedTuple):
    """One optimizer step."""

    num_micro_batches: int
    """Of a rank."""
    error: float
    """Of the step against the mean over all tokens."""
    num_tokens: int
    """Of all ranks."""
    matches: Mapping[str, Match]
    """The means of `MEANS` that differ from each other, and how well each explains the step."""


class Loop(NamedTuple):
    """What was measured of a step function."""

    windows: Sequence[Window]
    """Full ones, and last the short one at the end of an epoch where there can be one."""
    accumulation: int
    ranks: int
    spread: float
    """Largest n_i by the smallest, of the first window."""
    unclipped: Sequence[Window] = ()
    """The same with gradients scaled down; empty: not measured."""
    is_clipped_whole: bool = False
    """Whether each is that of `unclipped` made shorter, or cut off at one value: clipped behind the last sum."""
    is_changed_between: bool = False
    """Whether gradients were changed between micro-steps; averaging over ranks in each micro-step changes them, too."""
    kept_in: str = ""
    """The 16-bit dtype that can hold all of its numbers; empty: none."""
    autocast: str = ""
    """The dtype under which the module ran; empty: its own."""


class Diagnosis(NamedTuple):
    """Is it the same update, and if not, why?"""

    is_same: bool
    causes: tuple[Cause, ...] = ()
    notes: tuple[str, ...] = ()
    """What is worth knowing and no fault."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the causes."""
        return tuple(cause.kind for cause in self.causes)


def tolerance(floor: float) -> float:
    """The error up to which it is the same update."""
    return max(SAME_UPDATE, FLOORS * floor)


def diagnose_subject(subject: Subject) -> Diagnosis:
    """Does the model let a batch be cut?"""
    allowed = tolerance(subject.floor)
    if not math.isfinite(subject.error):
        return _fault("not a number", "a gradient is not a number")
    if not subject.repeat_error <= SAME_UPDATE:
        says = f"the module draws random numbers: the same batch twice differs by {subject.repeat_error:.0e}"
        return _fault("random", says)
    if subject.error <= allowed:
        return Diagnosis(True)
    for names, error in subject.without:
        if error <= allowed:
            return Diagnosis(False, tuple(Cause(name, SUSPECTS[name]) for name in names))
    if subject.residual <= allowed:
        says = (
            "the loss is a sum over the samples and no mean: those of micro-batches add up, and are not to be averaged"
        )
        return _fault("sum", says)
    if subject.doubled is not None and abs(subject.doubled - LOG2) < 0.01:
        says = "in-batch negatives: each sample is compared with those of its micro-batch alone (twice each: + log 2)"
        return _fault("in-batch negatives", says)
    return _fault("coupled", "the loss of a sample depends on the others of its batch, and nobody knows how")


def _fault(kind: str, says: str) -> Diagnosis:
    return Diagnosis(False, (Cause(kind, says),))


def diagnose_loop(loop: Loop, allowed: float = SAME_UPDATE) -> Diagnosis:
    """Which mean did the step take, in which scale, and what else was done to it?"""
    if not all(math.isfinite(one.error) for one in loop.windows):
        return _fault(
            "not a number", "the gradient is not a number: a micro-batch without a token with a loss is 0 / 0"
        )
    if all(one.error <= allowed for one in loop.windows):
        notes = () if loop.spread > 1 else ("all micro-batches have as many tokens: no mean could go wrong here",)
        return Diagnosis(True, notes=notes)
    if loop.kept_in and _mean_of(loop.windows, allowed) is None:
        return _unexplained(loop, loop.windows)
    if loop.unclipped and _is_clipped(loop, allowed):
        return _clipped(loop, allowed)
    return _unclipped(loop, loop.windows, allowed)


def _is_clipped(loop: Loop, allowed: float) -> bool:
    """Whether the step on smaller gradients is another one: clipping depends on their size, and nothing else does."""
    pairs = zip(loop.windows, loop.unclipped, strict=True)
    return any(
        abs(big.matches[TOKEN].ratio - small.matches[TOKEN].ratio) > allowed
        or abs(big.matches[TOKEN].residual - small.matches[TOKEN].residual) > allowed
        for big, small in pairs
    )


def _clipped(loop: Loop, allowed: float) -> Diagnosis:
    below = (
        Diagnosis(True)
        if all(one.error <= allowed for one in loop.unclipped)
        else _unclipped(loop, loop.unclipped, allowed)
    )
    if loop.is_changed_between and not loop.is_clipped_whole:
        says = "clipping per micro-step: gradients are cut between micro-steps; on small ones the error goes"
        return Diagnosis(False, (Cause("clipping", says), *below.causes))
    return below._replace(notes=("the gradient is clipped once, behind the last micro-step, as it should be",))


def _unclipped(loop: Loop, windows: Sequence[Window], allowed: float) -> Diagnosis:
    mean = _mean_of(windows, allowed)
    if mean is None:
        return _unexplained(loop, windows)
    causes = [] if mean == TOKEN else [Cause(f"mean of {mean}", MEANS[mean])]
    causes += _scale([one.matches[mean].ratio for one in windows], windows, loop, allowed)
    return Diagnosis(not causes, tuple(causes))


def _scale(ratios: Sequence[float], windows: Sequence[Window], loop: Loop, allowed: float) -> list[Cause]:
    """What is wrong with the size of the steps: by one factor, by a number of each step, or of the short one alone."""
    first, last = ratios[0], ratios[-1]
    close = max(allowed, 1e-4)  # beside whole numbers
    for factor, says in _factors(loop):
        if all(abs(ratio / factor(one) - 1) <= close for ratio, one in zip(ratios, windows, strict=True)):
            return [Cause("scale", f"scale: {first:.4g} times too large ({says})")]
    causes = []
    if abs(first - 1) > allowed:
        words = [says for factor, says in _factors(loop) if abs(first / factor(windows[0]) - 1) <= close]
        known = f" ({'; or '.join(words)})" if words else ""
        causes.append(Cause("scale", f"scale: {first:.4g} times too large{known}"))
    if abs(last / first - 1) > allowed:
        causes.append(Cause("partial window", _partial_words(windows, last / first, allowed)))
    return causes


def _factors(loop: Loop) -> list[tuple[Callable[[Window], float], str]]:
    """Factors that steps are wrong by, as numbers of a step, and how they come about; those that are 1 are left out."""
    steps, ranks = loop.accumulation, loop.ranks
    both, many = steps * ranks, steps > 1 and ranks > 1
    known: list[tuple[bool, Callable[[Window], float], str]] = [
        (steps > 1, lambda one: one.num_micro_batches, f"K = {steps}: nobody divides by the micro-batches"),
        (steps > 1, lambda one: 1 / one.num_micro_batches, f"1 / K = 1 / {steps}: divided by the micro-batches twice"),
        (ranks > 1, lambda _: ranks, f"R = {ranks}: gradients of ranks are summed and not averaged"),
        (ranks > 1, lambda _: 1 / ranks, f"1 / R = 1 / {ranks}: tokens of all ranks are counted, and ranks averaged"),
        (many, lambda one: one.num_micro_batches * ranks, f"K R = {both}, the micro-batches of a step"),
        (many, lambda one: 1 / one.num_micro_batches / ranks, f"1 / (K R) = 1 / {both}"),
        (True, lambda one: one.num_tokens, "N, the tokens: the sum instead of the mean"),
        (ranks > 1, lambda one: one.num_tokens / ranks, "N / R: the sum of the tokens of a rank, ranks averaged"),
    ]
    return [(factor, says) for applies, factor, says in known if applies]


def _mean_of(windows: Sequence[Window], allowed: float) -> str | None:
    """The mean that explains all steps up to a factor, the right one first; None: none does."""
    for mean in MEANS:
        if all(mean in one.matches and one.matches[mean].residual <= allowed for one in windows):
            return mean
    return None


def _partial_words(windows: Sequence[Window], ratio: float, allowed: float) -> str:
    full, short = windows[0].num_micro_batches, windows[-1].num_micro_batches
    if abs(ratio * full / short - 1) <= max(allowed, 1e-4):
        return f"partial window: the last step has {short} micro-batches and is divided by {full}"
    return f"partial window: the last step, of {short} micro-batches, is {ratio:.4g} times too large"


def _unexplained(loop: Loop, windows: Sequence[Window]) -> Diagnosis:
    if loop.kept_in:
        says = f"16-bit accumulation: every number of the gradient is one of {loop.kept_in}, which rounds each sum"
        return _fault("16-bit accumulation", says)
    if loop.autocast:
        return _fault("autocast", f"the step runs under autocast to {loop.autocast}: its products are rounded")
    if loop.is_changed_between:
        return _fault("changed between", "something changes the gradients between micro-steps")
    off = max(one.error for one in windows)
    return _fault("unknown", f"off by {off:.1e}, and none of the causes that memplan knows makes it go")
