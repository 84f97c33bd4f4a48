"""Linear layers of few bits as transformers and bitsandbytes make them, on any device; what their products do on CUDA.

On the meta device there are no numbers to quantise: the packed weight and its constants are made with the shapes that
``quantize_4bit`` gives them.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from memplan.operators.quantised import BLOCK, BLOCK_OF_SCALES
from memplan.probes.faults import require
from memplan.specs.training import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from memplan.specs.training import Setup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantise(module: nn.Module, setup: Setup) -> nn.Module:
    """The model of transformers with quantised linear layers where the setup asks for them, in place.

    Raises:
        MissingLibraryError: bitsandbytes is not installed.
    """
    if setup.quantize is None:
        return module
    require("bitsandbytes")
    import bitsandbytes
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    parameters, autocast = PRECISIONS[setup.precision]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=setup.quantize == "nf4-double",
        bnb_4bit_compute_dtype=DTYPES[autocast or parameters],
    )
    before = dict(module.named_modules())
    replace_with_bnb_linear(module, get_keys_to_not_convert(module), config)
    for name, layer in module.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            _fill(layer, before[name])
    module.is_loaded_in_4bit = True  # type: ignore[assignment]
    return module


def _fill(layer: Any, plain: Any) -> None:
    """Give the quantised layer the weights of the plain one."""
    import bitsandbytes

    weight = plain.weight.detach()
    if type(plain).__name__ == "Conv1D":
        weight = weight.t()
    settings = {"compress_statistics": layer.weight.compress_statistics, "quant_type": layer.weight.quant_type}
    if weight.is_meta:
        packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        state = _state(weight, double=settings["compress_statistics"])
        layer.weight = bitsandbytes.nn.Params4bit(packed, quant_state=state, bnb_quantized=True, **settings)
    else:
        layer.weight = bitsandbytes.nn.Params4bit(weight.cpu().contiguous(), **settings).to(weight.device)
    layer.weight.module = layer
    if plain.bias is not None:
        layer.bias = torch.nn.Parameter(plain.bias.detach(), requires_grad=False)
    layer.compute_type_is_set = True


def _state(weight: torch.Tensor, *, double: bool) -> Any:
    """The constants of a weight without numbers."""
    from bitsandbytes.functional import QuantState

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=weight.device)

    blocks = -(-weight.numel() // BLOCK)
    scales, inner = empty(blocks), None
    if double:
        scales = empty(blocks, dtype=torch.uint8)
        inner = QuantState(
            absmax=empty(-(-blocks // BLOCK_OF_SCALES)),
            code=empty(256),
            blocksize=BLOCK_OF_SCALES,
            dtype=torch.float32,
        )
    return QuantState(
        absmax=scales,
        shape=weight.shape,
        code=empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=empty() if double else None,
        state2=inner,
    )


def constants(parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of what a quantised weight holds beside its packed numbers."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return
    yield "scales", state.absmax
    yield "table of numbers", state.code
    if state.nested:
        yield "mean of the scales", state.offset
        yield "scales of scales", state.state2.absmax
        yield "table of scales", state.state2.code


def num_elements(parameter: torch.Tensor) -> int:
    """Elements of a parameter, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


@contextlib.contextmanager
def cuda_products() -> Iterator[None]:
    """Products with 4-bit weights allocate on the meta device what ``_dequant_linear_fallback`` does on CUDA."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes  # noqa: F401
    except ImportError:
        yield
        return
    with mock.patch.object(torch.ops.bitsandbytes.gemm_4bit, "default", _gemm_4bit):
        yield


def _gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    shape: Sequence[int],
    scales: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    del packed, scales, blocksize, quant_type, absmax_code
    held = []
    if absmax_8bit is not None and absmax_offset is not None:
        held.append(torch.empty_like(absmax_8bit, dtype=torch.float32))
        held.append(held[0] + absmax_offset)
    weight = torch.empty(tuple(shape), dtype=x.dtype, device=x.device)
    return torch.nn.functional.linear(x, weight, bias)
