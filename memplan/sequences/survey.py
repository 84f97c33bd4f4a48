"""A data set and candidates for its maximum length, as one answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.sequences.batching import batchings
from memplan.specs.pictured import PicturedLengths
from memplan.specs.tabular import Tabular
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from memplan.sequences.analysis import Candidate, Summary
    from memplan.sequences.batching import Batching
    from memplan.sequences.lengths import Lengths


@dataclass(frozen=True, kw_only=True)
class Survey(Tabular, PicturedLengths):
    """A data set, and candidates for its maximum length."""

    data: str
    """As it was named."""
    num_files: int
    layout: str
    """counts, messages, pair or text."""
    fields: tuple[str, ...]
    """Where in a record it is."""
    field: str | None
    """The one with the text, the chat or the completion, where it was named."""
    prompt_field: str | None
    """That of the prompt, likewise."""
    tokenizer: str | None
    """The file; None where the records say their counts."""
    has_template: bool
    """Whether chats went through a template."""
    num_records: int
    """All that there are; more than `lengths` has where some alone were counted, drawn at random."""
    lengths: Lengths
    summary: Summary
    side: str
    """Where longer sequences are cut."""
    micro_batch: int
    """Rows of a micro-batch."""
    target_batch: int | None
    """Rows of an optimizer step; None: no steps are told."""
    candidates: tuple[Candidate, ...]

    @property
    def is_sample(self) -> bool:
        """Whether some records alone were counted."""
        return self.num_records > self.lengths.num_samples

    def records(self) -> list[dict[str, Any]]:
        """One row a candidate."""
        return [self._record(one) for one in self.candidates]

    def _record(self, one: Candidate) -> dict[str, Any]:
        cut, whole = one.truncation, self.summary
        row: dict[str, Any] = {
            "max_len": one.most,
            "share_truncated": cut.num_cut / whole.num_samples,
            "share_tokens_lost": share(cut.tokens_lost, whole.num_tokens),
            "share_supervised_lost": share(cut.supervised_lost, whole.num_supervised),
            "num_without_labels": cut.num_without,
            **{f"padding_{name}": found.waste for name, found in one.paddings.items()},
        }
        for name, packing in one.packings.items():
            row |= {f"rows_{name}": packing.num_rows, f"efficiency_{name}": packing.efficiency}
        for found in self.batchings(one):
            row |= {
                f"tokens_per_micro_batch_{found.name}": found.tokens_per_micro_batch,
                f"slots_per_micro_batch_{found.name}": found.slots_per_micro_batch,
            }
            if self.target_batch is not None:
                row |= {
                    f"tokens_per_step_{found.name}": found.tokens_per_step(self.target_batch),
                    f"steps_per_epoch_{found.name}": found.steps_per_epoch(self.target_batch),
                }
        return row

    def batchings(self, one: Candidate) -> tuple[Batching, ...]:
        """The ways to make micro-batches at one of the candidates: padded, padding-free and packed."""
        return tuple(batchings(one, self.micro_batch))


def share(part: float, whole: float) -> float:
    """A part of a whole; 0 of nothing."""
    return part / whole if whole else 0.0
