"""Adapters of parameters that no linear layer holds: the stacked matrices of experts, and a router's.

peft puts them in place of the parameter while the module runs (``torch.nn.utils.parametrize``):

    W' = W + scaling * B_e A_e   for every expert e          A: (rank * experts, in)    B: (out, rank * experts)

W' is as large as all experts together, is kept wherever its product keeps a matrix, and has a gradient of that size.
It is computed twice: once when it is registered, where its result is only looked at.

Sources: peft 0.21, tuners/lora/layer.py (``ParamWrapper``, ``_LoraFactorsProxy``, ``_LoraParameterProxy``); PyTorch
2.13, torch/nn/utils/parametrize.py (``ParametrizationList``), tools/autograd/derivatives.yaml (``baddbmm``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.elementwise import add, scale
from memplan.operators.products import matmul
from memplan.operators.sizes import count
from memplan.operators.tape import Gradient
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor


class Factors(NamedTuple):
    """What stands in for a parameter while its module runs."""

    weight: Tensor
    """(experts, out, in)."""
    left: Tensor
    """(experts, out, rank), in the dtype of the weight."""
    right: Tensor
    """(experts, rank, in)."""


def register(t: Tape, weight: Tensor) -> Factors | None:
    """The factors of the adapter of a stack of matrices, computed as its wrapper is entered; None without one.

    `weight`: (experts, out, in), named as the parameter within the current module.
    """
    name = t.storages[weight.storage].name
    path = f"{t.module}.{name}"
    if t.recipe.lora is None or not t.ask("adapts_parameter", path):
        return None
    rank, (num, out_features, in_features) = t.ask("rank", path), _three(weight)
    dtype = "fp32" if t.recipe.lora.dtype == "fp32" else t.numerics.parameters
    with t.scope(name):
        first = t.parameter("lora_A.weight", (rank * num, in_features), of_adapter=True, dtype=dtype)
        second = t.parameter("lora_B.weight", (out_features, rank * num), of_adapter=True, dtype=dtype)
        left = t.cast(t.view(second, (num, out_features, rank), copied_back=True), weight.dtype)
        right = t.cast(t.view(first, (num, rank, in_features)), weight.dtype)
        found = Factors(weight, left, right)
        _sum(t, found, looked_at=True)
    t.hold_in_module(left, right)
    return found


def adapted_stack(t: Tape, factors: Factors) -> Tensor:
    """W' as its product reads it; the module's cache of it holds it until the module has run."""
    found = _sum(t, factors)
    t.hold_in_module(found)
    return found


def _sum(t: Tape, f: Factors, *, looked_at: bool = False) -> Tensor:
    inputs = (f.left, f.right)
    if looked_at:
        inputs = (f.left._replace(requires_grad=False), f.right._replace(requires_grad=False))
    shape = f.weight.shape
    return t.op(
        "baddbmm",
        (f.weight, *inputs),
        shape,
        dtype=f.weight.dtype,
        keeps=() if looked_at else (f.left, f.right),
        gradients=() if looked_at else tuple(Gradient(x) for x in inputs if x.requires_grad),
        flops=count((*shape, f.left.shape[-1])).times(2),
        reason="a product keeps each factor for the gradient of the other",
    )


def adapted_matrix(t: Tape, weight: Tensor) -> Tensor:
    """The current module's parameter, (out, in), with its adapter's product added; itself without one."""
    name = t.storages[weight.storage].name
    path = f"{t.module}.{name}"
    if t.recipe.lora is None or not t.ask("adapts_parameter", path):
        return weight
    out_features, in_features = weight.shape
    assert isinstance(out_features, int)
    assert isinstance(in_features, int)
    rank = t.ask("rank", path)
    dtype = "fp32" if t.recipe.lora.dtype == "fp32" else t.numerics.parameters
    first = t.parameter("lora_A.weight", (rank, in_features), of_adapter=True, dtype=dtype)
    second = t.parameter("lora_B.weight", (out_features, rank), of_adapter=True, dtype=dtype)
    update = t.cast(scale(t, matmul(t, second, first, (out_features, in_features), rank)), weight.dtype)
    add(t, weight, update._replace(requires_grad=False))  # looked at as it is registered
    found = add(t, weight, update)
    t.hold_in_module(update, found)
    return found


def _three(weight: Tensor) -> tuple[int, int, int]:
    num, out_features, in_features = weight.shape
    assert isinstance(num, int)
    assert isinstance(out_features, int)
    assert isinstance(in_features, int)
    return num, out_features, in_features
