"""The grouped matrix product of experts on the meta device, in every dtype.

CUDA has it for fp32, bf16 and fp16 from capability 8.0 on (aten/src/ATen/native/cuda/GroupedBlas.cpp of PyTorch 2.13:
one kernel in bf16, a product after the other otherwise, all written into one output); its meta form is for bf16 alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it

if TYPE_CHECKING:
    from collections.abc import Callable


class _GroupedProduct(torch.autograd.Function):
    """(rows, in) with (groups, in, out) to (rows, out): keeps both, and where the groups end."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        keeps = (rows if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.save_for_backward(*keeps, ends)
        ctx.forms = (rows.shape, weight.shape, weight.stride())
        return rows.new_empty(rows.shape[0], weight.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _ = ctx.saved_tensors
        (grad,) = grads
        shape, *form = ctx.forms
        of_rows = grad.new_empty(shape) if ctx.needs_input_grad[0] else None
        of_weight = grad.new_empty_strided(*form) if ctx.needs_input_grad[1] else None
        return of_rows, of_weight, None


def cuda_grouped_mm() -> Callable[..., torch.Tensor]:
    """A stand-in for F.grouped_mm of rows in groups, ended by `offs`."""
    original = F.grouped_mm

    def grouped_mm(mat_a: torch.Tensor, mat_b: torch.Tensor, *, offs: Any = None, **rest: Any) -> torch.Tensor:
        if mat_a.dtype == torch.bfloat16 or mat_a.dim() != 2 or mat_b.dim() != 3:
            return original(mat_a, mat_b, offs=offs, **rest)
        return _GroupedProduct.apply(mat_a, mat_b, offs)  # type: ignore[no-any-return, no-untyped-call]

    return grouped_mm
