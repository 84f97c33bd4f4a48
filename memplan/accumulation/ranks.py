"""The ranks that share a step: how many there are, how their gradients meet, and when.

Each rank backpropagates its sum of losses times R / N, N being the tokens of all R ranks: DistributedDataParallel and
FSDP take the mean of the ranks' gradients (torch.nn.parallel.DistributedDataParallel, "the gradients are averaged"), so
that the R cancels.

Tried with gloo on the CPU, torch 2.13, against the gradient of the whole batch: DistributedDataParallel;
FullyShardedDataParallel with FULL_SHARD, SHARD_GRAD_OP, NO_SHARD and HYBRID_SHARD, with ``use_orig_params``;
fully_shard over all ranks, over some, and hybrid.  Not tried: NCCL, mixed precision and CPU offload of FSDP,
hooks that reduce otherwise than to the mean, tensor and pipeline parallelism.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import nn


class Ranks(NamedTuple):
    """The ranks whose gradients are averaged with each other."""

    num: int
    """How many there are."""
    group: Any
    """Their process group; None: the default one, or none."""
    wrapper: Any
    """The module that averages; None on one rank."""
    forwards_meet: bool
    """Whether ranks wait for each other in a forward pass: sharded parameters are gathered."""

    def unsynchronised(self) -> AbstractContextManager[Any]:
        """A micro-step whose gradients stay on their rank."""
        if self.wrapper is None:
            return nullcontext()
        if hasattr(self.wrapper, "no_sync"):
            held: AbstractContextManager[Any] = self.wrapper.no_sync()
            return held
        return _held(self.wrapper)

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, on each."""
        return self._reduced(numbers, "SUM")

    def most(self, numbers: torch.Tensor) -> torch.Tensor:
        """The largest over the ranks, on each."""
        return self._reduced(numbers, "MAX")

    def _reduced(self, numbers: torch.Tensor, how: str) -> torch.Tensor:
        if self.num > 1:
            import torch.distributed as dist

            dist.all_reduce(numbers, op=getattr(dist.ReduceOp, how), group=self.group)
        return numbers


@contextmanager
def _held(module: Any) -> Iterator[None]:
    """FSDP2's way (torch.distributed.fsdp.FSDPModule.set_requires_gradient_sync)."""
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def ranks_of(model: nn.Module, group: Any = None) -> Ranks:
    """Who shares a step with this rank.

    Args:
        model: Wrapped in DistributedDataParallel or FSDP, sharded with fully_shard, or as it is on one rank.
        group: The ranks with different data; None: those of the wrapper, or all.

    Raises:
        UsageError: there are several ranks, and nothing averages the gradients of the model.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return Ranks(1, None, None, False)
    wrapper: Any = getattr(model, "_orig_mod", model)  # torch.compile's wrapper around the wrapper
    found = group if group is not None else _group_of(wrapper)
    num = dist.get_world_size(found)
    if num == 1:
        return Ranks(1, None, None, False)
    if not hasattr(wrapper, "no_sync") and not hasattr(wrapper, "set_requires_gradient_sync"):
        raise UsageError(
            f"There are {num} ranks, and nothing averages the gradients of {type(model).__name__}.",
            "Wrap it in torch.nn.parallel.DistributedDataParallel, or shard it with fully_shard.",
        )
    return Ranks(num, found, wrapper, not isinstance(wrapper, _replicated()))


def _group_of(wrapper: Any) -> Any:
    """The ranks of a wrapper that have different data; None: all.

    FSDP1 that shards within a node and replicates over nodes names the ranks of the node alone
    (``ShardingStrategy.HYBRID_SHARD``), and averages over all.  A module of fully_shard names none.  Where several
    ranks have the same data all of them are as good: the tokens and the ranks are then counted as often.
    """
    strategy = getattr(getattr(wrapper, "sharding_strategy", None), "name", "")
    return None if "HYBRID" in strategy else getattr(wrapper, "process_group", None)


def _replicated() -> type:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel


def agreed(ranks: Ranks, counts: Sequence[torch.Tensor | int], device: torch.device) -> int:
    """Tokens of all micro-batches of all ranks.

    Raises:
        UsageError: a rank has no micro-batch, or fewer than another where forward passes meet; on every rank.
    """
    import torch

    mine = torch.zeros((), dtype=torch.int64, device=device)
    for one in counts:
        mine += one.to(device) if isinstance(one, torch.Tensor) else int(one)
    num = len(counts)
    if ranks.num > 1:
        most, minus_fewest = ranks.most(torch.tensor([num, -num], device=device)).tolist()
        num = -minus_fewest
        if ranks.forwards_meet and most != num:
            raise UsageError(
                f"Some ranks have {num} micro-batches and others {most}: sharded ranks wait for each other.",
                "Give every rank the same number, for example with drop_last=True.",
            )
    if num == 0:
        raise UsageError("There is a rank without a micro-batch.", "Give each one sample at least, or leave the step.")
    return int(ranks.sum(mine))
