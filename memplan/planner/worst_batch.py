"""Goals whose setups are the worst micro-batch that a data set can give.

    rows          every one as long as the maximum; with a single one there is nothing to pad
    padding-free  the longest sequences of all come together: with b of them, (sum of the b longest) / b on average
    packed        every row is full, of as many of the shortest sequences as it has room for

Tokens with a label: in rows of the maximum length as many as the sequence with the most has, in others the same of the
b with the most, or of the sequence with the largest share.

Of a sample nothing but the maximum length is known to hold for the sequences that it lacks: each is as long, and all of
its tokens have a label.  A packed row has as many as are as short as the shortest of the sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.planner.goal import Goal, Target
from memplan.sequences.worst import largest_sums, most_in_row
from memplan.specs.training import LEAST_PACKED, divisors
from memplan.specs.values import NamedTuple, dataclass, replace

if TYPE_CHECKING:
    from typing import Any

    from memplan.planner.feed import Cut
    from memplan.specs.training import Setup

LABELS_COUNT = frozenset({"chunked", "tiled", "fused", "cut"})
"""Losses that are worked out for tokens with a label alone, so that their share matters."""


class Sum(NamedTuple):
    """The sequences of a micro-batch that lie end to end."""

    micro_batch_size: int
    num_tokens: int
    """Of the longest together."""
    num_labelled: int | None
    """Tokens with a label of those with the most; None: their share is that of the setup."""


class Worst(NamedTuple):
    """The largest micro-batches that a data set can give in one way of batching."""

    seq_len: int
    """Of a row."""
    batching: str
    supervised: float | None
    """Share of the tokens with a label, of those that have one before them; None: that of the setup."""
    packed_sequences: int | None
    """In a row, where rows are packed."""
    sums: tuple[Sum, ...]
    """Where sequences lie end to end, one for each micro-batch that may be chosen; else none."""


@dataclass(frozen=True, kw_only=True)
class WorstBatchGoal(Goal):
    """A goal with setups that depend on how many sequences a micro-batch has."""

    worst: Worst

    def at(self, micro: int, steps: int, mode: str) -> Setup:
        """The setup of one candidate."""
        setup = super().at(micro, steps, mode)
        if setup.sequences_per_micro_batch == 1 and setup.padding:
            return replace(setup, padding=False)
        found = next((one for one in self.worst.sums if one.micro_batch_size == micro), None)
        if found is None:
            return setup
        changed: dict[str, Any] = {"seq_len": -(-found.num_tokens // micro)}
        if found.num_labelled is not None:
            changed["supervised"] = share_of(found.num_labelled, found.num_tokens - micro)
        return replace(setup, **changed)


def share_of(labelled: int, tokens: int) -> float:
    """Of tokens that have one before them; all where there are none."""
    return min(labelled / tokens, 1.0) if tokens > 0 and labelled else 1.0


def worst_of(cut: Cut, batching: str, each: int, *, counts_labels: bool) -> Worst:
    """The worst micro-batches.

    Args:
        cut: The data.
        batching: One of `memplan.specs.training.BATCHINGS`.
        each: Rows of an optimizer step on one GPU.
        counts_labels: Whether the share of the tokens with a label is the data's.
    """
    return Worst(
        seq_len=cut.most,
        batching=batching,
        supervised=worst_share(cut, batching) if counts_labels else None,
        packed_sequences=max(most_packed(cut), LEAST_PACKED) if batching == "packed" else None,
        sums=_sums(cut, divisors(each), counts_labels=counts_labels) if batching == "padding-free" else (),
    )


def _sums(cut: Cut, micro_batches: list[int], *, counts_labels: bool) -> tuple[Sum, ...]:
    if cut.is_sample:
        return tuple(Sum(micro, micro * cut.most, None) for micro in micro_batches)
    most = max(micro_batches)
    tokens = largest_sums(cut.tokens, most)
    labelled = None if cut.labelled is None or not counts_labels else largest_sums(cut.labelled, most)
    places = [(micro, min(micro, tokens.size) - 1) for micro in micro_batches]
    return tuple(Sum(micro, int(tokens[n]), None if labelled is None else int(labelled[n])) for micro, n in places)


def most_packed(cut: Cut) -> int:
    """Sequences that fit in a row, at most."""
    return max(cut.most // int(cut.tokens.min()), 1) if cut.is_sample else most_in_row(cut.tokens, cut.most)


def worst_batch_goal(goal: Goal, cut: Cut, batching: str, target: Target, *, counts_labels: bool) -> WorstBatchGoal:
    """A goal with this data in such batches.

    Args:
        goal: Everything else; the padding of its setup says whether the mask of padded rows counts.
        cut: The data.
        batching: One of `memplan.specs.training.BATCHINGS`.
        target: Rows of an optimizer step.
        counts_labels: Whether the share of the tokens with a label is the data's.
    """
    each = max(target.global_batch_size // goal.setup.data_parallel_size, 1)
    return goal_on(goal, worst_of(cut, batching, each, counts_labels=counts_labels), target)


def goal_on(goal: Goal, worst: Worst, target: Target) -> WorstBatchGoal:
    """A goal on micro-batches whose worst are known; the padding of its setup is that of padded rows."""
    fields = {name: value for name, value in vars(goal).items() if name not in {"setup", "target"}}
    changed: dict[str, Any] = {"seq_len": worst.seq_len, "batching": worst.batching}
    if worst.supervised is not None:
        changed["supervised"] = worst.supervised
    if worst.batching != "rows":
        changed["padding"] = False
    if worst.packed_sequences is not None:
        changed["packed_sequences"] = worst.packed_sequences
    return WorstBatchGoal(**fields, setup=replace(goal.setup, **changed), target=target, worst=worst)


def worst_share(cut: Cut, batching: str) -> float:
    """The largest share of tokens with a label that a row can have, of those that have a token before them."""
    if cut.labelled is None or cut.is_sample:
        return 1.0
    if batching == "rows":
        return share_of(int(cut.labelled.max()), cut.most - 1)
    return float((cut.labelled / (cut.tokens - 1).clip(1)).clip(0, 1).max()) or 1.0


def mean_share(cut: Cut) -> float:
    """The share of all that is trained on."""
    return 1.0 if cut.labelled is None else share_of(int(cut.labelled.sum()), int((cut.tokens - 1).sum()))
