"""The whole measurement on one rank: the model, then each step function, over two full windows and a short one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from memplan.accumulation.splitting import split
from memplan.equivalence.records import loop_record, subject_record
from memplan.equivalence.runner.case import counted, gradient_of, make_case, num_samples, picked, ragged
from memplan.equivalence.runner.loops import measure_loop, naive_step, normalised_step
from memplan.equivalence.runner.means import means_of
from memplan.equivalence.runner.subject import measure_subject
from memplan.equivalence.runner.suspects import suspects_of, switched_off
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from memplan.equivalence.runner.case import Case
    from memplan.equivalence.runner.loops import StepFunction

    Record = dict[str, Any]

FULL_WINDOWS = 2
SEED = 0


class Shape(NamedTuple):
    """How a step is cut."""

    micro_batch_size: int
    accumulation: int
    ranks: int
    seq_len: int

    @property
    def windows(self) -> tuple[int, ...]:
        """Micro-steps of each window: full ones, and a short one where it can be shorter."""
        full = (self.accumulation,) * FULL_WINDOWS
        return (*full, (self.accumulation + 1) // 2) if self.accumulation > 1 else full

    @property
    def num_samples(self) -> int:
        """Of all windows and ranks."""
        return self.micro_batch_size * self.ranks * sum(self.windows)


def measure(
    module: nn.Module,
    make_inputs: Callable[[int, int], Any],
    loss_of: Callable[[Any], torch.Tensor] | None,
    shape: Shape,
    *,
    step: StepFunction | None = None,
    rank: int = 0,
) -> Record:
    """Everything that `memplan.equivalence.diagnosis` judges by, as plain data; the same on every rank.

    Args:
        module: In fp32, on the CPU; the same on every rank.
        make_inputs: (samples, length) -> what the module is called with.
        loss_of: Its output -> the mean loss; None: it is, or has, its own.
        shape: Of the steps.
        step: The user's own step function.
        rank: This one; across ranks a process group is there.
    """
    torch.manual_seed(SEED)
    num_parameters = sum(one.numel() for one in module.parameters())
    batch = ragged(make_inputs(shape.num_samples, shape.seq_len), SEED)
    case = make_case(module, loss_of)
    first = picked(batch, torch.arange(shape.micro_batch_size * shape.ranks * shape.accumulation))
    with switched_off(module, suspects_of(module)):
        case = counted(case, first, shape.micro_batch_size)
    subject, guilty = measure_subject(case, first, shape.micro_batch_size)
    with switched_off(module, guilty):
        _freeze_unused(case, first)
        windows = _windows(batch, shape)
        alone = not subject.doubled
        means = [means_of(case, window, samples=alone) for window in windows]
        case, model = _shared(case, shape)
        functions = {"naive": naive_step(case), "normalised": normalised_step(case)}
        if step is not None:
            functions["own"] = step
        loops = {
            name: loop_record(measure_loop(case, model, function, windows, means, rank))
            for name, function in functions.items()
        }
    return {
        "subject": subject_record(subject),
        "loops": loops,
        "count": case.num_losses.__name__,
        "num_parameters": num_parameters,
        "shape": shape._asdict(),
    }


def _shared(case: Case, shape: Shape) -> tuple[Case, nn.Module]:
    """What step functions get: across ranks a copy of the module, with hooks that share its gradients."""
    if shape.ranks == 1:
        return case, case.module
    copied = case._replace(module=copy.deepcopy(case.module))
    return copied, torch.nn.parallel.DistributedDataParallel(copied.module)


def _windows(batch: Any, shape: Shape) -> list[list[list[Any]]]:
    """Micro-batches by window, rank and micro-step."""
    parts = iter(split(batch, shape.micro_batch_size))
    assert num_samples(batch) == shape.num_samples
    return [[[next(parts) for _ in range(num)] for _ in range(shape.ranks)] for num in shape.windows]


def _freeze_unused(case: Case, batch: Any) -> None:
    """Parameters that no gradient reaches: DistributedDataParallel would wait for theirs."""
    total, _ = case.loss(case.module, batch)
    case.module.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    for one in case.module.parameters():
        if one.grad is None:
            one.requires_grad_(False)
    gradient_of(case, [batch], [1.0])
