"""A module of the user's own, named on the command line as ``package.module:factory``.

The contract: ``factory()`` takes no arguments and returns

* an ``nn.Module`` that is called with ``input_ids`` and ``labels`` (int64, micro-batch x length) or that has a method
  ``make_inputs``, or
* ``(module, inputs)``, where ``inputs(micro_batch_size, seq_len)`` returns what the module is called with: a dict of
  keyword arguments, a tuple of positional ones, or one tensor, or
* ``(module, inputs, loss)``, where ``loss(output)`` makes a scalar of what the module returns.

Without ``loss``, the loss is ``output.loss`` or ``output["loss"]`` or the output itself.  Both functions run with the
default device "meta": tensors have shapes but no numbers, and take no memory.  What is made on the CPU nevertheless is
moved.  The module is put in training mode and converted to the precision that is asked for (``module.to(dtype)``), and
so are floating-point inputs.  Modules are looked for in the current directory, too.  Nothing runs before the trace.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.errors import MemplanError, UsageError, did_you_mean
from memplan.probes.faults import EXIT_CURE, FactoryError
from memplan.probes.inputs import token_inputs
from memplan.probes.models import PARAMETER_DTYPES, Built, TracedModel
from memplan.specs.training import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.specs.training import Setup


def factory_model(spec: str) -> TracedModel:
    """The model that ``package.module:factory`` makes; nothing of it is imported yet.

    Raises:
        UsageError: `spec` is not of this form.
    """
    module, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise UsageError(
            f"{spec!r} does not name a factory.", "Write package.module:factory, such as models.tiny:make_model."
        )
    return TracedModel(name=spec, build=lambda setup: build_with(find_factory(module, name), spec, setup))


def module_model(factory: Callable[[], Any], name: str = "factory") -> TracedModel:
    """The model that a function makes, under the same contract."""
    return TracedModel(name=name, build=lambda setup: build_with(factory, name, setup))


def find_factory(module: str, name: str) -> Callable[[], Any]:
    """Import the module and look up the factory; the current directory is searched first, as ``python -m`` does.

    Raises:
        FactoryError: it cannot be imported, or there is none of this name.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
        raise FactoryError(
            f"{module} cannot be imported: {_text(error)}",
            "Run memplan where the module lies, or install it."
            if missing
            else EXIT_CURE
            if isinstance(error, SystemExit)
            else "Correct the module.",
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            cure = did_you_mean(part, dir(found), otherwise="Name a function that is defined there.")
            raise FactoryError(f"{module} has no {name!r}.", cure)
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise FactoryError(
            f"{module}:{name} is a {type(found).__name__}, not a function that makes a module.",
            "Name a function without arguments that returns the module.",
        )
    factory: Callable[[], Any] = found
    return factory


def build_with(factory: Callable[[], Any], name: str, setup: Setup) -> Built:
    """Call the factory and put its module on the meta device, in training mode and in the dtype of `setup`.

    Raises:
        FactoryError: the factory raises, or returns something else.
    """
    try:
        made = factory()
    except MemplanError:
        raise
    except (Exception, SystemExit) as error:
        raise FactoryError(f"{name} raises {_text(error)}", _cure(error)) from error
    module, make_inputs, loss_of = unpack(made, name)
    dtype = PARAMETER_DTYPES[PRECISIONS[setup.precision][0]]
    if any(x.device.type != "meta" for x in (*module.parameters(), *module.buffers())):
        module = module.to("meta")
    if any(p.dtype != dtype for p in module.parameters() if p.is_floating_point()):
        module = module.to(dtype)
    if setup.dropout is not None:
        for part in module.modules():
            if isinstance(part, torch.nn.modules.dropout._DropoutNd):
                part.p = setup.dropout

    def converted(micro_batch_size: int, seq_len: int) -> Any:
        return _move(_call_inputs(make_inputs, name, micro_batch_size, seq_len), dtype)

    return Built(module, converted, loss_of)


def unpack(made: Any, name: str) -> tuple[nn.Module, Callable[[int, int], Any], Callable[[Any], Any] | None]:
    """Module, inputs and loss of what a factory returned.

    Raises:
        FactoryError: it returned something else.
    """
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        what = ", ".join(type(part).__name__ for part in parts)
        raise FactoryError(
            f"{name} returns {f'({what})' if isinstance(made, tuple) else what}, not a module.",
            "Return an nn.Module, (module, inputs) or (module, inputs, loss).",
        )
    module = parts[0]
    make_inputs = parts[1] if len(parts) > 1 else getattr(module, "make_inputs", token_inputs(1))
    loss_of = parts[2] if len(parts) > 2 else None
    for what, function in (("inputs", make_inputs), ("loss", loss_of or len)):
        if not callable(function):
            raise FactoryError(
                f"{name} returns a {type(function).__name__} as {what}, not a function.",
                "Return (module, inputs, loss) with inputs(micro_batch_size, seq_len) and loss(output).",
            )
    return module, make_inputs, loss_of


def _call_inputs(make_inputs: Callable[[int, int], Any], name: str, micro_batch_size: int, seq_len: int) -> Any:
    try:
        inputs = make_inputs(micro_batch_size, seq_len)
    except MemplanError:
        raise
    except (Exception, SystemExit) as error:
        raise FactoryError(f"The inputs of {name} raise {_text(error)}", _cure(error)) from error
    if not isinstance(inputs, (dict, tuple, list, torch.Tensor)):
        raise FactoryError(
            f"The inputs of {name} are a {type(inputs).__name__}.", "Return a dict, a tuple or one tensor."
        )
    return inputs


def _move(value: Any, dtype: torch.dtype) -> Any:
    """The same on the meta device, floating-point numbers in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to("meta", dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: _move(x, dtype) for name, x in value.items()}
    if type(value) in {tuple, list}:
        return type(value)(_move(x, dtype) for x in value)
    return value


def _text(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _cure(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return EXIT_CURE
    if "CUDA" in str(error) or "NVIDIA" in str(error):
        return "Leave the device to memplan: no .cuda() or .to('cuda') in the factory."
    return "Correct the factory; it runs with the default device meta, where tensors have no numbers."
