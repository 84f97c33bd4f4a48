"""`memplan.accumulate` on sharded parameters, on four ranks: FSDP1 and FSDP2, nested, hybrid, and with twins."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import memplan
from memplan.accumulation.losses import causal_lm_loss
from memplan.accumulation.splitting import split
from tests.support.language_models import Tiny, ragged, relative, whole_gradient
from tests.support.ranks import on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    Wrap = Callable[[nn.Module], nn.Module]

pytestmark = pytest.mark.slow

SAME = 1e-5
NUM_MICRO_BATCHES = 3
SIZES = (6, 3, 3, 9)
"""Samples of each rank: other numbers of samples and tokens."""
CLIPPED_TO = 0.1
"""Of the norm of the gradient."""


def batch_of(rank: int, sizes: tuple[int, ...], whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = sum(sizes[:rank])
    return {name: value[start : start + sizes[rank]] for name, value in whole.items()}


def untied() -> nn.Module:
    """Sharding has no tied parameters."""
    model = Tiny()
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone() * 0.7)
    return model


def wrappers() -> dict[str, Wrap]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def flat(strategy: str, **given: object) -> Wrap:
        chosen = {"sharding_strategy": ShardingStrategy[strategy], "use_orig_params": True, **given}
        return lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), **chosen)

    def inside(wrap: Wrap) -> Wrap:
        def nested(model: nn.Module) -> nn.Module:
            model.layer = wrap(model.layer)
            return wrap(model)

        return nested

    return {
        **{f"FSDP1 {name}": flat(name) for name in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")},
        "FSDP1 nested": inside(flat("FULL_SHARD")),
        "FSDP1 hybrid": flat("HYBRID_SHARD", device_mesh=mesh),
        "FSDP1 hybrid, gathered once": flat("_HYBRID_SHARD_ZERO2", device_mesh=mesh),
        "FSDP2": fully_shard,
        "FSDP2 nested": inside(fully_shard),
        "FSDP2 hybrid": lambda model: fully_shard(model, mesh=mesh),
        "FSDP2 over two of four, which have twins": lambda model: fully_shard(model, mesh=mesh["outer"]),
    }


NAMES = (
    "FSDP1 FULL_SHARD",
    "FSDP1 SHARD_GRAD_OP",
    "FSDP1 NO_SHARD",
    "FSDP1 nested",
    "FSDP1 hybrid",
    "FSDP1 hybrid, gathered once",
    "FSDP2",
    "FSDP2 nested",
    "FSDP2 hybrid",
    "FSDP2 over two of four, which have twins",
)


def gathered(model: nn.Module) -> torch.Tensor:
    """The whole gradient, on every rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return torch.cat([one.grad.flatten() for one in model.parameters()])
    return torch.cat([one.grad.full_tensor().flatten() for one in model.parameters()])


def naive(model: nn.Module, batch: dict[str, torch.Tensor], size: int) -> None:
    for one in split(batch, size):
        total, num = causal_lm_loss(model, one)
        (total / num / NUM_MICRO_BATCHES).backward()


def errors(rank: int) -> dict[str, tuple[float, float, float]]:
    """Of the clipped gradient, of its norm before, and of what naive averaging makes of the same batch."""
    warnings.simplefilter("ignore")  # FSDP1 says that it is deprecated
    found = {}
    for name, wrap in wrappers().items():
        sizes, place = (SIZES[:2], rank // 2) if "twins" in name else (SIZES, rank)
        whole = ragged(sum(sizes), 9, seed=4)
        wanted = whole_gradient(untied(), whole)
        mine, micro_batch = batch_of(place, sizes, whole), sizes[place] // NUM_MICRO_BATCHES
        model = wrap(untied())
        limit = CLIPPED_TO * float(wanted.norm())
        step = memplan.accumulate(model, mine, micro_batch_size=micro_batch, max_grad_norm=limit)
        clipped, norm = relative(gathered(model), CLIPPED_TO * wanted), float(step.grad_norm / wanted.norm())
        model.zero_grad()
        naive(model, mine, micro_batch)
        found[name] = (clipped, abs(norm - 1), relative(gathered(model), wanted))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[float, float, float]]]:
    return on_ranks(errors, len(SIZES))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_whole_batch(ranks: list[dict[str, tuple[float, float, float]]], name: str) -> None:
    """Clipped once, to a tenth: clipping every micro-step, or each rank by itself, would leave another."""
    for found in ranks:
        clipped, norm, of_naive = found[name]
        assert clipped < SAME
        assert norm < SAME
        assert of_naive > 1000 * SAME


def test_all_wrappers_are_named(ranks: list[dict[str, tuple[float, float, float]]]) -> None:
    assert [list(found) for found in ranks] == [list(NAMES)] * len(SIZES)
