"""What does an optimizer allocate?

For a probe the library's own, made as the Trainer makes it (transformers/trainer_optimizer.py, 5.23).  For a trace the
same where it runs on meta tensors and comes with torch or transformers; else a stand-in (`memplan.probes.stand_ins`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.memory.loops import RANK
from memplan.probes.faults import require
from memplan.probes.stand_ins import StandIn, StandInBackward, trained
from memplan.probes.training import LEARNING_RATE
from memplan.specs.training import IN_BACKWARD, library_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[nn.Module], Any]
    """Makes the optimizer of a module's trained parameters."""

PROJECTION_GAP = 200
"""Steps between two projections of GaLore and APOLLO: the Trainer's default."""


def build_optimizer(module: nn.Module, name: str) -> Any:
    """The optimizer of this name (a value of `memplan.specs.training.OPTIMIZERS`) on the meta device."""
    made = REAL_ON_META.get(name)
    if made is not None:
        return made(module)
    return StandInBackward(module, name) if name in IN_BACKWARD else StandIn(module, name)


def real_optimizer(module: nn.Module, name: str) -> Any:
    """The same for parameters with numbers: the library's own.

    Raises:
        MissingLibraryError: it comes with a library that is not installed.
    """
    made = REAL_ON_META.get(name) or WITH_NUMBERS[name]
    return made(module)


def load_library(name: str) -> None:
    """Import what an optimizer comes with: tensors of the library's own are not the run's.

    Raises:
        MissingLibraryError: it is not installed.
    """
    library = library_of(name)
    require(library)
    if library == "transformers":
        import_module("transformers.optimization")


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


def _offloaded(module: nn.Module) -> Any:
    require("torchao")
    made: Any = import_module("torchao.optim").CPUOffloadOptimizer
    return made(_parameters(module), torch.optim.AdamW, lr=LEARNING_RATE, fused=True)


class InBackward:
    """Updates each parameter as soon as its gradient is there: a hook and an optimizer for each."""

    def __init__(self, module: nn.Module, make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> None:
        self.optimizers = {p: make(p) for p in _parameters(module)}
        self.defaults = next(iter(self.optimizers.values())).defaults
        for p in self.optimizers:
            p.register_post_accumulate_grad_hook(self._update)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _update(self, p: Any) -> None:
        self.optimizers[p].step()
        p.grad = None

    @property
    def state(self) -> dict[Any, Any]:
        """The states of all."""
        return {p: optimizer.state[p] for p, optimizer in self.optimizers.items()}

    def fused_backward(self, loss: torch.Tensor, _: float) -> None:
        """The backward pass; the hooks do the rest."""
        loss.backward()  # type: ignore[no-untyped-call]


def _adamw_in_backward(module: nn.Module) -> Any:
    return InBackward(module, lambda p: torch.optim.AdamW([p], lr=LEARNING_RATE, fused=True))


def _lomo(kind: str) -> Make:
    def make(module: nn.Module) -> Any:
        require("lomo_optim")
        made: Any = getattr(import_module("lomo_optim"), kind)
        optimizer = made(module, lr=LEARNING_RATE)
        for name, p in module.named_parameters():  # AdaLomo has its states by name, in dicts of its own
            kinds = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
            found = {state: getattr(optimizer, state, {}).get(name) for state in kinds}
            optimizer.state[p] = {state: value for state, value in found.items() if value is not None}
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
    "adamw-offloaded": _offloaded,
    "adamw-32bit": _bitsandbytes("AdamW", 32),
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
    "adamw-in-backward": _adamw_in_backward,
    "lomo": _lomo("Lomo"),
    "adalomo": _lomo("AdaLomo"),
}
"""Those that do not."""
