"""A function on several ranks: gloo on the CPU, in processes that share one import of torch where the system can."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing

if TYPE_CHECKING:
    from collections.abc import Callable

IMPORTED_ONCE = ["torch", "torch.distributed.fsdp", "torch.nn.parallel"]
"""In the server that ranks are forked from; it runs nothing, so that it has no threads."""


def on_ranks(work: Callable[..., Any], num: int, *given: Any) -> list[Any]:
    """What ``work(rank, *given)`` returns on each of `num` ranks."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_run, (num, folder, work, given), nprocs=num, start_method=method)
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(num)]


def _run(rank: int, num: int, folder: str, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{os.path.join(folder, 'store')}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=num)
    try:
        torch.save(work(rank, *given), os.path.join(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()
