"""What others measured and published, against what memplan predicts of the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.architectures.registry import read_architecture
from memplan.catalog.gpus import read_gpu
from memplan.catalog.models import read_config
from memplan.catalog.published import comparable_bytes, read_questions
from memplan.estimation.estimate import Estimator
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.catalog.published import Question


class Answer(NamedTuple):
    """One published number and the predicted one."""

    question: Question
    predicted_bytes: int

    @property
    def error(self) -> float:
        """Signed, as a fraction of what was measured."""
        return (self.predicted_bytes - self.question.measured_bytes) / self.question.measured_bytes

    @property
    def trained(self) -> str:
        """The model, and what of it was trained where that is not all: LoRA, or QLoRA on a quantised base."""
        model, setup = self.question.row.model, self.question.setup
        if setup.lora is None:
            return model
        return f"{model} ({'LoRA' if setup.quantize is None else 'QLoRA'})"

    @property
    def explained_error(self) -> float | None:
        """The same with the tensors that are known to make a difference; None where there are none."""
        if not self.question.explained_bytes:
            return None
        return self.error + self.question.explained_bytes / self.question.measured_bytes


def answers(notify: Callable[[str], None] | None = None) -> tuple[Answer, ...]:
    """What memplan says to every question that it is asked about published numbers; `notify` is told which one."""
    estimators: dict[str, Estimator] = {}
    found = []
    questions = read_questions()
    for number, question in enumerate(questions, 1):
        if notify is not None:
            notify(f"{number}/{len(questions)} published: {question.model} on {question.gpu}")
        key = f"{question.model} on {question.gpu}"
        if key not in estimators:
            values = question.config or read_config(question.model)[0]
            architecture = read_architecture(values, question.model)
            estimators[key] = Estimator(architecture, question.model, read_gpu(question.gpu))
        estimator = estimators[key]
        assert estimator.gpu is not None
        memory = estimator.replayed_memory(question.setup, estimator.gpu.usable_bytes)
        found.append(Answer(question, comparable_bytes(memory, question.quantity)))
    return tuple(found)
