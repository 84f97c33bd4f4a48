"""Routing operators: what each keeps, by hand.

Tokens go to 3 of their experts; b = 2, s = 5, so that there are 10 tokens and 30 rows.
"""

from __future__ import annotations

from memplan.operators.routing import grouped_product, normalise_in_place, pick, sort, sum_of_chosen, top_k
from memplan.operators.sizes import bind
from memplan.operators.tape import Numerics, Tape, Tensor

ENV = bind(2, 5)


def _tape(parameters: str = "bf16") -> Tape:
    return Tape(Numerics(parameters))


def _activation(t: Tape, *last: int, dtype: str = "bf16") -> Tensor:
    return t.external("x", ("b", "s", *last), dtype, role="hidden", requires_grad=True)


def _kept(t: Tape) -> list[int]:
    return [x.bytes.value(ENV) for x in t.ops[-1].keeps]


def test_top_k_keeps_positions() -> None:
    """30 of int64."""
    t = _tape()
    values, positions = top_k(t, _activation(t, 8, dtype="fp32"), 3)
    assert values.shape == positions.shape == ("b", "s", 3)
    assert (values.requires_grad, positions.requires_grad) == (True, False)
    assert _kept(t) == [240]


def test_sorting_numbers_keeps_nothing() -> None:
    t = _tape()
    _, positions = top_k(t, _activation(t, 8, dtype="fp32"), 3)
    ordered, order = sort(t, positions)
    assert _kept(t) == []
    assert (ordered.dtype, order.dtype) == ("int64", "int64")


def test_rows_that_are_picked() -> None:
    """30 rows of 16, 2 bytes each, and where they came from."""
    t = _tape()
    x = _activation(t, 16)
    order = t.op("order", (), ("b", "s", 3), dtype="int64")
    rows = pick(t, x, order, ("b", "s", 3, 16))
    assert rows.bytes.value(ENV) == 960
    assert _kept(t) == [240]
    assert [g.of.bytes.value(ENV) for g in t.ops[-1].gradients] == [320]


def test_dividing_by_the_sum_copies_what_it_overwrites() -> None:
    """30 weights of fp32 and 10 sums; the result lies where the weights did."""
    t = _tape()
    weights = _activation(t, 3, dtype="fp32")
    out = normalise_in_place(t, weights)
    assert out.storage == weights.storage
    assert _kept(t) == [120, 40]


def test_a_grouped_product_keeps_rows_weights_and_offsets() -> None:
    """2 FLOPs x 30 rows x 16 x 24, whatever the number of experts; weights of all 7."""
    t = _tape()
    rows = _activation(t, 3, 16)
    weight = t.parameter("gate_up_proj", (7, 24, 16))
    offsets = t.op("cumsum", (), (7,), dtype="int32")
    grouped_product(t, rows, weight, offsets, ("b", "s", 3, 24))
    assert _kept(t) == [960, 7 * 24 * 16 * 2, 28]
    assert t.ops[-1].flops.value(ENV) == 2 * 30 * 16 * 24


def test_a_frozen_weight_needs_no_rows() -> None:
    t = _tape()
    weight = t.parameter("gate_up_proj", (7, 24, 16), trainable=False)
    offsets = t.op("cumsum", (), (7,), dtype="int32")
    grouped_product(t, _activation(t, 3, 16), weight, offsets, ("b", "s", 3, 24))
    assert _kept(t) == [7 * 24 * 16 * 2, 28]


def test_autocast_leaves_a_grouped_product_alone() -> None:
    """GIVEN fp32 parameters under autocast, THEN the experts run in fp32."""
    t = Tape(Numerics("fp32", "bf16"))
    weight = t.parameter("gate_up_proj", (7, 24, 16))
    offsets = t.op("cumsum", (), (7,), dtype="int32")
    out = grouped_product(t, _activation(t, 3, 16), weight, offsets, ("b", "s", 3, 24))
    assert out.dtype == "fp32"


def test_the_sum_writes_its_gradient_for_every_expert() -> None:
    t = _tape()
    out = sum_of_chosen(t, _activation(t, 3, 16))
    assert out.shape == ("b", "s", 16)
    assert _kept(t) == []
    assert [g.of.bytes.value(ENV) for g in t.ops[-1].gradients if not g.alias] == [960]
