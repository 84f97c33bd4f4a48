"""How does the gradient of a shared parameter wait in the head for that of the stem?

Autograd's engine adds a gradient in place to one that nothing else holds (``can_accumulate_inplace`` in
torch/csrc/autograd/input_buffer.cpp).  A linear layer's is a transposed view of a product, which its base holds, so
that the sum is a new tensor; a cast of it, a sum of several, and what a function of its own returns are tensors that
nobody else holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.operators.fused_losses import CHUNK_TOKENS, CHUNKS
from memplan.operators.sizes import no_more_than

if TYPE_CHECKING:
    from memplan.operators.sizes import Shape
    from memplan.operators.tape import Tape

Waiting = frozenset[tuple[str, "Shape | None"]]
"""(parameter, dimensions that are 1 where the sum is a new tensor; none: always; None: never)."""


def waiting(head: Tape, stem: Tape) -> Waiting:
    """The parameters that both have."""
    shared = {p.name for p in head.parameters} & {p.name for p in stem.parameters}
    return frozenset((p.name, _new_where(head, p.storage, p.dtype)) for p in head.parameters if p.name in shared)


def _new_where(head: Tape, storage: int, dtype: str) -> Shape | None:
    givers = [op for op in head.ops if any(g.of.storage == storage for g in op.gradients)]
    if len(givers) != 1:
        return None
    op = givers[0]
    if op.name == "linear":
        return ()
    if op.name == CHUNKS and op.loop is not None and op.loop.dtype == (dtype or head.numerics.parameters):
        return (no_more_than("n", CHUNK_TOKENS),)
    return None
