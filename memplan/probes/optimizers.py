"""What does an optimizer allocate?

For a probe the library's own, made as the Trainer makes it (transformers/trainer_optimizer.py, 5.23).  For a trace the
same where it runs on meta tensors and comes with torch or transformers; else a stand-in that has the states of
`memplan.memory.optimizers` and makes what is alive at the highest point of the step.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.memory.frames import Trained
from memplan.memory.loops import RANK
from memplan.memory.model_states import ModelStates
from memplan.memory.optimizers import CODE_BOOK, OPTIMIZER_BY_NAME
from memplan.operators.tape import Parameter
from memplan.probes.checkpointing import repeated_layers
from memplan.probes.faults import require
from memplan.probes.recorder import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Make = Callable[[nn.Module], Any]
    """Makes the optimizer of a module's trained parameters."""

LEARNING_RATE = 1e-4
PROJECTION_GAP = 200
"""Steps between two projections of GaLore and APOLLO: the Trainer's default."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "uint8": torch.uint8}


def build_optimizer(module: nn.Module, name: str) -> Any:
    """The optimizer of this name (a value of `memplan.specs.training.OPTIMIZERS`) on the meta device."""
    made = REAL_ON_META.get(name)
    return StandIn(module, name) if made is None else made(module)


def real_optimizer(module: nn.Module, name: str) -> Any:
    """The same for parameters with numbers: the library's own.

    Raises:
        MissingLibraryError: it comes with a library that is not installed.
    """
    made = REAL_ON_META.get(name) or WITH_NUMBERS[name]
    return made(module)


def trained(module: nn.Module) -> dict[nn.Parameter, Trained]:
    """The parameters that are trained, as formulas see them."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    layered = {id(p) for layer in repeated_layers(module).values() for p in layer.parameters()}
    return {
        p: Trained(name, tuple(p.shape), dtype_name(p.dtype), id(p) in embeddings, id(p) in layered)
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


# -- the libraries' own ------------------------------------------------------------------------------------------------


def _torch(name: str, **choices: Any) -> Make:
    return lambda module: getattr(torch.optim, name)(_parameters(module), lr=LEARNING_RATE, **choices)


class Together:
    """Two optimizers that share the parameters of a module: what a loop that steps them one after the other has."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.defaults = optimizers[0].defaults

    @property
    def state(self) -> dict[Any, Any]:
        """The states of all."""
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self) -> None:
        """Update all parameters."""
        for optimizer in self.optimizers:
            optimizer.step()


def _muon(module: nn.Module) -> Any:
    """Muon for the matrices of the layers, AdamW for the rest."""
    rows = trained(module)
    matrices = [p for p, row in rows.items() if row.in_layers and p.ndim == 2]
    others = [p for p in rows if not any(p is one for one in matrices)]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=LEARNING_RATE))
    if others:
        found.append(torch.optim.AdamW(others, lr=LEARNING_RATE, foreach=True))
    return Together(*found)


def _adafactor(module: nn.Module) -> Any:
    require("transformers")
    from transformers.optimization import Adafactor

    return Adafactor(_parameters(module), lr=LEARNING_RATE, scale_parameter=False, relative_step=False)


def _bitsandbytes(kind: str, bits: int, *, paged: bool = False) -> Make:
    def make(module: nn.Module) -> Any:
        require("bitsandbytes")
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for part in module.modules():
            if bits == 8 and isinstance(part, nn.Embedding):  # as the Trainer does
                manager.register_module_override(part, "weight", {"optim_bits": 32})
        choices = {"is_paged": True} if paged else {}
        made: Any = getattr(bitsandbytes.optim, kind)
        return made(_parameters(module), lr=LEARNING_RATE, optim_bits=bits, **choices)

    return make


def _low_rank(library: str, kind: str, **choices: Any) -> Make:
    def make(module: nn.Module) -> Any:
        require(library)
        rows = trained(module)
        how = {"rank": RANK, "update_proj_gap": PROJECTION_GAP, "proj_type": "std", **choices}
        groups: list[dict[str, Any]] = [
            {"params": [p for p, row in rows.items() if not row.is_matrix]},
            {"params": [p for p, row in rows.items() if row.is_matrix], **how},
        ]
        made: Any = getattr(import_module(library), kind)
        return made(groups, lr=LEARNING_RATE, no_deprecation_warning=True)

    return make


def _schedule_free(kind: str) -> Make:
    def make(module: nn.Module) -> Any:
        require("schedulefree")
        made: Any = getattr(import_module("schedulefree"), kind)
        optimizer = made(_parameters(module), lr=LEARNING_RATE)
        optimizer.train()
        return optimizer

    return make


REAL_ON_META: dict[str, Make] = {
    "adamw-foreach": _torch("AdamW", foreach=True),
    "adamw-forloop": _torch("AdamW", foreach=False),
    "sgd": _torch("SGD", foreach=True),
    "sgd-momentum": _torch("SGD", momentum=0.9, foreach=True),
    "rmsprop": _torch("RMSprop", foreach=True),
    "adagrad": _torch("Adagrad", foreach=True),
    "muon": _muon,
    "adafactor": _adafactor,
}
"""Those that run on meta tensors, and come with torch or transformers."""

WITH_NUMBERS: dict[str, Make] = {
    "adamw-fused": _torch("AdamW", fused=True),
    "adamw-8bit": _bitsandbytes("AdamW", 8),
    "paged-adamw": _bitsandbytes("AdamW", 32, paged=True),
    "paged-adamw-8bit": _bitsandbytes("AdamW", 8, paged=True),
    "lion": _bitsandbytes("Lion", 32),
    "lion-8bit": _bitsandbytes("Lion", 8),
    "paged-lion": _bitsandbytes("Lion", 32, paged=True),
    "paged-lion-8bit": _bitsandbytes("Lion", 8, paged=True),
    "rmsprop-32bit": _bitsandbytes("RMSprop", 32),
    "rmsprop-8bit": _bitsandbytes("RMSprop", 8),
    "ademamix": _bitsandbytes("AdEMAMix", 32),
    "ademamix-8bit": _bitsandbytes("AdEMAMix", 8),
    "paged-ademamix": _bitsandbytes("AdEMAMix", 32, paged=True),
    "paged-ademamix-8bit": _bitsandbytes("AdEMAMix", 8, paged=True),
    "galore-adamw": _low_rank("galore_torch", "GaLoreAdamW", scale=0.25),
    "apollo-adamw": _low_rank("apollo_torch", "APOLLOAdamW", scale=1.0, proj="random", scale_type="channel"),
    "schedule-free-adamw": _schedule_free("AdamWScheduleFree"),
    "schedule-free-sgd": _schedule_free("SGDScheduleFree"),
}
"""Those that do not."""


# -- stand-ins ---------------------------------------------------------------------------------------------------------


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
            for p, row in self.rows.items():
                if p.grad is not None and p not in self.state:
                    self.state[p] = {
                        state.name: torch.empty(state.shape, dtype=DTYPES[state.dtype])
                        for state in self.optimizer.states(row)
                        if not state.on_host
                    }
            if not self.code_books and self._has_8bit_states():
                names = ("signed", "unsigned")[: self.optimizer.num_code_books]
                self.code_books = {name: torch.empty(CODE_BOOK, dtype=torch.float32) for name in names}
            passing = [
                torch.empty(row.shape or (), dtype=DTYPES[row.dtype])  # type: ignore[arg-type]  # no dimension is open
                for row, _, times in self.temporaries.rows
                for _ in range(times)
            ]
            del passing

    def _has_8bit_states(self) -> bool:
        return any(state.dtype == "uint8" for row in self.rows.values() for state in self.optimizer.states(row))


def states_of(rows: Iterable[Trained], name: str) -> ModelStates:
    """The formulas for these parameters, in this order."""
    listed = list(rows)
    groups = tuple((Parameter(row.name, row.shape, True, 0, 0, row.of_embedding), 1) for row in listed)
    layered = frozenset(number for number, row in enumerate(listed) if row.in_layers)
    dtype = listed[0].dtype if listed else "fp32"
    return ModelStates(groups, dtype, name, tuple(range(len(listed))), layered)
