"""Distillation of a teacher: what GKDTrainer does around the model in each micro-step.

The student runs, then, without a graph, the teacher, which hands out its cache of keys and values as well, because its
config says so; then the loss is taken from both (``GKDTrainer.compute_loss`` and ``generalized_jsd_loss`` of TRL 1.16,
experimental/gkd/gkd_trainer.py, with ``lmbda=0``).  What they hold by variables is held here, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it

from memplan.errors import UsageError
from memplan.estimation.step import check_vocabularies
from memplan.probes.heads import language_model
from memplan.probes.losses import IGNORED, masked
from memplan.probes.training import accepts_num_items, outputs_to_fp32
from memplan.specs.values import replace

if TYPE_CHECKING:
    from torch import nn

    from memplan.probes.models import TracedModel
    from memplan.probes.training import Region
    from memplan.specs.training import Setup

BETA = 0.5
TEMPERATURE = 1.0


def find_teacher(model: TracedModel, student: nn.Module, setup: Setup) -> Distillation:
    """The teacher of a model, on the meta device.

    Raises:
        UsageError: there is none, it has another vocabulary, or one of them is no language model of transformers.
    """
    if model.teacher is None:
        raise UsageError("Distillation needs a teacher, and none was read.", "Say --teacher MODEL.")
    language_model(student, "distillation")
    with torch.device("meta"):
        teacher = model.teacher.build(_setup_of_teacher(setup)).module.eval()
    config: Any = language_model(teacher, "distillation").config
    config.use_cache = True  # the default of configs; the Trainer changes that of the student alone
    found = Distillation(student, teacher, setup)
    check_vocabularies(_num_words(student), _num_words(teacher), f"{setup.teacher}")
    return found


def _setup_of_teacher(setup: Setup) -> Setup:
    """All weights as they were loaded, for a model that is not trained; in what autocast it runs, the loop knows."""
    precision, _ = setup.teacher_numerics
    plain: dict[str, Any] = {"lora": None, "freeze": (), "quantize": None, "upcast": False}
    plain |= {"activation_checkpointing": "none", "offload": None, "reentrant": False}
    lm: dict[str, Any] = {"objective": "lm", "teacher": None, "teacher_dtype": None, "dropout": 0.0}
    return replace(setup, precision=precision, **plain, **lm)


def _num_words(module: nn.Module) -> int:
    model: Any = module
    return int(model.config.get_text_config().vocab_size)


class Distillation:
    """Distillation of a teacher by the sequences of the data."""

    companion_label = "teacher"

    def __init__(self, student: nn.Module, teacher: nn.Module, setup: Setup) -> None:
        self.student: Any = student
        self.companion: Any = teacher
        self.setup = setup
        self.takes_num_items = accepts_num_items(student)
        self._words = _num_words(student)

    def make_inputs(self, micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        """What DataCollatorForChatML gives, the prompts left out."""
        shape = (micro_batch_size, seq_len)
        ids = torch.randint(self._words, shape, dtype=torch.int64)
        mask = torch.ones(shape, dtype=torch.int64)
        if self.setup.padding:
            mask[:, -1] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(shape, dtype=torch.int64)}

    def loss(self, inputs: dict[str, torch.Tensor], autocast: Region, **count: Any) -> torch.Tensor:
        """The loss of a micro-batch; `count`: ``num_items``, the labels of the whole step, where the model takes it."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student_outputs = self._run(self.student, given, autocast)
        with torch.no_grad():
            teacher_outputs = self._run(self.companion, given, autocast)
        return divergence(
            student_outputs["logits"][:, :-1, :],
            teacher_outputs["logits"][:, :-1, :],
            inputs["labels"][:, 1:],
            count.get("num_items"),
            self.setup.supervised,
        )

    def _run(self, model: Any, given: dict[str, torch.Tensor], autocast: Region) -> Any:
        """What a model hands out under accelerate: with autocast in fp32."""
        with autocast():
            outputs = model(**given)
        return outputs_to_fp32(outputs, self.setup)


def divergence(student: Any, teacher: Any, labels: torch.Tensor, num_items: Any, supervised: float) -> torch.Tensor:
    """The generalised Jensen-Shannon divergence of two distributions, of the tokens that have a label."""
    student, teacher = student / TEMPERATURE, teacher / TEMPERATURE
    student_log, teacher_log = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    beta = torch.full((), BETA, dtype=student_log.dtype, device=student_log.device)  # torch.tensor's is not seen
    mixture = torch.logsumexp(
        torch.stack([student_log + torch.log1p(-beta), teacher_log + torch.log(beta)]),
        dim=0,
    )
    from_teacher = F.kl_div(mixture, teacher_log, reduction="none", log_target=True)
    from_student = F.kl_div(mixture, student_log, reduction="none", log_target=True)
    found = beta * from_teacher + (1 - beta) * from_student
    mask = labels != IGNORED
    found = masked(found, mask, supervised)
    total: torch.Tensor = found.sum()
    count: torch.Tensor = mask.sum().clamp_min(1) if num_items is None else num_items
    return total / count
