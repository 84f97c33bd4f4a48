"""Another loss in place of a language model's own: what TRL, Liger Kernel and cut cross-entropy put there.

`use_loss` replaces the ``forward`` of a causal language model by one that runs everything below the output layer, hands
the hidden states, the weight of the output layer and the labels to one of the losses of `memplan.probes.losses`, and
returns no logits.  That is how those libraries do it, too:

chunked   TRL 1.14, ``_patch_chunked_ce_lm_head`` (trainer/sft_trainer.py)
tiled     TRL 1.16, ``add_fused_lm_head`` (trainer/utils.py)
fused     Liger Kernel 0.8.5, ``lce_forward`` (transformers/model/llama.py)
cut       cut-cross-entropy 25.1.1, ``linear_cross_entropy(..., shift=True)``, as Unsloth calls it
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.probes.losses import LOSS_BY_NAME, Head

if TYPE_CHECKING:
    from torch import nn

    from memplan.probes.autocast import CudaAutocast


def use_loss(module: nn.Module, loss: str, autocast: CudaAutocast | None) -> None:
    """Let the model compute its loss in another way than its own, in place; nothing to do for ``full``.

    Raises:
        UsageError: the module is no causal language model of transformers.
    """
    if loss == "full":
        return
    model: Any = module
    if hasattr(model, "peft_config"):
        model = model.get_base_model()
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise UsageError(
            f"--loss {loss} takes the place of a causal language model's loss; this is a {type(model).__name__}.",
            "Use --loss full: what the module computes itself.",
        )
    compute = LOSS_BY_NAME[loss]
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scaled = _is_scaled(config)

    def forward(
        self: Any, input_ids: Any = None, labels: Any = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        outputs = self.base_model(input_ids=input_ids, **kwargs)
        layer = self.get_output_embeddings()
        head = Head(layer.weight, layer.bias, softcap, scaled, autocast)
        return compute(outputs[0], head, labels, num_items_in_batch)

    model.forward = types.MethodType(forward, model)


def _is_scaled(config: Any) -> bool:
    """Whether the logits are multiplied by a number (Cohere, Granite)."""
    return any(getattr(config, name, None) is not None for name in ("logit_scale", "logits_scaling"))
