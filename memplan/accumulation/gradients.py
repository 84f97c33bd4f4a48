"""The size of each micro-batch's gradient, while gradients accumulate.

``p.grad`` holds the sum so far.  A hook on the parameter sees what a backward pass adds before it is added, and after
all uses of the parameter are summed (torch.Tensor.register_hook): each gradient is read once more, and nothing is
kept.  One more pass reads the sum.  Reentrant checkpointing runs a backward pass for each segment, so that a parameter
that several segments share would be seen in parts: not supported; nor are sharded parameters.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from memplan.accumulation.noise import GradientNoise
    from memplan.accumulation.ranks import Ranks


class Recorder:
    """Squared norms of the gradients of micro-batches; a context in which the hooks are on."""

    def __init__(self, model: nn.Module, *, scale: float, enabled: bool) -> None:
        """`scale`: what the losses are multiplied with beside their share of the tokens."""
        self._parameters = [one for one in model.parameters() if one.requires_grad] if enabled else []
        if any(hasattr(one, "full_tensor") for one in self._parameters) or (enabled and _is_flat(model)):
            raise UsageError("Gradient noise of sharded parameters is not measured.", "Leave noise= out.")
        self._scale = scale
        self._handles: list[Any] = []
        self._squares: list[torch.Tensor] = []
        self._counts: list[torch.Tensor | int] = []

    def __enter__(self) -> Recorder:
        self._handles = [_hooked(one, self._add) for one in self._parameters]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, num: torch.Tensor | int) -> None:
        """The backward pass of a micro-batch of so many tokens follows."""
        if self._parameters:
            self._squares.append(self._parameters[0].new_zeros((), dtype=_double()))
            self._counts.append(num)

    def _add(self, gradient: torch.Tensor) -> None:
        self._squares[-1] += gradient.detach().pow(2).sum(dtype=_double()).to(self._squares[-1].device)

    def tell(self, noise: GradientNoise, ranks: Ranks, num_tokens: int) -> None:
        """Give the squares of micro-batches and of the whole, once the ranks' gradients have met and are unscaled.

        The gradient g_i of the share L_i x R / N is n_i R / N times the gradient G_i of the micro-batch's own mean, so
        the mean of |G_i|^2 with the weights n_i / N is the sum of |g_i|^2 N / (n_i R^2).
        """
        import torch

        small = self._parameters[0].new_zeros(2, dtype=_double())
        for square, num in zip(self._squares, self._counts, strict=True):
            if int(num):
                small += torch.stack([square * (num_tokens / (int(num) * ranks.num**2)), torch.ones_like(square)])
        mean, num_micro_batches = ranks.sum(small).tolist()
        whole = sum(float(one.grad.pow(2).sum(dtype=_double())) for one in self._parameters if one.grad is not None)
        if num_micro_batches > 1 and math.isfinite(mean + whole):  # a scaler that overflowed skips the step
            noise.update(mean / self._scale**2, num_tokens / num_micro_batches, whole, num_tokens)


def _hooked(parameter: Any, hook: Callable[[torch.Tensor], None]) -> Any:
    return parameter.register_hook(hook)


def _double() -> torch.dtype:
    import torch

    return torch.float64


def _is_flat(model: nn.Module) -> bool:
    return type(model).__name__ == "FullyShardedDataParallel"
