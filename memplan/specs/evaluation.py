"""How a model is evaluated between the steps of its training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_EVAL_BATCH = 8
"""``per_device_eval_batch_size`` of transformers' TrainingArguments."""

LARGEST_COUNT = 10**9


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ``Trainer.evaluate`` does on one GPU (``evaluation_loop`` in transformers/trainer.py)."""

    batch: int = DEFAULT_EVAL_BATCH
    """Sequences in one forward pass (``per_device_eval_batch_size``)."""
    samples: int | None = None
    """Sequences whose logits are kept, because there is a ``compute_metrics``; None: the loss alone is."""
    accumulation: int | None = None
    """Batches after which what is kept moves to the host (``eval_accumulation_steps``); None: at the end."""

    generate: int | None = None
    """Tokens generated behind each sequence, its prompt (``predict_with_generate``, ``max_new_tokens``); None: none."""

    @property
    def keeps_logits(self) -> bool:
        """Whether the logits of every sequence are kept: with generation it is the tokens."""
        return self.samples is not None and self.generate is None

    def __post_init__(self) -> None:
        for name in ("batch", "samples", "accumulation", "generate"):
            value: object = getattr(self, name)
            if value is None and name != "batch":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
                raise UsageError(f"eval_{name} is {value!r}.", f"It has to lie between 1 and {LARGEST_COUNT}.")
        if self.accumulation is not None and self.samples is None:
            raise UsageError(
                "--eval-accumulation moves logits to the host, and none are kept.",
                "Say how many sequences are evaluated, as in --eval-samples 1000.",
            )


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON."""
    names = ("batch", "samples", "accumulation", "generate")
    return {name: getattr(evaluation, name) for name in names}


def parse_evaluation(record: Mapping[str, Any]) -> Evaluation:
    """The evaluation of a JSON object."""
    names = ("samples", "accumulation", "generate")
    return Evaluation(batch=record["batch"], **{name: record.get(name) for name in names})
