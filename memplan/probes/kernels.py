"""Kernels that CUDA runs and the meta device does not.

* dropout keeps a boolean mask (aten/src/ATen/native/Dropout.cpp);
* softmax of fp16 to fp32 is one kernel without a converted copy (aten/src/ATen/native/SoftMax.cpp);
* rms_norm is the fused kernel that keeps its input and one fp32 reciprocal root per row;
* norms of many tensors at once are views of one (aten/src/ATen/native/cuda/ForeachReduceOp.cu).

`SCRATCH_BY_OPERATOR` holds the buffers that a CUDA kernel allocates and frees before it returns, which no dispatch mode
sees.  Not modelled: cuBLAS and cuDNN workspaces, scratch space of reductions, sorting and embedding gradients,
deterministic algorithms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memplan.probes.attention import efficient_backward_scratch, flash_backward_scratch, varlen_backward_scratch

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.probes.autocast import CudaAutocast
    from memplan.probes.recorder import Scratch

aten = torch.ops.aten


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
        if dim is None:  # _get_softmax_dim
            dim = 0 if input.dim() in {0, 1, 3} else 1
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
    """torch._foreach_norm: one tensor of all the norms, of which the results are views."""
    norms = torch.empty(len(tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    return list(norms.unbind())


def softmax_backward_scratch(grad: torch.Tensor, output: torch.Tensor, *_: Any, **__: Any) -> list[int]:
    """softmax_backward_cuda_out (SoftMax.cu): the product of gradient and result (log-softmax needs none)."""
    return [grad.numel() * max(grad.element_size(), output.element_size())]


def safe_softmax_scratch(scores: torch.Tensor, *_: Any, **__: Any) -> list[int]:
    """_safe_softmax (aten/src/ATen/native/transformers/attention.cpp): the softmax, and which scores are masked out."""
    return [scores.numel() * scores.element_size(), scores.numel()]


def logsumexp_scratch(x: torch.Tensor, dim: list[int], *_: Any, **__: Any) -> list[int]:
    """logsumexp_out_impl (aten/src/ATen/native/ReduceOps.cpp): the largest numbers, and the differences to them."""
    whole, reduced = x.numel() * x.element_size(), 1
    for one in dim:
        reduced *= x.shape[one]
    return [whole // max(reduced, 1), whole]


SCRATCH_BY_OPERATOR: Scratch = {
    aten.logsumexp.default: logsumexp_scratch,
    aten._safe_softmax.default: safe_softmax_scratch,
    aten._softmax_backward_data.default: softmax_backward_scratch,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward_scratch,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward_scratch,
    aten._flash_attention_backward.default: varlen_backward_scratch,
}
