"""An evaluation between two steps, as the Trainer runs it (``evaluation_loop`` and ``prediction_step``).

The model is in evaluation mode, each batch goes through it under ``torch.no_grad``, and what is kept of a batch is put
together with what was kept of those before it by the Trainer's own `EvalLoopContainer`.  Variables of the loop hold the
last batch and its results until the next ones are there.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from memplan.errors import UsageError
from memplan.probes.faults import require
from memplan.probes.generation import generate
from memplan.specs.training import FUSED
from memplan.specs.values import replace

if TYPE_CHECKING:
    from memplan.probes.training import TrainingRun
    from memplan.specs.evaluation import Evaluation
    from memplan.specs.training import Setup


def evaluate(run: TrainingRun, setup: Setup, evaluation: Evaluation, step: int) -> None:
    """All batches whose logits are kept; two where the loss alone is.

    `step`: after which it comes, for the witness.
    """
    keeps = evaluation.samples is not None
    left = evaluation.samples or 2 * evaluation.batch
    kept = _Kept(keeps)
    number = 0
    run.model.eval()
    while left > 0:
        size = min(left, evaluation.batch)
        inputs = run.inputs(replace(setup, micro_batch_size=size))
        tokens = None
        if evaluation.generate is not None:
            run.witness.enter("generation", step, -1)
            tokens = generate(run, inputs, evaluation.generate)
            run.witness.enter("evaluation", step, -1)
        given = inputs
        if setup.loss == FUSED and not evaluation.keeps_logits:
            given = {**inputs, "skip_logits": True}
        results = _predict(run, given, size, keeps=evaluation.keeps_logits)
        if tokens is not None and keeps:
            results = (results[0], tokens, inputs["labels"])
        del tokens, given
        kept.add(results)
        left, number = left - size, number + 1
        if evaluation.accumulation is not None and number % evaluation.accumulation == 0:
            kept.move_to_host()
            del results, inputs
    run.model.train()


class _Kept:
    """What is kept of the batches so far."""

    def __init__(self, keeps: bool) -> None:
        require("transformers")
        from transformers.trainer_pt_utils import EvalLoopContainer

        self.containers = [EvalLoopContainer(True, padding_index=-100) for _ in range(3 if keeps else 1)]

    def add(self, results: tuple[Any, ...]) -> None:
        """Losses, logits and labels of one more batch."""
        for container, result in zip(self.containers, results, strict=False):
            container.add(result)

    def move_to_host(self) -> None:
        """``to_cpu_and_numpy``, as far as the device knows."""
        for container in self.containers:
            container.tensors = None


def _predict(run: TrainingRun, inputs: Any, size: int, *, keeps: bool) -> tuple[Any, ...]:
    """Losses of the sequences, with logits and labels where they are kept."""
    with torch.no_grad():
        num_items = run.num_items(inputs["labels"].numel()) if run.takes_num_items else None
        with run.autocast() if run.autocast else contextlib.nullcontext():
            outputs = run.call(inputs, num_items)
        outputs = run.handed_out(outputs)
        losses = run.loss(outputs, inputs, num_items).detach().mean().repeat(size)
    return (losses, kept_outputs(run.model, outputs), inputs["labels"].detach()) if keeps else (losses,)


def kept_outputs(model: Any, outputs: Any) -> Any:
    """What the Trainer calls logits: all outputs but the loss and those that the config ignores.

    Of an encoder-decoder the encoder's last hidden states are among them.

    Raises:
        UsageError: there are none.
    """
    ignored = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
    found = [x for name, x in outputs.items() if name not in {*ignored, "loss"}] if isinstance(outputs, dict) else []
    if not found:
        raise UsageError(
            f"{type(model).__name__} returns no logits that an evaluation could keep.", "Leave --eval-samples out."
        )
    from transformers.trainer_pt_utils import nested_detach

    return nested_detach(found[0] if len(found) == 1 else tuple(found))
