"""Labels that are smoothed: the loss that the Trainer takes itself from what the model returns.

Source: ``Trainer.compute_loss`` of transformers 5.23 (trainer.py); its ``LabelSmoother`` (trainer_pt_utils.py) is what
runs here.  The model is given no labels, so that it takes no loss of its own; an encoder-decoder is given the ids of
its decoder, which it would make from labels, as ``DataCollatorForSeq2Seq`` does (data/data_collator.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.probes.faults import require

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.specs.training import Setup


def find_smoother(module: nn.Module, setup: Setup) -> Smoother | None:
    """What smooths the labels of the module; None: nothing does.

    Raises:
        UsageError: the module is none of transformers, whose logits are known by their name.
    """
    if not setup.label_smoothing:
        return None
    if not hasattr(module, "gradient_checkpointing_enable"):
        raise UsageError(
            f"Labels are smoothed for models of transformers; this is a {type(module).__name__}.",
            "Leave --label-smoothing out.",
        )
    return Smoother(module, setup.label_smoothing)


class Smoother:
    """The loss of what the model returned and of labels that it has not seen."""

    def __init__(self, module: nn.Module, factor: float) -> None:
        require("transformers")
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        from transformers.trainer_pt_utils import LabelSmoother

        model: Any = module
        model = model.get_base_model() if hasattr(module, "peft_config") else model
        self._model = model
        self.shifts = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self._smooth = LabelSmoother(epsilon=factor)

    def inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch, with the ids of the decoder where the model has one.

        Raises:
            UsageError: it holds no labels, or the model has its own way from them to its decoder.
        """
        name, cure = type(self._model).__name__, "Leave --label-smoothing out."
        if "labels" not in inputs:
            raise UsageError(f"{name} is traced without labels that could be smoothed.", cure)
        if not self._model.config.is_encoder_decoder or "decoder_input_ids" in inputs:
            return inputs
        shifted = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        if shifted is None:
            raise UsageError(f"{name} needs labels for its decoder, and smoothing takes them away.", cure)
        return {**inputs, "decoder_input_ids": shifted(labels=inputs["labels"])}

    def loss(self, outputs: Any, labels: torch.Tensor, num_items: torch.Tensor | None) -> torch.Tensor:
        """The smoothed loss; causal language models predict the next label."""
        smooth: Any = self._smooth
        shift = {"shift_labels": True} if self.shifts else {}
        loss: torch.Tensor = smooth(outputs, labels, num_items_in_batch=num_items, **shift)
        return loss
