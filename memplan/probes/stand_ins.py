"""What does an optimizer allocate that does not run on meta tensors?

Stand-ins for traces: they have the states of `memplan.memory.optimizers` and make what is alive at the highest point of
the step, or, in the backward pass, everything in its order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.memory.frames import Frame, Trained
from memplan.memory.model_states import ModelStates
from memplan.memory.optimizers import CODE_BOOK, OPTIMIZER_BY_NAME
from memplan.operators.tape import Parameter
from memplan.probes.checkpointing import repeated_layers
from memplan.probes.recorder import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "uint8": torch.uint8}


def trained(module: nn.Module) -> dict[nn.Parameter, Trained]:
    """The parameters that are trained, as formulas see them."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    layered = {id(p) for layer in repeated_layers(module).values() for p in layer.parameters()}
    return {
        p: Trained(name, tuple(p.shape), dtype_name(p.dtype), id(p) in embeddings, id(p) in layered)
        for name, p in module.named_parameters()
        if p.requires_grad
    }


class StandIn:
    """What an optimizer allocates, without its numbers."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.rows = trained(module)
        self.optimizer = OPTIMIZER_BY_NAME[name]
        formulas = states_of(self.rows.values(), name)
        self.temporaries = formulas.step_temporaries()
        self.host_bytes = formulas.host_state_bytes()
        self.state: dict[Any, dict[str, torch.Tensor]] = {}
        self.code_books: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        """Make the states of parameters that have a gradient, then what the step needs for a moment."""
        device = next(iter(self.rows)).device
        with torch.no_grad(), torch.device(device):
            for p in self.rows:
                self.remember(p)
            if not self.code_books and self._has_8bit_states():
                names = ("signed", "unsigned")[: self.optimizer.num_code_books]
                self.code_books = {name: torch.empty(CODE_BOOK, dtype=torch.float32) for name in names}
            passing = [
                torch.empty(row.shape or (), dtype=DTYPES[row.dtype])  # type: ignore[arg-type]  # no dimension is open
                for row, _, times in self.temporaries.rows
                for _ in range(times)
            ]
            del passing

    def remember(self, p: Any) -> None:
        """Make the states of a parameter that has a gradient and none yet."""
        if p.grad is not None and p not in self.state:
            self.state[p] = {
                state.name: torch.empty(state.shape, dtype=DTYPES[state.dtype], device=p.device)
                for state in self.optimizer.states(self.rows[p])
                if not state.on_host
            }

    def _has_8bit_states(self) -> bool:
        return any(state.dtype == "uint8" for row in self.rows.values() for state in self.optimizer.states(row))


class StandInBackward(StandIn):
    """The same of an optimizer whose hooks update in the backward pass."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        how = self.optimizer.in_backward
        assert how is not None
        self.how = how
        for p in self.rows:
            if how.waits:
                p.register_hook(self._update_waiting)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            else:
                p.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]  # the same

    def fused_backward(self, loss: torch.Tensor, _: float) -> None:
        """The backward pass, and the update that waits at its end."""
        loss.backward()  # type: ignore[no-untyped-call]
        self._update_waiting(None)

    def _update_waiting(self, gradient: Any) -> Any:
        for p in self.rows:
            self._update(p)
        return gradient

    def _update(self, p: Any) -> None:
        if p.grad is None:
            return
        with torch.no_grad():
            self.remember(p)
            frame = Frame(self.how.source)
            row = self.rows[p]
            first = frame.make(row, "gradient")
            self.how.loop(frame, row, first)
            made: dict[int, torch.Tensor] = {}
            for block, sign in frame.events[1:]:
                if block.number == first.number:
                    p.grad = None
                elif sign > 0:
                    shape, dtype = block.row.shape or (), DTYPES[block.row.dtype]
                    made[block.number] = torch.empty(shape, dtype=dtype, device=p.device)  # type: ignore[arg-type]
                else:
                    del made[block.number]


def states_of(rows: Iterable[Trained], name: str) -> ModelStates:
    """The formulas for these parameters, in this order."""
    listed = list(rows)
    groups = tuple((Parameter(row.name, row.shape, True, 0, 0, row.of_embedding, row.dtype), 1) for row in listed)
    layered = frozenset(number for number, row in enumerate(listed) if row.in_layers)
    dtype = listed[0].dtype if listed else "fp32"
    return ModelStates(groups, dtype, name, tuple(range(len(listed))), layered)
