"""The process, or one of the processes, in which updates are compared: `python -m memplan.probes.updates ORDER ANSWER`.

ORDER is a file with a JSON object (`memplan.probes.update_launch` writes it); rank 0 writes what was found to ANSWER.
torchrun starts one process a rank, which share gradients over gloo on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.probes.factories import find_factory, unpack
from memplan.probes.faults import FactoryError, clipped
from memplan.probes.inputs import token_inputs
from memplan.probes.miniature import miniature
from memplan.probes.models import transformers_model
from memplan.specs.training import Setup

if TYPE_CHECKING:
    from collections.abc import Callable

    Built = tuple[nn.Module, Callable[[int, int], Any], Callable[[Any], Any] | None]

SEED = 0


def main(order_path: str, answer_path: str) -> int:
    """Carry out an order; 0 where something was found."""
    with open(order_path, encoding="utf-8") as file:
        order = json.load(file)
    rank = int(os.environ.get("RANK", "0"))
    if order["config"] is not None:
        torch.set_num_threads(1)  # small products wait longer for threads than they take; else OMP_NUM_THREADS says it
    try:
        answer, status = {"found": _found(order, rank)}, 0
    except MemplanError as fault:
        answer, status = {"fault": {"cause": fault.cause, "cure": fault.cure}}, 1
    if rank == 0 or status:
        with open(f"{answer_path}.{rank}", "w", encoding="utf-8") as file:
            json.dump(answer, file)
        os.replace(f"{answer_path}.{rank}", answer_path)
    return status


def _found(order: dict[str, Any], rank: int) -> dict[str, Any]:
    from memplan.equivalence.runner.measuring import Shape, measure

    shape = Shape(**order["shape"])
    step = None if order["step"] is None else _own_step(order["step"])
    torch.manual_seed(SEED)
    module, make_inputs, loss_of = build(order)
    if shape.ranks == 1:
        return _measured(measure, module, make_inputs, loss_of, shape, step, rank)
    torch.distributed.init_process_group("gloo")
    try:
        return _measured(measure, module, make_inputs, loss_of, shape, step, rank)
    finally:
        torch.distributed.destroy_process_group()


def _measured(
    measure: Any, module: nn.Module, make_inputs: Any, loss_of: Any, shape: Any, step: Any, rank: int
) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: dict[str, Any] = measure(module, make_inputs, loss_of, shape, step=step, rank=rank)
            return found
    except MemplanError:
        raise
    except Exception as error:
        text = clipped(" ".join(str(error).split()))
        raise FactoryError(
            f"The measurement raises {type(error).__name__}: {text}",
            "Check that the module runs on the CPU in fp32, and a step function on a list of micro-batches.",
        ) from error


def build(order: dict[str, Any]) -> Built:
    """The module of an order, in fp32 on the CPU, with what it is called with and its loss."""
    if order["config"] is not None:
        setup = Setup(precision="fp32", dropout=0.0, attention="eager")
        values = miniature(order["config"], order["shape"]["seq_len"])
        built = transformers_model(values, order["name"]).build(setup)
        return built.module, built.make_inputs, built.loss_of
    module_name, _, factory = order["name"].partition(":")
    try:
        made = find_factory(module_name, factory)()
    except MemplanError:
        raise
    except Exception as error:
        text = clipped(" ".join(str(error).split()))
        raise FactoryError(f"{order['name']} raises {type(error).__name__}: {text}", "Correct the factory.") from error
    module, make_inputs, loss_of = unpack(made, order["name"])
    if not isinstance(made, tuple) and not hasattr(module, "make_inputs"):
        make_inputs = token_inputs(_num_words(module))
    return module.to("cpu", torch.float32), make_inputs, loss_of


def _num_words(module: nn.Module) -> int:
    """Rows of the largest embedding; 2 without one."""
    return max((one.num_embeddings for one in module.modules() if isinstance(one, nn.Embedding)), default=2)


def _own_step(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    return find_factory(module_name, name)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
