"""What is in a micro-batch and in an optimizer step, for each way to make batches of the same data?

    fixed, longest, grouped   padded, as `memplan.sequences.padding` has them
    padding-free              the samples of a micro-batch end to end (TRL's ``padding_free``)
    names of strategies       packed, as `memplan.sequences.packing` has them

A step has target-batch / micro-batch micro-batches.  Numbers are means over an epoch; the last, smaller micro-batch
counts with what it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.sequences.analysis import STRATEGIES
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.sequences.analysis import Candidate
    from memplan.sequences.packing import Packing

PADDING_FREE = "padding-free"


class Batching(NamedTuple):
    """An epoch of the data, in micro-batches."""

    name: str
    num_rows: int
    """Samples, or packed rows."""
    num_samples: int
    """Samples in all rows together, or parts of them."""
    num_tokens: int
    """Tokens of the data in them."""
    num_slots: float
    """Tokens that the model computes: padding is among them; an expectation where the order is random."""
    room: float
    """Tokens that there is room for: of packed rows, whether they are padded or not."""
    rows_per_micro_batch: int
    micro_batch: int
    """Samples or rows of one length that were asked for; a row that joins them counts for all."""

    @property
    def efficiency(self) -> float:
        """Share of the room that is data."""
        return self.num_tokens / self.room if self.room else 1.0

    @property
    def samples_per_row(self) -> float:
        """On average."""
        return self.num_samples / self.num_rows if self.num_rows else 0.0

    @property
    def tokens_per_micro_batch(self) -> float:
        """Tokens of the data in a whole one, on average."""
        return self._per_micro_batch(self.num_tokens)

    @property
    def slots_per_micro_batch(self) -> float:
        """Tokens that are computed for a whole one, on average."""
        return self._per_micro_batch(self.num_slots)

    def _per_micro_batch(self, total: float) -> float:
        return total / self.num_rows * self.rows_per_micro_batch if self.num_rows else 0.0

    def tokens_per_step(self, target_batch: int) -> float:
        """Tokens of the data in a whole optimizer step, on average."""
        return self.tokens_per_micro_batch * target_batch / self.micro_batch

    def steps_per_epoch(self, target_batch: int) -> int:
        """Optimizer steps, the last one of what is left."""
        micro_batches = -(-self.num_rows // self.rows_per_micro_batch)
        return -(-micro_batches * self.micro_batch // target_batch)


def batchings(one: Candidate, micro_batch: int) -> Iterator[Batching]:
    """All ways that were worked out for a maximum length.

    Args:
        one: The maximum length.
        micro_batch: Rows of a micro-batch, as it was worked out for.
    """
    tokens = one.truncation.lengths.tokens
    rows, total = int((tokens > 0).sum()), int(tokens.sum())
    slots = {**{name: found.slots for name, found in one.paddings.items()}, PADDING_FREE: float(total)}
    for name, num in slots.items():
        yield Batching(name, rows, rows, total, num, num, micro_batch, micro_batch)
    for name, packing in one.packings.items():
        yield _packed(name, packing, micro_batch)


def _packed(name: str, packing: Packing, micro_batch: int) -> Batching:
    strategy, tokens = STRATEGIES[name], int(packing.tokens.sum())
    room = float(packing.num_rows * packing.capacity)
    return Batching(
        name=name,
        num_rows=packing.num_rows,
        num_samples=packing.num_samples,
        num_tokens=tokens,
        num_slots=room if strategy.pads else float(tokens),
        room=room,
        rows_per_micro_batch=1 if strategy.joins else micro_batch,
        micro_batch=micro_batch,
    )
