"""What does an optimizer allocate?

For a trace the real ones of torch.optim where they run on meta tensors, else their states; for a probe the real ones.

Sources: torch/optim/adamw.py, sgd.py (2.13); bitsandbytes/optim/optimizer.py (0.50): blocks of 256, 8-bit states from
4096 elements on; transformers/trainer.py registers embeddings with 32-bit states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.probes.faults import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    States = Iterator[tuple[str, torch.Tensor]]

BLOCK = 256
MIN_8BIT_ELEMENTS = 4096


def build_optimizer(module: nn.Module, name: str) -> Any:
    """The optimizer of this name (a value of `memplan.specs.training.OPTIMIZERS`) for the trained parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "adamw-fused":
        return FusedAdamW(parameters)
    if name == "adamw-8bit":
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        return AdamW8bit(parameters, embeddings)
    if name.startswith("adamw"):
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=name == "adamw-foreach")
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9 if name == "sgd-momentum" else 0.0, foreach=True)


def real_optimizer(module: nn.Module, name: str) -> Any:
    """The same for parameters with numbers: the library's own.

    Raises:
        MissingLibraryError: it comes with a library that is not installed.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "adamw-fused":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    if name == "adamw-8bit":
        require("bitsandbytes")
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for part in module.modules():
            if isinstance(part, nn.Embedding):  # as the Trainer does
                manager.register_module_override(part, "weight", {"optim_bits": 32})
        return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)
    return build_optimizer(module, name)


class FusedAdamW:
    """torch.optim.AdamW(fused=True): two moments and a step counter on the device, no temporaries."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.state: dict[Any, dict[str, torch.Tensor]] = {}

    def step(self) -> None:
        """Make the states of parameters that have a gradient."""
        for parameter in self.parameters:
            if parameter.grad is not None and parameter not in self.state:
                with torch.no_grad():
                    self.state[parameter] = dict(self.states(parameter))

    def states(self, parameter: nn.Parameter) -> States:
        """Name and value of each state."""
        yield "step", torch.zeros((), dtype=torch.float32, device=parameter.device)
        yield "exp_avg", torch.zeros_like(parameter)
        yield "exp_avg_sq", torch.zeros_like(parameter)


class AdamW8bit(FusedAdamW):
    """bitsandbytes' AdamW8bit: moments of one byte with a scale for each block, and two code books."""

    def __init__(self, parameters: list[nn.Parameter], embeddings: set[int]) -> None:
        super().__init__(parameters)
        self.embeddings = embeddings
        self.code_books: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        """Make the code books (``fill_qmap``) and the states."""
        if not self.code_books:
            device = self.parameters[0].device
            self.code_books = {name: torch.empty(256, device=device) for name in ("signed", "unsigned")}
        super().step()

    def states(self, parameter: nn.Parameter) -> States:
        """Name and value of each state: ``init_state`` of Optimizer2State."""
        small = parameter.numel() < MIN_8BIT_ELEMENTS or id(parameter) in self.embeddings
        for name in ("exp_avg", "exp_avg_sq"):
            yield name, torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
            if not small:
                blocks = -(-parameter.numel() // BLOCK)
                yield f"absmax of {name}", torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
