"""torch.autocast for CUDA on meta tensors, where autocast has no effect: CUDA's lists of operators, applied by name.

Source: aten/src/ATen/autocast_mode.h and autocast_mode.cpp of PyTorch 2.13.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER_PRECISION = _names(
    "conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution prelu "
    "addmm addmv addr matmul einsum mm mv linalg_vecdot vecdot linear addbmm baddbmm bmm chain_matmul multi_dot "
    "__matmul__ __rmatmul__"
)
FULL_PRECISION = _names(
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ __rdiv__ "
    "__rtruediv__ softplus layer_norm native_layer_norm rms_norm group_norm cosine_similarity poisson_nll_loss "
    "cosine_embedding_loss nll_loss nll_loss_nd hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss "
    "margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss "
    "binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp interpolate "
    "cross_entropy normalize norm square"
)
"""Functions that run in fp32. The last line holds composites whose inner operators are on the list."""

FULL_PRECISION_RESULT = _names("prod softmax log_softmax cumprod cumsum vector_norm matrix_norm sum")
"""Functions given dtype=torch.float32 unless the caller names a dtype."""

PROMOTE = _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add")
"""Functions that run in the widest dtype among their inputs."""


class CudaAutocast(TorchFunctionMode):
    """torch.autocast("cuda", dtype) for meta tensors, with its cache of lowered leaf parameters.

    The cache lives until the outermost region ends (torch/amp/autocast_mode.py, __exit__), and the copies of weights
    that autograd has kept for the backward pass live on with the graph.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.enabled = False
        self._depth = 0
        self._cache: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """Like ``with torch.autocast("cuda", dtype)``."""
        self._depth += 1
        try:
            with self.switched(True), self:
                yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._cache.clear()

    @contextlib.contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """On or off for a while, inside a region."""
        previous, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = previous

    def lower(self, value: Any) -> Any:
        """cached_cast to the lower precision (aten/src/ATen/autocast_mode.cpp)."""
        if not _is_castable(value) or value.dtype == self.dtype:
            return value
        if value.dtype != torch.float32 or not (value.requires_grad and value.is_leaf) or value._is_view():
            return value.to(self.dtype)
        if id(value) not in self._cache:
            self._cache[id(value)] = value.to(self.dtype)
        return self._cache[id(value)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Cast what the lists say, then call."""
        kwargs = kwargs or {}
        if self.enabled:
            args, kwargs = self._cast(getattr(func, "__name__", ""), args, kwargs)
        return func(*args, **kwargs)

    def _cast(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if name in LOWER_PRECISION:
            return _map(self.lower, args, kwargs)
        if name in FULL_PRECISION:
            return _map(lambda x: x.float() if _is_castable(x) else x, args, kwargs)
        if name in FULL_PRECISION_RESULT and args and _is_castable(args[0]) and kwargs.get("dtype") is None:
            return args, {**kwargs, "dtype": torch.float32}
        if name in PROMOTE:
            floats = [x.dtype for x in (*args, *kwargs.values()) if _is_castable(x)]
            if torch.float32 in floats:
                return _map(lambda x: x.float() if _is_castable(x) else x, args, kwargs)
        return args, kwargs


def _is_castable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _map(cast: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    def apply(value: Any) -> Any:
        return type(value)(cast(x) for x in value) if type(value) in (tuple, list) else cast(value)

    return tuple(apply(x) for x in args), {name: apply(x) for name, x in kwargs.items()}
