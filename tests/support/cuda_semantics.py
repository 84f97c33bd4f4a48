"""How does a model behave on the meta device if it is to allocate what CUDA would?

PyTorch chooses some kernels by device, and the meta device gets the generic choice. Inside `cuda_semantics()` these
choices are CUDA's:

* scaled_dot_product_attention runs the fused kernel that a CUDA device of compute capability 8.x would choose
  (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of PyTorch 2.13): flash for half precision without a mask,
  memory-efficient otherwise, the composite "math" form where neither applies (fp32 with grouped heads, odd head sizes);
* dropout runs native_dropout, which keeps a boolean mask (aten/src/ATen/native/Dropout.cpp);
* softmax of fp16 to fp32 is one kernel without a converted copy (aten/src/ATen/native/SoftMax.cpp);
* rms_norm is the fused kernel that keeps its input and one fp32 reciprocal root per row;
* the grouped matrix product of experts has a meta form in bf16 alone; otherwise that of transformers, which allocates
  the same, stands in for it;
* foreach and fused optimizer kernels count as available;
* autocast, which has no effect on meta tensors, follows the lists of aten/src/ATen/autocast_mode.h.

TRANSIENT_BYTES holds the buffers that a CUDA kernel allocates and frees before it returns, which no dispatch mode sees.
Not modelled: cuDNN attention (chosen on Hopper by CUDA 13 builds), cuBLAS workspaces, scratch space of reductions,
sorting and embedding gradients, deterministic algorithms.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it
from torch.overrides import TorchFunctionMode

from tests.support.storage_recorder import Transients, round_to_block

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterator

aten = torch.ops.aten

HALF_DTYPES = (torch.float16, torch.bfloat16)


# --- scaled_dot_product_attention ------------------------------------------------------------------------------------


def sdpa_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, is_causal: bool
) -> str:
    """The kernel that CUDA chooses: "flash", "efficient" or "math" (select_sdp_backend)."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    half = query.dtype in HALF_DTYPES
    grouped = query.shape[-3] != key.shape[-3]
    square = query.shape[-2] == key.shape[-2]
    if query.dim() != 4:
        return "math"
    if half and mask is None and head_dim == key.shape[-1] == value_dim <= 256 and (square or not is_causal):
        return "flash"
    alignment = 8 if half else 4  # 128 bits of tensor-core operand: minimum_gemm_alignment
    if grouped or head_dim % alignment or value_dim % alignment:
        return "math"
    return "efficient"


def cuda_sdpa(forced_kernel: str | None, autocast: CudaAutocast | None) -> Callable[..., torch.Tensor]:
    """A stand-in for F.scaled_dot_product_attention (aten/src/ATen/native/transformers/attention.cpp)."""

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if autocast is not None and autocast.enabled:
            query, key, value, attn_mask = (autocast.lower(x) for x in (query, key, value, attn_mask))
        kernel = forced_kernel or sdpa_kernel(query, key, value, attn_mask, is_causal=is_causal)
        if kernel == "flash":
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # convert_boolean_attn_mask
            attn_mask = torch.where(attn_mask, 0.0, torch.full((), float("-inf"), dtype=query.dtype, device="meta"))
        if kernel == "efficient":
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        output: torch.Tensor = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
        return output

    return scaled_dot_product_attention


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool, scale: float | None
) -> torch.Tensor:
    head_dim = query.shape[-1]
    padding = -head_dim % 8  # pad_last_dim<8>
    if padding:
        query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    output: torch.Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scale)[0]
    return output[..., :head_dim] if padding else output


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    if mask is not None:  # preprocess_mask: pad to 16 elements, slice, then broadcast without a copy
        length = mask.shape[-1]
        if length % 16:
            mask = F.pad(mask, (0, -length % 16))[..., :length]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    output: torch.Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, torch.is_grad_enabled(), dropout, causal, scale=scale
    )[0]
    return output


