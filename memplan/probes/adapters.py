"""Adapters beside the weights of a model, as peft makes them.

peft keeps adapters in fp32 where the weights are in half precision (``autocast_adapter_dtype``, its default), and
freezes everything else.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.operators.tape import MODULES_TO_SAVE
from memplan.probes.faults import require
from memplan.probes.quantised import DTYPES, quantise
from memplan.specs.conversions import PARAMETER_BY_NAME
from memplan.specs.ranks import check_adapters, check_copies, check_nested, check_ranks
from memplan.specs.recipe import ALL_LINEAR, check_known, covers, is_within
from memplan.specs.training import PRECISIONS, TASK_TYPE_BY_OBJECTIVE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memplan.specs.adapter import Lora
    from memplan.specs.recipe import Recipe
    from memplan.specs.training import Setup


def prepared(module: nn.Module, setup: Setup) -> nn.Module:
    """The module as the recipe of the setup wants it, in place: quantised, with adapters, frozen.

    Raises:
        MissingLibraryError: peft or bitsandbytes is not installed.
        UsageError: the model has no layer of the names given, or nothing is left to train.
    """
    module = with_adapters(quantise(module, setup), setup)
    check_known("--freeze", setup.freeze, {plain_name(name) for name, _ in module.named_parameters()}, covers)
    for name, parameter in module.named_parameters():
        if any(covers(pattern, plain_name(name)) for pattern in setup.freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError("Nothing is left to train.", "Freeze less, or add adapters with --lora-rank.")
    return module


def load_libraries(setup: Setup) -> None:
    """Import what adapters and quantised weights come with: tensors of the libraries' own are not the run's.

    Raises:
        MissingLibraryError: one is not installed.
    """
    if setup.lora is not None:
        require("peft")
    if setup.quantize is not None:
        require("bitsandbytes")


def plain_name(name: str) -> str:
    """The name that a parameter has without peft's wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")


def with_adapters(module: nn.Module, setup: Setup) -> nn.Module:
    """The module with the adapters that the setup asks for, in place; itself where it asks for none.

    Raises:
        MissingLibraryError: peft is not installed.
        UsageError: the model has no layer of the names given.
    """
    lora = setup.lora
    if lora is None:
        return module
    _check_modules(module, setup.recipe, lora)
    require("peft")
    import peft
    from peft.tuners.lora import LoraLayer

    settings = peft.LoraConfig(
        r=lora.rank,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == (ALL_LINEAR,) else list(lora.targets),
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        layers_to_transform=list(lora.layers) or None,
        rank_pattern=dict(lora.ranks),
        task_type=TASK_TYPE_BY_OBJECTIVE.get(setup.objective),
    )
    high = lora.dtype == "fp32" or setup.quantize is not None
    if setup.upcast:
        peft.prepare_model_for_kbit_training(module, use_gradient_checkpointing=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: nn.Module = peft.get_peft_model(module, settings, autocast_adapter_dtype=high)
    except (TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UsageError(
            f"peft {peft.__version__} cannot add these adapters: {text[:300]}",
            "Name linear layers of the model with --lora-targets, or say all-linear.",
        ) from error
    paths = [_path(name, part) for name, part in adapted.named_modules() if isinstance(part, LoraLayer)]
    check_ranks(lora, paths)
    check_copies(lora, paths)
    if lora.dtype == "base":
        dtype = DTYPES[PRECISIONS[setup.precision][0]]
        _in_dtype_of_the_base(adapted, dtype, magnitudes=setup.quantize is None)
    return adapted


def _path(name: str, wrapper: Any) -> str:
    """The path of what the wrapper adapts: a module, or a parameter."""
    parts = [part for part in plain_name(name).split(".") if part != "base_layer"]
    return ".".join((*parts, *filter(None, (getattr(wrapper, "parameter_name", None),))))


def _check_modules(module: nn.Module, recipe: Recipe, lora: Lora) -> None:
    """Raise `UsageError` for names that no module has: peft takes them where another one fits."""
    paths = [path for path, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))]
    config: Any = getattr(module, "config", None)
    old = PARAMETER_BY_NAME.get(getattr(config, "model_type", ""), ())
    check_adapters(recipe, lora, [*paths, *old])
    check_known("--modules-to-save", lora.modules_to_save, paths, is_within)
    check_nested(lora, paths)


def _in_dtype_of_the_base(adapted: nn.Module, dtype: torch.dtype, *, magnitudes: bool) -> None:
    """Adapters in `dtype`.

    peft leaves adapters on the meta device in fp32, and beside a quantised base anywhere; of those trl's SFTTrainer
    (1.16) makes bf16 ones, but for DoRA's magnitudes.  Copies of modules have the dtype that their originals had when
    the adapters were added (``ModulesToSaveWrapper.update``): fp32 after ``prepare_model_for_kbit_training``.
    """
    for name, parameter in adapted.named_parameters():
        is_copy = f".{MODULES_TO_SAVE}." in name
        if parameter.requires_grad and not is_copy and (magnitudes or "lora_magnitude_vector" not in name):
            parameter.data = parameter.data.to(dtype)
