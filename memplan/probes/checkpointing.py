"""Activation checkpointing of a module: as transformers switches it on, or around the layers of any other module.

``save-attention`` is what SFTTrainer of TRL 1.16 calls selective: torch's selective activation checkpointing with a
policy that saves what fused attention gives.

``selective`` computes attention again: the attention function that transformers looks up runs under
torch.utils.checkpoint, and keeps its queries, keys, values and mask alone.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from memplan.errors import UsageError
from memplan.specs.training import checkpointed_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from memplan.probes.autocast import CudaAutocast


SAVE_ATTENTION = "save-attention"
aten = torch.ops.aten
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
"""The operators whose results TRL 1.16 saves (trl/models/selective_activation_checkpointing.py)."""


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The largest list of equal modules, by path: the layers of the model; empty where there is none."""
    best: dict[str, nn.Module] = {}
    most = 0
    for path, module in model.named_modules():
        children = list(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if len(children) > 1 and len({type(child) for child in children}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if size > most:
                most = size
                best = {f"{path}.{n}" if path else str(n): child for n, child in enumerate(children)}
    return best


def enable_checkpointing(
    model: Any, how: str, autocast: CudaAutocast | None, *, offload: bool = False, reentrant: bool = False
) -> None:
    """Compute activations again in the backward pass: ``none``, ``selective``, ``full`` or ``every-N`` layers.

    ``save-attention``: all but what attention gives.  ``selective`` is applied by `selective_checkpointing` while the
    model runs.  `offload`: what is kept for it waits on the host.  `reentrant`: by a graph of their own,
    ``use_reentrant=True``.

    Raises:
        UsageError: the module is not one of transformers and has no repeated layers, or cannot offload.
    """
    if offload and not hasattr(model, "activation_checkpointing_enable"):
        raise UsageError("Models of transformers 5.23 and later can offload what they keep.", "Leave --offload out.")
    if how in {"none", "selective"}:
        return
    saved = ATTENTION if how == SAVE_ATTENTION else ()
    kwargs: dict[str, Any] = {"use_reentrant": True} if reentrant else _kwargs(autocast, saved)
    how = "full" if how == SAVE_ATTENTION else how
    if hasattr(model, "gradient_checkpointing_enable"):
        every = 1 if how == "full" else int(how.removeprefix("every-"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable(kwargs, **({"every_n_layers": every} if every > 1 else {}), **({"offload": True} if offload else {}))
        if reentrant and autocast is not None:
            _lower_again(model, autocast)
        return
    layers = repeated_layers(model)
    if not layers:
        raise UsageError(
            f"The module has no list of equal layers to checkpoint ({how}).", "Use --checkpointing none for it."
        )
    if reentrant:
        raise UsageError("Models of transformers can be traced with reentrant checkpointing.", "Leave --reentrant out.")
    for layer, mode in zip(layers.values(), checkpointed_layers(how, len(layers)), strict=True):
        if mode == "full":
            layer.forward = _again(layer.forward, kwargs)


def _lower_again(model: nn.Module, autocast: CudaAutocast) -> None:
    """Run layers again in a region of autocast.

    torch.utils.checkpoint.CheckpointFunction enters the one of CUDA by itself, which meta tensors do not have.
    """

    def lowered(checkpointed: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *inputs: Any) -> Any:
            with autocast.region() if torch.is_grad_enabled() else contextlib.nullcontext():
                return function(*inputs)

        return lambda function, *inputs: checkpointed(partial(run, function), *inputs)

    for module in model.modules():
        found: Any = getattr(module, "_gradient_checkpointing_func", None)
        if found is not None:
            module._gradient_checkpointing_func = lowered(found)  # type: ignore[assignment]


def host_memory() -> contextlib.AbstractContextManager[Any]:
    """While it holds, what transformers offloads from the meta device leaves it, and comes back as new tensors."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return contextlib.nullcontext()

    def offloaded(**_: Any) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(_Offloaded, lambda packed: packed.fetched())

    return mock.patch.object(modeling, "save_on_cpu", offloaded)


class _Offloaded:
    """What is left on the device of a tensor that waits on the host: nothing but its form."""

    def __init__(self, x: torch.Tensor) -> None:
        self.form = (x.size(), x.stride(), x.dtype, x.device)

    def fetched(self) -> torch.Tensor:
        size, stride, dtype, device = self.form
        return torch.empty_strided(size, stride, dtype=dtype, device=device)


@contextlib.contextmanager
def selective_checkpointing(model: nn.Module, how: str, autocast: CudaAutocast | None) -> Iterator[None]:
    """Compute attention again in the backward pass, if `how` is ``selective``.

    Raises:
        UsageError: the module does not look its attention function up.
    """
    if how != "selective":
        yield
        return
    unfit = UsageError(
        "Selective checkpointing can be traced in models of transformers that look their attention function up.",
        "Use --checkpointing full, or a smaller micro-batch.",
    )
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise unfit
    from transformers import AttentionInterface

    look_up, kwargs, times = AttentionInterface.get_interface, _kwargs(autocast), 0

    def looked_up(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal times
        times += 1
        return _again(look_up(self, *args, **named), kwargs, narrow=True)

    with mock.patch.object(AttentionInterface, "get_interface", looked_up):
        yield
    if not times:
        raise unfit


def _again(function: Callable[..., Any], kwargs: dict[str, Any], *, narrow: bool = False) -> Callable[..., Any]:
    """The function under checkpointing.

    `narrow`: without tensors that it takes no notice of; checkpointing would hold on to them.
    """
    taken = inspect.signature(function).parameters if narrow else {}

    def checkpointed(*args: Any, **named: Any) -> Any:
        if narrow:
            named = {name: x for name, x in named.items() if name in taken or not isinstance(x, torch.Tensor)}
        return checkpoint(function, *args, **kwargs, **named)

    return checkpointed


def _kwargs(autocast: CudaAutocast | None, saved: Sequence[Any] = ()) -> dict[str, Any]:
    """Arguments of torch.utils.checkpoint.checkpoint; what the operators in `saved` give is not computed again."""
    kwargs: dict[str, Any] = {"use_reentrant": False}  # what transformers defaults to
    if autocast is None and not saved:
        return kwargs

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        plain = (contextlib.nullcontext(), contextlib.nullcontext())
        first, again = _saving(list(saved)) if saved else plain
        return first, again if autocast is None else _both(autocast.region, again)

    kwargs["context_fn"] = contexts
    return kwargs


_saving: Any = create_selective_checkpoint_contexts  # torch leaves it untyped


@contextlib.contextmanager
def _both(region: Callable[[], AbstractContextManager[Any]], other: AbstractContextManager[Any]) -> Iterator[None]:
    with region(), other:
        yield
