"""Layers with a weight matrix.

What the recipe of the run says of each decides whether it is trained, how it is stored, and whether an adapter stands
beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.adapters import EMBEDDING, Base, adapted, adapted_embedding
from memplan.operators.elementwise import mul
from memplan.operators.int8 import int8_linear
from memplan.operators.products import project
from memplan.operators.quantised import quantised_linear
from memplan.specs.values import replace

if TYPE_CHECKING:
    from memplan.operators.tape import Tape, Tensor


def linear(
    t: Tape,
    x: Tensor,
    out_features: int,
    name: str,
    *,
    bias: bool = False,
    trainable: bool = True,
    makes_logits: bool = False,
) -> Tensor:
    """``nn.Linear`` named `name`: weight (out, in), optional bias.

    Keeps its input for the gradient of the weight and its weight for the gradient of the input; under autocast both in
    the low-precision dtype.  What makes logits is neither quantised nor among ``all-linear``.
    """
    in_features = x.shape[-1]
    assert isinstance(in_features, int)
    with t.scope(name):
        if not makes_logits and t.ask("quantises", t.module):
            return _quantised(t, x, out_features, bias=bias)
        weight = t.parameter("weight", (out_features, in_features), trainable=trainable)
        offset = t.parameter("bias", (out_features,), trainable=trainable) if bias else None
        y = project(t, x, weight, offset, out_features)
        return with_adapter(t, Base(x, y, weight, offset), makes_logits=makes_logits)


def conv1d(t: Tape, x: Tensor, out_features: int, name: str) -> Tensor:
    """GPT-2's ``Conv1D``: a linear layer whose weight is stored (in, out), with a bias."""
    in_features = x.shape[-1]
    assert isinstance(in_features, int)
    with t.scope(name):
        if t.ask("quantises", t.module):
            return _quantised(t, x, out_features, bias=True)
        weight = t.parameter("weight", (in_features, out_features))
        offset = t.parameter("bias", (out_features,))
        y = project(t, x, weight, offset, out_features)
        return with_adapter(t, Base(x, y, weight._replace(shape=(out_features, in_features)), offset))


def _quantised(t: Tape, x: Tensor, out_features: int, *, bias: bool) -> Tensor:
    made = int8_linear if t.recipe.quantize == "int8" else quantised_linear
    weight, offset, y = made(t, x, out_features, bias=bias)
    return with_adapter(t, Base(x, y, weight, offset, quantised=True))


def with_adapter(t: Tape, base: Base, *, makes_logits: bool = False) -> Tensor:
    """The result of the current linear layer, with its adapter's added where the recipe gives it one."""
    lora = t.recipe.lora
    if lora is None or not t.ask("adapts_named" if makes_logits else "adapts", t.module):
        return base.y
    return adapted(t, base, replace(lora, rank=t.ask("rank", t.module)))


def embedding(t: Tape, ids: Tensor, num_rows: int, width: int, name: str, *, scaled_by: Tensor | None = None) -> Tensor:
    """``nn.Embedding`` named `name`: keeps the ids; its gradient is dense, as large as the table.

    `scaled_by`: a number on the device that the module multiplies its result with.  The result of the first one, which
    is that of the tokens (``get_input_embeddings``), is made to require a gradient where the recipe says so.
    """
    is_first = not any(op.name == EMBEDDING for op in t.ops)
    with t.scope(name):
        table = t.parameter("weight", (num_rows, width), of_embedding=True)
        x = t.op(EMBEDDING, (ids, table), (*ids.shape, width), dtype=table.dtype, keeps=(ids,))
        if scaled_by is not None:
            x = mul(t, x, scaled_by)
        if t.recipe.lora is not None and t.ask("adapts_named", t.module):
            lora = replace(t.recipe.lora, rank=t.ask("rank", t.module))
            x = adapted_embedding(t, ids, table, x, lora, scaled_by=scaled_by)
        if is_first:
            t.embedded = x = t.require_gradient(x) if t.recipe.input_gradients else x
        return x
