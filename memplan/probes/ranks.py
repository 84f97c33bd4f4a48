"""Data-parallel ranks: torchrun starts the processes, DistributedDataParallel adds up their gradients."""

from __future__ import annotations

import contextlib
import datetime
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

dist: Any = torch.distributed  # its names are in no list that type checkers read

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
TIMEOUT = datetime.timedelta(minutes=5)


@contextlib.contextmanager
def data_parallel(rank: int, size: int, device_type: str, index: int) -> Iterator[Callable[[Any, str], Any]]:
    """A process group of all ranks; gives what wraps a module in DistributedDataParallel as the Trainer does.

    torchrun's own store is used where it keeps one, under a name of its own.
    """
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not hosted,
        timeout=TIMEOUT,
    )
    if device_type == "cuda":
        torch.cuda.set_device(index)
    dist.init_process_group(
        BACKENDS[device_type],
        store=dist.PrefixStore("memplan", store),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )

    def wrap(module: Any, device: str) -> Any:
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(module, device_ids=[index] if device == "cuda" else None)

    try:
        yield wrap
    finally:
        dist.destroy_process_group()
