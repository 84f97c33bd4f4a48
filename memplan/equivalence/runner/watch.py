"""What happens to gradients on their way, seen by hooks on the parameters.

A hook sees a gradient before it is added to ``p.grad``: there the gradient can be scaled, and what ``p.grad`` holds can
be compared with what the backward passes have put there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

SIXTEEN = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Watch:
    """A context in which a step is watched; with `scale`, a power of two, on gradients that much smaller."""

    def __init__(self, module: nn.Module, scale: float = 1.0) -> None:
        self._scale = scale
        self._module = module
        self._parameters = [one for one in module.parameters() if one.requires_grad]
        self._expected: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []
        self.is_changed = False
        """Whether somebody changed gradients between micro-steps."""
        self.autocast = ""
        """The dtype under which the module ran."""
        self._kept: dict[str, bool] = dict.fromkeys(SIXTEEN, True)
        self._was_kept = False

    def __enter__(self) -> Watch:
        self._handles = [_hooked(one, self._seen(one)) for one in self._parameters]
        self._handles.append(self._module.register_forward_pre_hook(self._forward))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(self, *_: object) -> None:
        if torch.is_autocast_enabled("cpu"):
            self.autocast = str(torch.get_autocast_dtype("cpu")).removeprefix("torch.")

    def _seen(self, parameter: nn.Parameter) -> Any:
        key = id(parameter)

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            incoming = gradient.detach() * self._scale
            before = parameter.grad
            if before is not None and key in self._expected:
                self._compare(before.detach(), self._expected[key])
            self._expected[key] = incoming if before is None else before.detach() + incoming
            return gradient * self._scale

        return hook

    def _compare(self, before: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.allclose(before, expected, rtol=1e-6, atol=0):
            self.is_changed = True
        self._keep(before)

    def _keep(self, gradient: torch.Tensor) -> None:
        self._was_kept |= bool(gradient.any())
        for name, dtype in SIXTEEN.items():
            self._kept[name] = self._kept[name] and bool((gradient.to(dtype).to(gradient.dtype) == gradient).all())

    def kept_in(self, num_micro_batches: int) -> str:
        """The 16-bit dtype that holds all sums so far and the end of a step of several micro-batches; empty: none."""
        ends = dict.fromkeys(SIXTEEN, num_micro_batches > 1)
        for name, dtype in SIXTEEN.items():
            for one in self._parameters:
                if one.grad is not None:
                    ends[name] = ends[name] and bool((one.grad.to(dtype).to(one.grad.dtype) == one.grad).all())
        for name in SIXTEEN:
            if ends[name] or (self._was_kept and self._kept[name]):
                return name
        return ""


def _hooked(parameter: Any, hook: Any) -> Any:
    return parameter.register_hook(hook)
