"""Mixtures of experts: a router sends each token through the k of E gated MLPs that it scores highest.

    p = softmax(router(x));  y = sum over the k largest p_e of  p_e * down_e(act(gate_e(x)) * up_e(x))

Modelled after transformers 5.23, integrations/moe.py, ``grouped_mm_experts_forward``: what runs unless another
``experts_implementation`` is asked for, in every dtype.  Rows are sorted by expert, one grouped product serves all
experts, and the results are put back in order and added up.  There are tokens x k rows however evenly the router
spreads them, so that routing imbalance changes no tensor on one GPU: it changes how long the groups of the product are.

What is kept of a token: k * (2h + 4 ffn) numbers, and for each of the k four int64 that say where its row went.

Left out: the other implementations (``eager`` goes expert by expert, with tensors as long as the expert is popular),
and expert parallelism, where the rank of the most popular experts holds more rows than the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.attention import softmax
from memplan.operators.elementwise import (
    ACTIVATION_BY_NAME,
    add_in_place,
    add_scalar,
    clamp,
    keeps_result,
    mul,
    scale,
)
from memplan.operators.fused_adapters import Factors, adapted_matrix, adapted_stack, register
from memplan.operators.layout import split, take
from memplan.operators.products import project
from memplan.operators.routing import grouped_product, normalise_in_place, pick, sort, sum_of_chosen, top_k
from memplan.specs.values import NamedTuple, dataclass

if TYPE_CHECKING:
    from memplan.architectures.config import Config
    from memplan.operators.tape import Tape, Tensor

OTHERWISE = (
    (
        "experts one by one, or on several GPUs",
        'with experts_implementation="eager" or expert parallelism the most popular expert makes the peak; with '
        "grouped_mm, transformers' default, uneven routing changes no tensor",
    ),
)
"""Where the balance of the router matters, for the list of what the numbers leave out."""


def spoken_of(config: Config) -> tuple[tuple[str, str], ...]:
    """(what, why) that answers about a model with experts have to say."""
    found: tuple[tuple[str, str], ...] = OTHERWISE
    if config.flag("output_router_logits", default=False):
        found += (("the load-balancing loss", "output_router_logits keeps the router's scores of all layers for it"),)
    if config.has("quantization_config"):
        method = config.part("quantization_config").text("quant_method")
        found += (
            (
                f"{method} weights",
                "the published weights are quantised, which cannot be trained in full; they are counted in the dtype "
                "of --precision, as dequantize=True loads them",
            ),
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The numbers of a layer of experts."""

    num: int
    chosen: int
    """How many of them each token goes through."""
    width: int
    """Of each expert's MLP."""
    activation: str
    normalised: bool = False
    """The chosen probabilities are divided by their sum."""
    biased: bool = False
    """Both products have biases."""
    transposed: bool = False
    """Weights are (experts, in, out) instead of (experts, out, in)."""
    clamped: bool = False
    """Gate and up are clamped, and take turns in the joint projection (gpt-oss)."""


def router(t: Tape, x: Tensor, e: Experts, name: str = "gate", *, cast_back: bool = True) -> tuple[Tensor, Tensor]:
    """Weights and int64 numbers of the experts of each token, both (b, s, k): softmax in fp32, then the largest k.

    `cast_back`: the weights are handed on in the dtype of the scores, else in fp32.
    """
    hidden = x.shape[-1]
    assert isinstance(hidden, int)
    with t.scope(name):
        logits = project(t, x, adapted_matrix(t, t.parameter("weight", (e.num, hidden))), None, e.num)
        probabilities = softmax(t, logits, dtype="fp32") if cast_back else softmax(t, t.cast(logits, "fp32"))
        weights, numbers = top_k(t, probabilities, e.chosen)
        if e.normalised:
            weights = normalise_in_place(t, weights)
        if cast_back:
            weights = t.cast(weights, logits.dtype)
        t.hold_in_module(logits, probabilities, weights, numbers)
    t.hold_in_module(logits, weights, numbers)
    return weights, numbers


