"""A batch as micro-batches.

    {"input_ids": (32, s), "labels": (32, s)}, micro-batch 4  ->  8 x {"input_ids": (4, s), "labels": (4, s)}

The last one is smaller where the sizes do not divide: nothing is dropped and nothing is padded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch


def split(batch: Any, micro_batch_size: int | None, collate: Callable[[list[Any]], Any] | None = None) -> Sequence[Any]:
    """The micro-batches of a batch.

    Args:
        batch: A dict of tensors, a tuple of them or one: cut along the first dimension.  A list: of samples where a
            `micro_batch_size` is given, else of micro-batches that are ready.
        micro_batch_size: Samples in each; None: all.
        collate: Makes a micro-batch of a list of samples; None: stacks them, as a DataLoader does.

    Raises:
        UsageError: there is nothing in it, or its tensors are not of one number of samples.
    """
    if micro_batch_size is not None and micro_batch_size < 1:
        raise UsageError(f"micro_batch_size is {micro_batch_size}.", "Give a whole number from 1.")
    if isinstance(batch, list):
        return batch if micro_batch_size is None else _collated(batch, micro_batch_size, collate)
    num = _num_samples(batch)
    size = num if micro_batch_size is None else micro_batch_size
    return [_cut(batch, start, min(start + size, num), num) for start in range(0, num, max(size, 1))]


def _collated(samples: list[Any], size: int, collate: Callable[[list[Any]], Any] | None) -> list[Any]:
    from torch.utils.data import default_collate

    make = default_collate if collate is None else collate
    return [make(samples[start : start + size]) for start in range(0, len(samples), size)]


def _tensors(batch: Any) -> dict[str, torch.Tensor]:
    """What is cut, by its place in the batch."""
    import torch

    if isinstance(batch, torch.Tensor):
        return {"the batch": batch}
    parts = batch.items() if hasattr(batch, "items") else enumerate(batch) if isinstance(batch, tuple) else ()
    return {repr(name): part for name, part in parts if isinstance(part, torch.Tensor) and part.dim()}


def _num_samples(batch: Any) -> int:
    found = _tensors(batch)
    sizes = {part.shape[0] for part in found.values()}
    if len(sizes) != 1:
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in found.items()) or type(batch).__name__
        raise UsageError(
            f"The batch is not of one number of samples: {shapes}.",
            "Give a dict of tensors that share their first dimension, or a list of micro-batches.",
        )
    return int(sizes.pop())


def _cut(batch: Any, start: int, stop: int, num: int) -> Any:
    """Samples from `start` to `stop`; what is no tensor of samples goes into each."""
    import torch

    def part(value: Any) -> Any:
        return value[start:stop] if isinstance(value, torch.Tensor) and value.dim() and len(value) == num else value

    if isinstance(batch, torch.Tensor):
        return part(batch)
    if hasattr(batch, "items"):
        return {name: part(value) for name, value in batch.items()}
    return tuple(map(part, batch))


def moved(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device; those that are there are not copied."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if hasattr(value, "items"):
        return {name: moved(part, device) for name, part in value.items()}
    if type(value) in {tuple, list}:
        return type(value)(moved(part, device) for part in value)
    return value
