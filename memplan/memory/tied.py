"""How does the gradient of a shared parameter wait in the head for that of the stem?

Autograd's engine adds a gradient in place to one that nothing else holds (``can_accumulate_inplace`` in
torch/csrc/autograd/input_buffer.cpp).  A linear layer's is a transposed view of a product, which its base holds, so
that the sum is a new tensor; what a function of its own returns (a fused loss) is a tensor that nobody else holds.

Left out: a cast of the view and a sum of several are such tensors, too, but where a dispatch mode looks on, as in
records of real steps on a CPU; they are taken for views, which is one such gradient too many for a moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memplan.operators.tape import Tape

Waiting = frozenset[tuple[str, bool]]
"""(parameter, whether the head's gradient is a tensor of its own, to which the stem's is added in place)."""


def waiting(head: Tape, stem: Tape) -> Waiting:
    """The parameters that both have."""
    shared = {p.name for p in head.parameters} & {p.name for p in stem.parameters}
    return frozenset((p.name, _stands_alone(head, p.storage)) for p in head.parameters if p.name in shared)


def _stands_alone(head: Tape, storage: int) -> bool:
    givers = [op for op in head.ops if any(g.of.storage == storage for g in op.gradients)]
    loop = givers[0].loop if len(givers) == 1 else None
    return loop is not None and not loop.gives_views