def flash_backward_bytes(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """mha_bwd (flash_attn/flash_api.cpp): softmax_d, dq_accum, and for grouped heads the expanded dk and dv."""
    batch, heads, length, head_dim = query.shape
    length_rounded = -(-length // 128) * 128
    multiple = 32 if head_dim <= 128 else 64
    head_dim_rounded = -(-head_dim // multiple) * multiple
    softmax_d = batch * heads * length_rounded * 4
    dq_accum = softmax_d * head_dim_rounded
    expanded = batch * key.shape[2] * heads * head_dim * query.element_size() if key.shape[1] != heads else 0
    copied = 0 if grad.transpose(1, 2).is_contiguous() else grad.numel() * grad.element_size()
    return sum(round_to_block(x) for x in (softmax_d, dq_accum, expanded, expanded, copied))


def efficient_backward_bytes(grad: torch.Tensor, query: torch.Tensor, *_: Any, **__: Any) -> int:
    """_efficient_attention_backward (attention_backward.cu): delta, and an fp32 copy of one operand.

    Half precision accumulates dq in an fp32 workspace (kNeedsAccumGradQ); fp32 forms grad * out to sum it up to delta.
    """
    batch, heads, length, head_dim = query.shape
    delta = batch * heads * length * 4
    copied = 0 if grad.transpose(1, 2).is_contiguous() else grad.numel() * grad.element_size()
    return sum(round_to_block(x) for x in (delta, delta * head_dim, copied))


def softmax_backward_bytes(grad: torch.Tensor, output: torch.Tensor, *_: Any, **__: Any) -> int:
    """softmax_backward_cuda_out (SoftMax.cu): the product of gradient and result (log-softmax needs none)."""
    return round_to_block(grad.numel() * max(grad.element_size(), output.element_size()))


TRANSIENT_BYTES: Transients = {
    aten._softmax_backward_data.default: softmax_backward_bytes,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward_bytes,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward_bytes,
}

SDPA_RANDOM_STATES = {
    aten._scaled_dot_product_flash_attention.default: (6, 7),
    aten._scaled_dot_product_efficient_attention.default: (2, 3),
}
"""Operator -> which of its outputs hold the state of the random numbers (two scalars)."""


# --- the other kernels -----------------------------------------------------------------------------------------------


def cuda_dropout(
    input: torch.Tensor,  # noqa: A002 - the name that callers use
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """F.dropout: native_dropout keeps a boolean mask; the in-place form keeps noise in the dtype of its input."""
    if not training or p == 0.0:
        return input
    if inplace:
        return input.mul_(torch.empty_like(input).bernoulli_(1 - p).div_(1 - p))
    return torch.native_dropout(input, p, True)[0]


def cuda_softmax(autocast: CudaAutocast | None, log: bool) -> Callable[..., torch.Tensor]:
    """F.softmax and F.log_softmax: from fp16 to fp32 in one kernel; under autocast the result is fp32."""
    fused = aten._log_softmax if log else aten._softmax

    def softmax(
        input: torch.Tensor,  # noqa: A002 - the name that callers use
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if dim is None:
            raise ValueError("softmax without a dimension is deprecated and not modelled here")
        if autocast is not None and autocast.enabled and input.is_floating_point():
            dtype = dtype or torch.float32
        if input.dtype == torch.float16 and dtype == torch.float32:
            return fused(input, dim, True)  # type: ignore[no-any-return]
        return fused(input if dtype is None else input.to(dtype), dim, False)  # type: ignore[no-any-return]

    return softmax


def cuda_rms_norm(
    input: torch.Tensor,  # noqa: A002 - the name that callers use
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """F.rms_norm: the fused kernel."""
    return aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]  # type: ignore[no-any-return]


def cuda_foreach_norm(tensors: list[torch.Tensor], *_: Any, **__: Any) -> list[torch.Tensor]:
    """_foreach_norm: one tensor of all the norms, of which the results are views (ForeachReduceOp.cu)."""
    norms = torch.empty(len(tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    return list(norms.unbind())


# --- autocast --------------------------------------------------------------------------------------------------------


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
    "cross_entropy normalize norm"
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


# --- all of it -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cuda_semantics(*, autocast: CudaAutocast | None = None, sdpa_kernel: str | None = None) -> Iterator[None]:
    """Make the meta device choose kernels as CUDA does; `sdpa_kernel` overrules the choice for attention."""

    def maybe_autocast(device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> Any:
        return autocast.switched(enabled) if autocast is not None and autocast.enabled else contextlib.nullcontext()

    def can_use_grouped_mm(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:  # noqa: A002
        return weight.dtype == torch.bfloat16

    devices = ["cuda", "meta"]
    softmax, log_softmax = cuda_softmax(autocast, log=False), cuda_softmax(autocast, log=True)
    patches: list[contextlib.AbstractContextManager[Any]] = [
        mock.patch.object(F, "scaled_dot_product_attention", cuda_sdpa(sdpa_kernel, autocast)),
        mock.patch.object(F, "dropout", cuda_dropout),
        mock.patch.object(F, "softmax", softmax),
        mock.patch.object(F, "log_softmax", log_softmax),
        mock.patch.object(F, "rms_norm", cuda_rms_norm),
        mock.patch.object(torch, "_foreach_norm", cuda_foreach_norm),
        mock.patch("transformers.integrations.moe._can_use_grouped_mm", can_use_grouped_mm),
        mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: devices),
        mock.patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: devices),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: devices),
        *(mock.patch.object(module, "maybe_autocast", maybe_autocast) for module in _modules_with("maybe_autocast")),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _modules_with(name: str) -> list[types.ModuleType]:
    """The loaded transformers modules that have imported `name`."""
    return [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("transformers.") and name in getattr(module, "__dict__", {})
    ]
