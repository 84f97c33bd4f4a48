"""What the real optimizers of the libraries remember and allocate, on a CPU or on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from memplan.memory.events import Sizes
from memplan.memory.optimizers import OPTIMIZER_BY_NAME
from memplan.operators.sizes import allocated, num_bytes
from memplan.probes.recorder import StorageRecorder, dtype_name
from memplan.probes.stand_ins import states_of, trained

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCAB, HIDDEN, WIDE = 700, 160, 800

Described = tuple[str, int]


class Layer(nn.Module):
    """Matrices that are wide, tall and square, below and above the ranks and limits that matter; vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(HIDDEN, HIDDEN)
        self.narrow = nn.Linear(HIDDEN, 24, bias=False)
        self.up = nn.Linear(HIDDEN, WIDE, bias=False)
        self.gate = nn.Linear(HIDDEN, WIDE, bias=False)
        self.down = nn.Linear(WIDE, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)


class Model(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)


class Seen(NamedTuple):
    """Two steps of an optimizer."""

    states: dict[str, list[Described]]
    """For each parameter (dtype, bytes of the storage) of its states, sorted."""
    code_book_bytes: int
    temporary_bytes: int
    """Allocated bytes at the highest point of the second step, above those before it."""


def real_steps(make: Any, dtype: torch.dtype, device: str) -> Seen:
    """Two steps of the optimizer that `make` makes of a model; gradients grow from the first to the second."""
    torch.manual_seed(0)
    with torch.device(device):
        module = Model().to(dtype)
    optimizer = make(module)
    gradients = {p: torch.randn_like(p) for p in module.parameters()}
    recorder = StorageRecorder({}, {}, has_padding=False, trust=(), device=device)
    with recorder:
        for number in (1, 2):
            for p, gradient in gradients.items():
                p.grad = gradient * 3**number
            recorder.enter("optimizer", number, -1)
            optimizer.step()
            recorder.enter("zero_grad", number, -1)
    states, books = {}, {}
    for name, p in module.named_parameters():
        states[name] = sorted(
            (dtype_name(x.dtype), x.untyped_storage().nbytes()) for x in _states(optimizer, p, device)
        )
        books |= {id(x): x.nbytes for key, x in optimizer.state[p].items() if key.startswith("qmap")}
    return Seen(states, sum(books.values()), _highest(recorder))


def _highest(recorder: StorageRecorder) -> int:
    """Of the second step."""
    span = next(span for span in recorder.spans() if (span.phase, span.step) == ("optimizer", 2))
    live = highest = 0
    for size, sign in recorder.raw_events(span.start)[: span.stop - span.start]:
        live += sign * allocated(size)
        highest = max(highest, live)
    return highest


def _states(optimizer: Any, p: nn.Parameter, device: str) -> Iterator[torch.Tensor]:
    """Those that a run on a card has on the card; a counter is there where the optimizer is a fused one."""
    for name, value in optimizer.state[p].items():
        tensor = getattr(value, "ortho_matrix", value)  # a projection lies in an object of its own
        on_host = name == "step" and not optimizer.defaults.get("fused")
        if isinstance(tensor, torch.Tensor) and tensor.device.type == device and not on_host and name[:4] != "qmap":
            yield tensor


def formula(name: str, module: nn.Module) -> Seen:
    """The same by the formulas."""
    rows = list(trained(module).values())
    rule = OPTIMIZER_BY_NAME[name].states
    model = states_of(rows, name)
    books = sum(size.factor * n for row, size, n in model.optimizer_states().rows if row.tensor == "code books")
    states = {
        row.name: sorted((state.dtype, num_bytes(state.shape, state.dtype).factor) for state in rule(row))
        for row in rows
    }
    return Seen(states, books, model.step_temporaries().total(Sizes({})))
