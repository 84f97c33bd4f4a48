"""Another loss in place of a language model's own: what TRL, Liger Kernel and cut cross-entropy put there.

`use_loss` replaces the ``forward`` of a causal language model by one that runs everything below the output layer, hands
the hidden states, the weight of the output layer and the labels to one of the losses of `memplan.probes.losses`, and
returns no logits.  Without labels the model does what it did before, so that it generates as ever.  That is how those
libraries do it, too:

chunked   TRL 1.14, ``_patch_chunked_ce_lm_head`` (trainer/sft_trainer.py)
tiled     TRL 1.16, ``add_fused_lm_head`` (trainer/utils.py)
fused     Liger Kernel 0.8.5, ``lce_forward`` (transformers/model/llama.py)
cut       cut-cross-entropy 25.1.1, ``linear_cross_entropy(..., shift=True)``, as Unsloth calls it

Liger's has all logits in evaluation mode, unless it is told to skip them, as the Trainer does where it keeps none
(``prediction_step`` of transformers 5.23).
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

from memplan.architectures.heads import ALL_LOGITS
from memplan.errors import UsageError
from memplan.probes.faults import require
from memplan.probes.losses import LOSS_BY_NAME, Head, chunked
from memplan.specs.training import FUSED

if TYPE_CHECKING:
    from torch import nn

    from memplan.probes.autocast import CudaAutocast
    from memplan.probes.losses import Loss


def use_loss(
    module: nn.Module, loss: str, autocast: CudaAutocast | None, supervised: float = 1.0, unlabelled: int = 0
) -> None:
    """Let the model compute its loss in another way than its own, in place; nothing to do for all logits at once.

    `supervised`, `unlabelled`: see `Head`.

    Raises:
        UsageError: the module is no causal language model of transformers.
    """
    if loss not in ALL_LOGITS:
        model = _causal_model(module, loss)
        _replace_loss(model, LOSS_BY_NAME[loss], autocast, supervised, unlabelled, evaluates_logits=loss == FUSED)


def use_library_loss(module: nn.Module, loss: str) -> None:
    """The same with real numbers, on a GPU: the libraries' own functions.

    Raises:
        MissingLibraryError: the library is not installed.
        UsageError: the module is no causal language model of transformers, or the loss is not measured.
    """
    if loss in ALL_LOGITS:
        return
    if loss not in LIBRARY_LOSS_BY_NAME:
        known = ", ".join(LIBRARY_LOSS_BY_NAME)
        raise UsageError(f"--loss {loss} is not measured.", f"Use --loss full, {known}, or memplan trace.")
    _replace_loss(_causal_model(module, loss), LIBRARY_LOSS_BY_NAME[loss], None, evaluates_logits=loss == FUSED)


def _causal_model(module: nn.Module, loss: str) -> Any:
    return language_model(module, f"--loss {loss}")


def language_model(module: nn.Module, what: str) -> Any:
    """The causal language model that a module is, or has adapters of.

    Raises:
        UsageError: it is none; `what` would replace its loss.
    """
    model: Any = module
    if hasattr(model, "peft_config"):
        model = model.get_base_model()
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise UsageError(
            f"{what} takes the place of a causal language model's loss; this is a {type(model).__name__}.",
            "Use --loss full: what the module computes itself.",
        )
    return model


def _replace_loss(
    model: Any,
    compute: Loss,
    autocast: CudaAutocast | None,
    supervised: float = 1.0,
    unlabelled: int = 0,
    *,
    evaluates_logits: bool,
) -> None:
    """`evaluates_logits`: whether the model has its own loss, of all logits, in evaluation mode."""
    own = model.forward

    @functools.wraps(type(model).forward)  # generate() asks which arguments there are
    def forward(
        self: Any,
        input_ids: Any = None,
        labels: Any = None,
        num_items_in_batch: Any = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return own(input_ids=input_ids, **kwargs)
        if evaluates_logits and not (self.training if skip_logits is None else skip_logits):
            return own(input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        outputs = self.base_model(input_ids=input_ids, **kwargs)
        head = head_of(self, autocast, supervised)._replace(unlabelled=unlabelled)
        return compute(outputs[0], head, labels, num_items_in_batch)

    model.forward = types.MethodType(forward, model)


def head_of(model: Any, autocast: CudaAutocast | None, supervised: float) -> Head:
    """The output layer of a causal language model."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, softcap, _is_scaled(config), autocast, supervised)


def _is_scaled(config: Any) -> bool:
    """Whether the logits are multiplied by a number (Cohere, Granite)."""
    return any(getattr(config, name, None) is not None for name in ("logit_scale", "logits_scaling"))


def _liger(hidden: Any, head: Head, labels: Any, num_items: Any) -> dict[str, Any]:
    require("liger_kernel")
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

    width = hidden.size(-1)
    loss = LigerForCausalLMLoss(hidden, head.weight, labels, width, num_items, final_logit_softcapping=head.softcap)
    return {"loss": loss}


def _cut(hidden: Any, head: Head, labels: Any, num_items: Any) -> dict[str, Any]:
    require("cut_cross_entropy")
    from cut_cross_entropy import linear_cross_entropy

    hidden = hidden.to(head.weight.dtype)
    reduction = "mean" if num_items is None else "sum"
    loss = linear_cross_entropy(hidden, head.weight, labels, softcap=head.softcap, reduction=reduction, shift=True)
    return {"loss": loss if num_items is None else loss / num_items}


LIBRARY_LOSS_BY_NAME: dict[str, Loss] = {"chunked": chunked, "fused": _liger, "cut": _cut}
"""Losses that a probe runs; TRL's of now is left out, as it comes with its trainer."""
