"""Normalisation layers, by implementation: the same mathematics keeps very different amounts."""

from __future__ import annotations

from memplan.operators.elementwise import add_scalar, keeps_result, mul, power, sub
from memplan.operators.tape import Tape, Tensor, elements


def mean_last(t: Tape, x: Tensor) -> Tensor:
    """``x.mean(-1, keepdim=True)``: keeps nothing; the backward spreads the gradient to the full size."""
    return t.op("mean", (x,), (*x.shape[:-1], 1), flops=elements(x))


def rms_norm(t: Tape, x: Tensor, name: str, *, gain_in_fp32: bool = False, one_plus: bool = False) -> Tensor:
    """RMS norm written out in Python operators, as ``LlamaRMSNorm`` of transformers runs it.

    x32 = x.float(); y = x32 * rsqrt(mean(x32**2) + eps); weight * y.to(dtype)

    Keeps x in fp32 (twice over the same storage: power and product), rsqrt (4 bytes a token) and y in the dtype of x.
    With `gain_in_fp32` the weight multiplies before the cast (``OlmoRMSNorm``-like); with `one_plus` the gain is
    ``1 + weight`` in fp32 (Gemma).
    """
    width = x.shape[-1]
    assert isinstance(width, int)
    with t.scope(name):
        weight = t.parameter("weight", (width,))
        x32 = t.cast(x, "fp32")
        variance = mean_last(t, power(t, x32))
        y = mul(t, x32, keeps_result(t, "rsqrt", add_scalar(t, variance)))
        if one_plus:  # without variables
            return t.cast(mul(t, y, add_scalar(t, t.cast(weight, "fp32"))), x.dtype)
        t.hold_in_module(variance, y)
        if gain_in_fp32:
            return t.cast(mul(t, weight, y), x.dtype)
        return mul(t, weight, t.cast(y, x.dtype))


def written_out_layer_norm(t: Tape, x: Tensor, name: str, *, weight_shape: tuple[int, ...] | None = None) -> Tensor:
    """LayerNorm without bias written out in Python operators in fp32, as ``CohereLayerNorm`` runs it.

    x32 = x.float(); m = mean(x32); y = (x32 - m) * rsqrt(mean((x32 - m)**2) + eps); (weight.float() * y).to(dtype)

    Keeps x32 - m twice (it is computed twice), rsqrt (4 bytes a token), y, and the weight in fp32.
    """
    width = x.shape[-1]
    assert isinstance(width, int)
    with t.scope(name):
        weight = t.parameter("weight", weight_shape or (width,))
        x32 = t.cast(x, "fp32")
        mean = mean_last(t, x32)
        variance = add_scalar(t, mean_last(t, power(t, sub(t, x32, mean))))
        y = mul(t, sub(t, x32, mean), keeps_result(t, "rsqrt", variance))
        gain = t.cast(weight, "fp32")
        out = t.cast(mul(t, gain, y), x.dtype)
        t.keep_alive(mean)
        return out


def layer_norm(t: Tape, x: Tensor, name: str, *, bias: bool = True, affine: bool = True) -> Tensor:
    """``nn.LayerNorm``, fused: keeps its input and, in fp32, the mean and the reciprocal deviation of each row."""
    width = x.shape[-1]
    assert isinstance(width, int)
    with t.scope(name):
        x = t.autocast_fp32(x)
        inputs = [x]
        if affine:
            inputs.append(t.autocast_fp32(t.parameter("weight", (width,))))
            if bias:
                inputs.append(t.autocast_fp32(t.parameter("bias", (width,))))
        rows = (*x.shape[:-1], 1)
        return t.op(
            "layer_norm",
            inputs,
            x.shape,
            keeps=inputs,
            extra_outputs=(("mean", rows, "fp32"), ("rstd", rows, "fp32")),
            flops=elements(x).times(8),
            reason="the derivative of a normalisation needs its input and the statistics of each row",
        )
