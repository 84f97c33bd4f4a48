"""A module, the loss it is trained on, and gradients of it as vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memplan.accumulation.losses import IGNORED, count_labels, count_next_tokens, mean_loss
from memplan.accumulation.splitting import split
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    from memplan.accumulation.losses import Count, Loss


class Case(NamedTuple):
    """What is trained on what."""

    module: nn.Module
    """On the CPU, in fp32, in training mode."""
    loss_of: Callable[[Any], torch.Tensor] | None
    """What the module returns -> its mean loss; None: it is, or has, its own."""
    num_losses: Count
    """What the module takes its mean over."""
    buffers: Mapping[str, torch.Tensor]
    """Copies, put back before every pass: running statistics are no part of a gradient."""

    @property
    def loss(self) -> Loss:
        """(module, micro-batch) -> (sum of the losses, their number)."""
        return mean_loss(self.num_losses, self.loss_of)

    def restore(self) -> None:
        """Put the buffers back and forget gradients."""
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(self.buffers[name])
        self.module.zero_grad(set_to_none=True)


def make_case(module: nn.Module, loss_of: Callable[[Any], torch.Tensor] | None) -> Case:
    """A case of a module, dropout off; what its mean is over is to be found (`counted`)."""
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            part.p = 0.0
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return Case(module, loss_of, num_samples, buffers)


def num_samples(batch: Any) -> int:
    """Samples of a batch."""
    parts = batch.values() if hasattr(batch, "values") and not isinstance(batch, torch.Tensor) else batch
    parts = [batch] if isinstance(batch, torch.Tensor) else parts
    return next(len(part) for part in parts if isinstance(part, torch.Tensor) and part.dim())


def counted(case: Case, batch: Any, micro_batch_size: int) -> Case:
    """The case with the count that makes the means of micro-batches that of the batch: found by trying each."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    candidates: list[Count] = [num_samples]
    if labels is not None and labels.dim() > 1:
        candidates = [count_next_tokens, count_labels, num_samples]
    whole = _mean(case, batch)
    parts = [(_mean(case, part), part) for part in split(batch, micro_batch_size)]

    def miss(count: Count) -> float:
        sizes = [int(count(part)) for _, part in parts]
        found = sum(size * mean for size, (mean, _) in zip(sizes, parts, strict=True)) / max(sum(sizes), 1)
        return round(abs(found - whole) / (abs(whole) or 1.0), 6)

    return case._replace(num_losses=min(candidates, key=miss))


def _mean(case: Case, batch: Any) -> float:
    case.restore()
    with torch.no_grad():
        total, num = case.loss(case.module, batch)
    return float(total) / max(int(num), 1)


def gradient_of(case: Case, parts: Iterable[Any], weights: Iterable[float]) -> torch.Tensor:
    """Gradient of the sum of the mean losses of `parts` times their weights; float64, shape (num_parameters,)."""
    total: torch.Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        case.restore()
        summed, num = case.loss(case.module, part)
        (summed / max(int(num), 1)).backward()  # type: ignore[no-untyped-call]
        found = vector(case.module) * weight
        total = found if total is None else total + found
    case.restore()
    assert total is not None
    return total


def vector(module: nn.Module) -> torch.Tensor:
    """All gradients, float64; zeros where there is none."""
    trained = [one for one in module.parameters() if one.requires_grad]
    grads = [torch.zeros_like(one) if one.grad is None else one.grad.detach() for one in trained]
    return torch.cat([grad.double().flatten() for grad in grads])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found - wanted).norm() / wanted.norm())


def picked(batch: Any, index: torch.Tensor) -> Any:
    """Samples of a batch, in the order of `index`."""
    num = num_samples(batch)

    def part(value: Any) -> Any:
        return value[index] if isinstance(value, torch.Tensor) and value.dim() and len(value) == num else value

    if isinstance(batch, torch.Tensor):
        return part(batch)
    if hasattr(batch, "items"):
        return {name: part(value) for name, value in batch.items()}
    return tuple(map(part, batch))


def ragged(batch: Any, seed: int) -> Any:
    """The same with labels on the last tokens alone, of each row another number; as it is where it has no such labels.

    Micro-batches have to differ in their tokens, or every mean is the right one.  At least the last two have one.
    """
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if labels is None or labels.dim() != 2 or labels.is_floating_point() or labels.shape[1] < 3:
        return batch
    if bool((labels == IGNORED).any()):
        return batch
    generator = torch.Generator().manual_seed(seed)
    num, length = labels.shape
    behind = torch.randint(2, length + 1, (num, 1), generator=generator)
    masked = torch.arange(length)[None] < length - behind
    return {**batch, "labels": labels.masked_fill(masked, IGNORED)}
