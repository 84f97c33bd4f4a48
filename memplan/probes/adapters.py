"""Adapters beside the weights of a model, as peft makes them.

peft keeps adapters in fp32 where the weights are in half precision (``autocast_adapter_dtype``, its default), and
freezes everything else.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.probes.faults import require

if TYPE_CHECKING:
    from torch import nn

    from memplan.specs.training import Setup

ALL_LINEAR = "all-linear"


def with_adapters(module: nn.Module, setup: Setup) -> nn.Module:
    """The module with the adapters that the setup asks for, in place; itself where it asks for none.

    Raises:
        MissingLibraryError: peft is not installed.
        UsageError: the model has no layer of the names given.
    """
    if setup.lora is None:
        return module
    require("peft")
    import peft

    targets = ALL_LINEAR if setup.lora.targets == (ALL_LINEAR,) else list(setup.lora.targets)
    settings = peft.LoraConfig(r=setup.lora.rank, lora_dropout=setup.lora.dropout, target_modules=targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: nn.Module = peft.get_peft_model(module, settings)
    except ValueError as error:
        text = " ".join(str(error).split())
        raise UsageError(
            f"peft {peft.__version__} cannot add these adapters: {text[:300]}",
            "Name linear layers of the model with --lora-targets, or say all-linear.",
        ) from error
    return adapted