def experts(t: Tape, x: Tensor, weights: Tensor, numbers: Tensor, e: Experts) -> Tensor:
    """Every token through its experts: (b, s, h) to (b, s, h)."""
    b, s, hidden = x.shape
    assert isinstance(hidden, int)
    with t.scope("experts"):
        down, both_weights = _weights(t, e, hidden)
        groups = _sorted_by_expert(t, numbers, e)
        order = groups.order
        rows = pick(t, x, t.op("floor_divide", (order,), order.shape), (b, s, e.chosen, hidden))
        factors = pick(t, weights, order, order.shape)
        t.hold_in_module(rows, factors)
        both, bias = _projected(t, rows, groups, e, both_weights, 2 * e.width)
        inner = clamped_gate(t, both, e) if e.clamped else gated(t, both, e)
        out, bias = _projected(t, inner, groups, e, down, hidden, held=bias)
        weighted = mul(t, out, t.view(factors, (*factors.shape, 1)))
        t.hold_in_module(out, *bias)
        back = pick(t, weighted, _inverse(t, order), weighted.shape)
        t.hold_in_module(back)
        summed = sum_of_chosen(t, back)
        t.hold_in_module(summed)
        return t.cast(summed, x.dtype)


class _Stack(NamedTuple):
    """The matrices of all experts for one product."""

    name: str
    weight: Tensor
    factors: Factors | None
    """Of the adapter beside them."""


def _weights(t: Tape, e: Experts, hidden: int) -> tuple[_Stack, _Stack]:
    """Down, and gate and up together: in the order in which peft's wrappers are entered."""
    found = []
    for name, inside, width in (("gate_up_proj", hidden, 2 * e.width), ("down_proj", e.width, hidden)):
        weight = t.parameter(name, (e.num, inside, width) if e.transposed else (e.num, width, inside))
        found.append((name, weight))
    both, down = found
    return _Stack(*down, register(t, down[1])), _Stack(*both, register(t, both[1]))


class _Groups(NamedTuple):
    """The rows in the order of their experts."""

    numbers: Tensor
    """The expert of each row, (b, s, k)."""
    order: Tensor
    """Where each row comes from."""
    offsets: Tensor
    """Where each expert's rows end."""


def _projected(
    t: Tape, rows: Tensor, groups: _Groups, e: Experts, stack: _Stack, width: int, *, held: tuple[Tensor, ...] = ()
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`rows` times the matrix of their expert, and the bias of every row, where there is one; `held` until that is."""
    shape = (*rows.shape[:-1], width)
    weight = stack.weight if stack.factors is None else adapted_stack(t, stack.factors)
    if not e.biased:
        return grouped_product(t, rows, weight, groups.offsets, shape), ()
    bias = pick(t, t.parameter(f"{stack.name}_bias", (e.num, width)), groups.numbers, shape)
    t.keep_alive(*held)
    return add_in_place(t, grouped_product(t, rows, weight, groups.offsets, shape), bias), (bias,)


def _sorted_by_expert(t: Tape, numbers: Tensor, e: Experts) -> _Groups:
    ordered, order = sort(t, numbers)
    as_int = t.op("to", (ordered,), ordered.shape, dtype="int32")
    counts = t.op("histc", (as_int,), (e.num,))
    offsets = t.op("cumsum", (counts,), (e.num,))
    t.hold_in_module(ordered, order, as_int, counts, offsets)
    return _Groups(ordered, order, offsets)


def _inverse(t: Tape, order: Tensor) -> Tensor:
    """Where each row was before it was sorted."""
    inverse = t.op("empty_like", (order,), order.shape)
    arange = t.op("arange", (), order.shape, dtype="int64")
    t.keep_alive(arange)
    t.hold_in_module(inverse)
    return inverse


def gated(t: Tape, gate_and_up: Tensor, e: Experts) -> Tensor:
    """``act(gate) * up`` of one joint projection."""
    half = (*gate_and_up.shape[:-1], e.width)
    gate, up = split(t, gate_and_up, (half, half))
    with t.scope("act_fn"):
        bent = ACTIVATION_BY_NAME[e.activation](t, gate)
    return mul(t, bent, up)


def clamped_gate(t: Tape, gate_and_up: Tensor, e: Experts) -> Tensor:
    """``(clamp(up) + 1) * gate * sigmoid(1.702 * gate)`` of a clamped gate (``GptOssExperts._apply_gate``)."""
    half = (*gate_and_up.shape[:-1], e.width)
    gate, up = take(t, gate_and_up, half), take(t, gate_and_up, half)
    gate, up = clamp(t, gate, sides=1), clamp(t, up, sides=2)
    bent = mul(t, gate, keeps_result(t, "sigmoid", scale(t, gate)))
    out = mul(t, add_scalar(t, up), bent)
    t.keep_alive(gate_and_up, gate, up)
    return out
