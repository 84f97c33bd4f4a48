"""A setup as the arguments of Hugging Face's Trainer, for the reader who wants to run it.

Names as in `TrainingArguments` of transformers 5.23.  Parameters get their dtype when the model is loaded
(`from_pretrained(..., dtype=...)`); `bf16=True` is autocast and nothing else.  Selective checkpointing is nothing that
the Trainer offers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.specs.training import PRECISIONS

if TYPE_CHECKING:
    from memplan.specs.training import Setup

OPTIM_BY_OPTIMIZER = {
    "adamw": "adamw_torch",
    "adamw-foreach": "adamw_torch",
    "adamw-fused": "adamw_torch_fused",
    "adamw-8bit": "adamw_8bit",
    "sgd": "sgd",
    "sgd-momentum": "sgd",
}
"""Ours -> `TrainingArguments.optim`; what the Trainer does not offer is missing."""

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def trainer_arguments(setup: Setup) -> dict[str, Any] | None:
    """`dtype` for from_pretrained and `arguments` for TrainingArguments; None where the Trainer cannot do it."""
    optim = OPTIM_BY_OPTIMIZER.get(setup.optimizer)
    mode = setup.activation_checkpointing
    if optim is None or mode == "selective":
        return None
    parameters, autocast = PRECISIONS[setup.precision]
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "activation_checkpointing": mode != "none",
    }
    if mode.startswith("every-"):
        arguments["activation_checkpointing_kwargs"] = {"every_n_layers": int(mode[6:])}
    arguments["optim"] = optim
    if setup.optimizer == "sgd-momentum":
        arguments["optim_args"] = "momentum=0.9"
    arguments["bf16"] = autocast == "bf16"
    arguments["fp16"] = autocast == "fp16"
    return {"dtype": DTYPE_NAMES[parameters], "attn_implementation": _attention(setup), "arguments": arguments}


def _attention(setup: Setup) -> str:
    return "flash_attention_2" if setup.attention == "flash" else setup.attention
