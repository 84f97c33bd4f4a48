"""How does a model behave on the meta device if it is to allocate what CUDA would?

PyTorch chooses some kernels by device.  Inside `cuda_semantics()` these choices are CUDA's: attention (see
`attention`), dropout, softmax and norms (see `kernels`), the grouped product of experts (see `grouped`), foreach and
fused optimizers, which count as available, and autocast.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it

from memplan.probes import attention as kernels
from memplan.probes.attention import cuda_attention, varlen_attention
from memplan.probes.grouped import cuda_grouped_mm
from memplan.probes.kernels import cuda_dropout, cuda_foreach_norm, cuda_rms_norm, cuda_softmax
from memplan.probes.quantised import cuda_products

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator

    from memplan.probes.autocast import CudaAutocast

DEVICES = ["cuda", "meta"]


@contextlib.contextmanager
def cuda_semantics(
    *,
    autocast: CudaAutocast | None = None,
    sdpa_kernel: str | None = None,
    compute_capability: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Make the meta device choose kernels as CUDA does; `sdpa_kernel` overrules the choice for attention."""
    attention = cuda_attention(sdpa_kernel, compute_capability, autocast)
    softmax, log_softmax = cuda_softmax(autocast, log=False), cuda_softmax(autocast, log=True)
    patches: list[contextlib.AbstractContextManager[Any]] = [
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(kernels, "varlen_attention", partial(varlen_attention, autocast=autocast)),
        mock.patch.object(F, "dropout", cuda_dropout),
        mock.patch.object(F, "grouped_mm", cuda_grouped_mm()),
        mock.patch.object(F, "softmax", softmax),
        mock.patch.object(F, "log_softmax", log_softmax),
        mock.patch.object(F, "rms_norm", cuda_rms_norm),
        mock.patch.object(torch, "_foreach_norm", cuda_foreach_norm),
        mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: DEVICES),
        mock.patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: DEVICES),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: DEVICES),
        *_patches_of_transformers(autocast),
        *_patches_of_torch(autocast),
        cuda_products(),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _patches_of_torch(autocast: CudaAutocast | None) -> list[contextlib.AbstractContextManager[Any]]:
    """Peft asks whether CUDA's autocast is on, by the call without arguments, and switches it off by device."""
    switch: Any = torch.autocast

    def region(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
        if device_type != "meta":
            return switch(device_type, *args, enabled=enabled, **kwargs)
        return autocast.switched(enabled) if autocast is not None and autocast.enabled else contextlib.nullcontext()

    regions = mock.patch.object(torch, "autocast", region)
    if autocast is None:
        return [regions]
    ask = torch.is_autocast_enabled

    def is_autocast_enabled(*device_type: str) -> bool:
        return ask(*device_type) if device_type else autocast.enabled

    return [regions, mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled)]


def _patches_of_transformers(autocast: CudaAutocast | None) -> list[contextlib.AbstractContextManager[Any]]:
    """Those of a transformers that is loaded; it looks at devices in places of its own."""

    def maybe_autocast(device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> Any:
        return autocast.switched(enabled) if autocast is not None and autocast.enabled else contextlib.nullcontext()

    name = "maybe_autocast"
    return [mock.patch.object(module, name, maybe_autocast) for module in _modules_with(name)]


def _modules_with(name: str) -> list[types.ModuleType]:
    """The loaded transformers modules that have defined or imported `name`."""
    return [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("transformers.") and name in getattr(module, "__dict__", {})
    ]
