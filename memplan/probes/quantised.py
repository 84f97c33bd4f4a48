"""Linear layers of few bits as transformers and bitsandbytes make them, on any device; what their products do on CUDA.

On the meta device there are no numbers to quantise: the packed weight and its constants are made with the shapes that
``quantize_4bit`` gives them.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from memplan.operators.quantised import BLOCK, BLOCK_OF_SCALES
from memplan.probes.faults import require
from memplan.specs.adapter import CLASSIFIER_HEADS
from memplan.specs.training import CLASSIFICATIONS, PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from memplan.specs.training import Setup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantise(module: nn.Module, setup: Setup) -> nn.Module:
    """The model of transformers with quantised linear layers where the setup asks for them, in place.

    The head of a classifier is left as it is, which has to be said (``llm_int8_skip_modules``): left to itself
    transformers 5.23 quantises one that has a bias, and peft then cannot copy it.

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
    in_8_bits = setup.quantize == "int8"
    config = BitsAndBytesConfig(
        load_in_4bit=not in_8_bits,
        load_in_8bit=in_8_bits,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=setup.quantize == "nf4-double",
        bnb_4bit_compute_dtype=DTYPES[autocast or parameters],
    )
    before = dict(module.named_modules())
    heads = setup.objective in CLASSIFICATIONS
    kept = [*(CLASSIFIER_HEADS if heads else get_keys_to_not_convert(module))]
    kept += getattr(module, "_keep_in_fp32_modules", None) or ()
    replace_with_bnb_linear(module, kept, config)
    for name, layer in module.named_modules():
        if isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            _fill(layer, before[name])
    setattr(module, "is_loaded_in_8bit" if in_8_bits else "is_loaded_in_4bit", True)
    return module


def _fill(layer: Any, plain: Any) -> None:
    """Give the quantised layer the weights of the plain one."""
    import bitsandbytes

    weight = plain.weight.detach()
    if type(plain).__name__ == "Conv1D":
        weight = weight.t()
    if plain.bias is not None:
        layer.bias = torch.nn.Parameter(plain.bias.detach(), requires_grad=False)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        layer.weight = _in_8_bits(weight)
        return
    settings = {"compress_statistics": layer.weight.compress_statistics, "quant_type": layer.weight.quant_type}
    if weight.is_meta:
        packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        state = _state(weight, double=settings["compress_statistics"])
        layer.weight = bitsandbytes.nn.Params4bit(packed, quant_state=state, bnb_quantized=True, **settings)
    else:
        layer.weight = bitsandbytes.nn.Params4bit(weight.cpu().contiguous(), **settings).to(weight.device)
    layer.weight.module = layer
    layer.compute_type_is_set = True


def _in_8_bits(weight: torch.Tensor) -> Any:
    import bitsandbytes

    if not weight.is_meta:
        return bitsandbytes.nn.Int8Params(weight.cpu().contiguous(), requires_grad=False).to(weight.device)
    packed = torch.empty(weight.shape, dtype=torch.int8, device="meta")
    scales = torch.empty(weight.shape[0], device="meta")
    return bitsandbytes.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)


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
    if getattr(parameter, "SCB", None) is not None:
        yield "scales", parameter.SCB  # type: ignore[attr-defined]
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
    """Products with weights of few bits allocate on the meta device what they do on CUDA.

    4 bits: ``_dequant_linear_fallback``; 8 bits: without outliers, of which nothing is known without numbers.
    """
    if "bitsandbytes" not in sys.modules:  # then there are none
        yield
        return
    own = torch.ops.bitsandbytes
    with (
        mock.patch.object(own.gemm_4bit, "default", _gemm_4bit),
        mock.patch.object(own.int8_vectorwise_quant, "default", _int8_vectorwise_quant),
        mock.patch.object(own, "int8_mixed_scaled_mm", _int8_mixed_scaled_mm),
    ):
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


def _int8_vectorwise_quant(x: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, None]:
    scales = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)
    rows = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    outliers = x.abs() >= threshold
    del outliers
    return rows, scales, None


def _int8_mixed_scaled_mm(
    x: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, None]:
    del others
    shape = (*rows.shape[:-1], weight.shape[0])
    sums = torch.empty(shape, dtype=torch.int32, device=x.device)
    scaled = torch.empty_like(sums, dtype=torch.float16)
    return scaled.to(x.dtype), None
