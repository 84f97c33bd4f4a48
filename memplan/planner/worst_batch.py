"""Goals whose setups are the worst micro-batch that a data set can give.

    rows          every one as long as the maximum; with a single one there is nothing to pad
    padding-free  the longest sequences of all come together: with b of them, (sum of the b longest) / b on average
    packed        every row is full, of as many of the shortest sequences as it has room for

Tokens with a label: in rows of the maximum length as many as the sequence with the most has, in others the same of the
b with the most, or of the sequence with the largest share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.planner.goal import Goal, Target
from memplan.sequences.worst import largest_sums, most_in_row
from memplan.specs.training import LEAST_PACKED
from memplan.specs.values import dataclass, replace

if TYPE_CHECKING:
    from typing import Any

    from memplan.planner.feed import Cut
    from memplan.specs.training import Setup

LABELS_COUNT = frozenset({"chunked", "tiled", "fused", "cut"})
"""Losses that are worked out for tokens with a label alone, so that their share matters."""


@dataclass(frozen=True, kw_only=True)
class WorstBatchGoal(Goal):
    """A goal with setups that depend on how many sequences a micro-batch has."""

    longest: tuple[int, ...] = ()
    """Tokens of the longest sequence, of the two longest together, ...; empty: rows of one length."""
    labelled: tuple[int, ...] = ()
    """The same of tokens with a label; empty: their share is that of the setup."""

    def at(self, micro: int, steps: int, mode: str) -> Setup:
        """The setup of one candidate."""
        setup = super().at(micro, steps, mode)
        if setup.sequences_per_micro_batch == 1 and setup.padding:
            return replace(setup, padding=False)
        if not self.longest:
            return setup
        tokens = self.longest[min(micro, len(self.longest)) - 1]
        changed: dict[str, Any] = {"seq_len": -(-tokens // micro)}
        if self.labelled:
            changed["supervised"] = share_of(self.labelled[min(micro, len(self.labelled)) - 1], tokens - micro)
        return replace(setup, **changed)


def share_of(labelled: int, tokens: int) -> float:
    """Of tokens that have one before them; all where there are none."""
    return min(labelled / tokens, 1.0) if tokens > 0 and labelled else 1.0


def worst_batch_goal(goal: Goal, cut: Cut, batching: str, target: Target, *, counts_labels: bool) -> WorstBatchGoal:
    """A goal with this data in such batches.

    Args:
        goal: Everything else; the padding of its setup says whether the mask of padded rows counts.
        cut: The data.
        batching: One of `memplan.specs.training.BATCHINGS`.
        target: Rows of an optimizer step.
        counts_labels: Whether the share of the tokens with a label is the data's.
    """
    fields = {name: value for name, value in vars(goal).items() if name not in {"setup", "target"}}
    changed: dict[str, Any] = {"seq_len": cut.most, "batching": batching}
    more: dict[str, Any] = {}
    if counts_labels:
        changed["supervised"] = worst_share(cut, batching)
    if batching != "rows":
        changed["padding"] = False
    if batching == "packed":
        changed["packed_sequences"] = max(most_in_row(cut.tokens, cut.most), LEAST_PACKED)
    if batching == "padding-free":
        more["longest"] = tuple(map(int, largest_sums(cut.tokens, target.global_batch_size)))
        if counts_labels and cut.labelled is not None:
            more["labelled"] = tuple(map(int, largest_sums(cut.labelled, target.global_batch_size)))
    return WorstBatchGoal(**{**fields, "setup": replace(goal.setup, **changed), "target": target, **more})


def worst_share(cut: Cut, batching: str) -> float:
    """The largest share of tokens with a label that a row can have, of those that have a token before them."""
    if cut.labelled is None:
        return 1.0
    if batching == "rows":
        return share_of(int(cut.labelled.max()), cut.most - 1)
    return float((cut.labelled / (cut.tokens - 1).clip(1)).clip(0, 1).max()) or 1.0


def mean_share(cut: Cut) -> float:
    """The share of all that is trained on."""
    return 1.0 if cut.labelled is None else share_of(int(cut.labelled.sum()), int((cut.tokens - 1).sum()))
