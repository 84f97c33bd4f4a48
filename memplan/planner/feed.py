"""A data set as what a plan is made for: its maximum length, its batches, what each way of making them would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.sequences.worst import share_unseen
from memplan.specs.values import NamedTuple, dataclass

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memplan.planner.plan import Candidate
    from memplan.planner.worst_batch import Worst
    from memplan.sequences.maximum import Loss, Maximum
    from memplan.sequences.survey import Survey
    from memplan.sequences.worst import Chance

    Integers = NDArray[np.int64]

PADDED, SMALLER, GROUPED, PADDING_FREE, PACKED = "padded", "smaller", "grouped", "padding-free", "packed"
"""Rows as long as the longest of their micro-batch, in random order; the same in smaller micro-batches, which pad less;
with others of about the same length; end to end in one row; rows that are filled first."""
BATCHING_BY_WAY = {PADDED: "rows", GROUPED: "rows", PADDING_FREE: "padding-free", PACKED: "packed"}
WAY_BY_BATCHING = {"rows": PADDED, "padding-free": PADDING_FREE, "packed": PACKED}
"""The one of two that is not asked for by name comes first."""


class Cut(NamedTuple):
    """Sequences as they are trained on: none is longer than the maximum, none empty."""

    tokens: Integers
    """Of each."""
    labelled: Integers | None
    """How many of them have a label; None: all."""
    most: int
    """The maximum length."""
    weight: float = 1.0
    """Records of the data for each one of these; above 1 these are a sample, drawn at random."""

    @property
    def is_sample(self) -> bool:
        """Whether the data has others, of which nothing is known but the maximum length."""
        return self.weight > 1

    @property
    def mean(self) -> float:
        """Tokens of a sequence on average."""
        return float(self.tokens.mean())

    @property
    def is_even(self) -> bool:
        """Whether all are equally long, so that no batch holds padding; of a sample it is not known."""
        return not self.is_sample and bool(self.tokens.min() == self.tokens.max())


class Rows(NamedTuple):
    """What an epoch hands over, one after the other: sequences, or rows that are packed with several."""

    num: int
    samples: float
    """Sequences in one, on average."""
    tokens: float
    """Tokens of the data in one, on average."""


class Way(NamedTuple):
    """A way to make batches, and the fastest plan with it that keeps the tokens of an optimizer step."""

    name: str
    rows: Rows
    candidate: Candidate | None = None
    """The plan, with the bytes of its worst micro-batch; what lacks least where nothing fits; None: there is none."""
    refused: str = ""
    """Why there is none."""
    slots: float = 0.0
    """Tokens of a row with its padding, on average."""
    epoch_s: float = 0.0
    """A lower bound of the seconds of an epoch."""

    @property
    def target(self) -> int:
        """Rows of an optimizer step over all GPUs."""
        return 0 if self.candidate is None else self.candidate.setup.global_batch_size

    @property
    def samples_per_step(self) -> float:
        """Sequences of an optimizer step."""
        return self.target * self.rows.samples

    @property
    def tokens_per_step(self) -> float:
        """Tokens of the data in an optimizer step, on average."""
        return self.target * self.rows.tokens

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps, the last of which may be smaller."""
        return -(-self.rows.num // self.target) if self.target else 0

    @property
    def waste(self) -> float:
        """Share of a batch that is padding."""
        return 1 - self.rows.tokens / self.slots if self.slots else 0.0


class Uncut(NamedTuple):
    """What would come if nothing cut the sequences."""

    fits: int
    """Tokens that a row of the plan's micro-batch may have, or the sequences of the micro-batch together."""
    num_longer: int
    """Sequences that have more alone; of a sample those in it."""
    chance: Chance | None
    """That an epoch has a micro-batch that does not fit; None: no batch of a sample is too large, and nobody knows of
    the rest (`Feed.unseen`)."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The data of a plan."""

    survey: Survey
    max_loss: float
    """Share of the tokens with a label that may be lost where the maximum length is chosen."""
    maximum: Maximum
    candidates: tuple[Loss, ...]
    """The maximum length and others from the median on, ascending."""
    cut: Cut
    worst: Worst
    """The micro-batches that the plan is made for."""
    has_mask: bool
    """Whether padded rows are planned with a mask."""
    mean_supervised: float | None
    """Share of the tokens with a label of all that is trained on; None: that of the setup counts."""
    knows_padding: bool
    """Whether the mask of padded batches is counted, where there is one."""
    way: str
    """That of the plan."""
    samples_per_step: float
    """Sequences of an optimizer step."""
    target_tokens: int | None
    """Tokens of the data that were asked for in an optimizer step."""
    ways: tuple[Way, ...] = ()
    """All that were compared, that of the plan among them; none where the model is known by traces alone."""
    uncut: Uncut | None = None
    """None: no sequence is longer than what was planned with, or nothing fits."""

    @property
    def unseen(self) -> float | None:
        """Share of the data that may be longer than all of a sample (95 % confidence); None where all was counted."""
        return share_unseen(self.survey.lengths.num_samples) if self.survey.is_sample else None
