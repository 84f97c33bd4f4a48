"""Which kernel does scaled_dot_product_attention run on CUDA, and what does it allocate?

The meta device gets the generic choice; a stand-in makes CUDA's (select_sdp_backend in
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of PyTorch 2.13) or runs the kernel that it is told:

=========  ==========================================================================================================
flash      half precision without a mask, heads of up to 256, capability 8.0; not on 8.6, 8.9 and 12.x for heads of
           193 to 224, or larger ones with dropout
efficient  no grouped heads, heads of a multiple of 4 (half precision 8), capability 5.0, bf16 from 8.0
math       otherwise: products and softmax one by one, scores materialised
cudnn      only if told: CUDA builds differ in whether they prefer it on capability 9.0 and 10.0
=========  ==========================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.probes.autocast import CudaAutocast

aten = torch.ops.aten

HALF_DTYPES = (torch.float16, torch.bfloat16)
SDPA_KERNELS = ("flash", "efficient", "cudnn", "math")
DEFAULT_CAPABILITY = (8, 0)

RANDOM_STATES = {
    aten._scaled_dot_product_flash_attention.default: (6, 7),
    aten._scaled_dot_product_efficient_attention.default: (2, 3),
    aten._scaled_dot_product_cudnn_attention.default: (6, 7),
    aten._flash_attention_forward.default: (2, 3),
}
"""Operator -> which of its outputs hold the state of the random numbers (two scalars)."""


def choose_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    dropout: float = 0.0,
    capability: tuple[int, int] = DEFAULT_CAPABILITY,
) -> str:
    """The kernel that CUDA chooses: "flash", "efficient" or "math"."""
    if query.dim() != 4:
        return "math"
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    square = query.shape[-2] == key.shape[-2]
    flash = (
        query.dtype in HALF_DTYPES
        and mask is None
        and head_dim == key.shape[-1] == value_dim
        and (square or not is_causal)
        and _has_flash(head_dim, dropout, capability)
    )
    if flash:
        return "flash"
    return "efficient" if _has_efficient(query, key, value_dim, capability) else "math"


def _has_flash(head_dim: int, dropout: float, capability: tuple[int, int]) -> bool:
    """The card has the kernel (check_flash_attention_hardware_support), and memory enough for its backward pass."""
    if head_dim > 256 or capability < (8, 0):
        return False
    small = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    return not small or head_dim <= 192 or (head_dim > 224 and not dropout)


def _has_efficient(query: torch.Tensor, key: torch.Tensor, value_dim: int, capability: tuple[int, int]) -> bool:
    if capability < (8, 0) and query.dtype == torch.bfloat16:
        return False
    alignment = 8 if query.dtype in HALF_DTYPES else 4  # 128 bits of tensor-core operand: minimum_gemm_alignment
    grouped = query.shape[-3] != key.shape[-3]
    return not (grouped or query.shape[-1] % alignment or value_dim % alignment)


def cuda_attention(
    forced_kernel: str | None, capability: tuple[int, int] | None, autocast: CudaAutocast | None
) -> Callable[..., torch.Tensor]:
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
        kernel = forced_kernel or choose_kernel(
            query,
            key,
            value,
            attn_mask,
            is_causal=is_causal,
            dropout=dropout_p,
            capability=capability or DEFAULT_CAPABILITY,
        )
        if kernel == "flash":
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # convert_boolean_attn_mask
            attn_mask = torch.where(attn_mask, 0.0, _lowest(query))
        if kernel == "efficient":
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if kernel == "cudnn":
            keeps = torch.is_grad_enabled()
            fused = aten._scaled_dot_product_cudnn_attention
            return fused(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
        math = aten._scaled_dot_product_attention_math
        return math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]  # type: ignore[no-any-return]

    return scaled_dot_product_attention


def _lowest(query: torch.Tensor) -> torch.Tensor:
    return torch.full((), float("-inf"), dtype=query.dtype, device=query.device)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool, scale: float | None
) -> torch.Tensor:
    head_dim = query.shape[-1]
    padding = -head_dim % 8  # pad_last_dim<8>
    if padding:
        query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    output: torch.Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scale)[0]
    return output[..., :head_dim] if padding else output


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    dropout: float,
    causal: bool,
    scale: float | None,
    autocast: CudaAutocast | None = None,
) -> torch.Tensor:
    """The flash kernel on sequences that lie end to end: (1, heads, s, d) to (1, s, heads, d).

    As ``_flash_attention_forward`` of transformers (modeling_flash_attention_utils.py) calls flash_attn_varlen_func; a
    query in fp32 is cast to autocast's dtype before (``fa_peft_integration_check``).
    """
    head_dim, padding = query.shape[-1], -query.shape[-1] % 8
    q, k, v = (_lowered(x.transpose(1, 2), autocast) for x in (query, key, value))
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    output: torch.Tensor = aten._flash_attention_forward(q, k, v, *ends, *longest, dropout, causal, False, scale=scale)[
        0
    ]
    return (output[..., :head_dim] if padding else output)[None]


def _lowered(x: torch.Tensor, autocast: CudaAutocast | None) -> torch.Tensor:
    """`x` in autocast's dtype, on a real device that of PyTorch's own."""
    if autocast is not None and autocast.enabled:
        return autocast.lower(x)  # type: ignore[no-any-return]
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if device == "cuda" and torch.is_autocast_enabled(device) else x


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


# --- what the backward kernels allocate for themselves ----------------------------------------------------------------


def flash_backward_scratch(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> list[int]:
    """mha_bwd (flash_attn/flash_api.cpp): softmax_d, dq_accum, and for grouped heads the expanded dk and dv."""
    batch, heads, length, head_dim = query.shape
    length_rounded = -(-length // 128) * 128
    multiple = 32 if head_dim <= 128 else 64
    head_dim_rounded = -(-head_dim // multiple) * multiple
    softmax_d = batch * heads * length_rounded * 4
    expanded = batch * key.shape[2] * heads * head_dim * query.element_size() if key.shape[1] != heads else 0
    return [_copied(grad), softmax_d, softmax_d * head_dim_rounded, expanded, expanded]


def varlen_backward_scratch(
    _: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    ends: torch.Tensor,
    *rest: Any,
    **__: Any,
) -> list[int]:
    """mha_varlen_bwd (flash_attn/flash_api.cpp): the same for sequences end to end, with 128 rows more for each."""
    del value, out, logsumexp, rest
    length, heads, head_dim = query.shape
    rows = length + 128 * (ends.shape[0] - 1)
    multiple = 32 if head_dim <= 128 else 64
    softmax_d = heads * rows * 4
    expanded = key.shape[0] * heads * head_dim * query.element_size() if key.shape[1] != heads else 0
    return [softmax_d, softmax_d * (-(-head_dim // multiple) * multiple), expanded, expanded]


def efficient_backward_scratch(grad: torch.Tensor, query: torch.Tensor, *_: Any, **__: Any) -> list[int]:
    """_efficient_attention_backward (attention_backward.cu): delta, and an fp32 copy of one operand.

    Half precision accumulates dq in an fp32 workspace (kNeedsAccumGradQ); fp32 forms grad * out to sum it up to delta.
    """
    batch, heads, length, head_dim = query.shape
    delta = batch * heads * length * 4
    return [_copied(grad), delta, delta * head_dim]


def _copied(grad: torch.Tensor) -> int:
    return 0 if grad.transpose(1, 2).is_contiguous() else grad.numel() * grad.element_size()
