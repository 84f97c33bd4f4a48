"""Steps, run: micro-averaging, memplan's own, and the user's, each against the gradients of all means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import memplan.accumulation.step as accumulation
from memplan.equivalence.diagnosis import SAME_UPDATE, Loop
from memplan.equivalence.runner.case import relative, vector
from memplan.equivalence.runner.means import window_of
from memplan.equivalence.runner.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from memplan.equivalence.runner.case import Case

    StepFunction = Callable[[nn.Module, list[Any]], Any]
    """(module, this rank's micro-batches of one step): leaves its gradient in the parameters, and does not step."""

SMALLER = 2.0**-30
"""Gradients times this are below any threshold of clipping; a power of two rounds nothing."""


def naive_step(case: Case) -> StepFunction:
    """The mean of the micro-batches' means, as loops had it before 2024 and many have it still."""

    def step(model: nn.Module, micro_batches: list[Any]) -> None:
        for at, one in enumerate(micro_batches, 1):
            total, num = case.loss(model, one)
            mean = total / max(int(num), 1) / len(micro_batches)
            if at < len(micro_batches) and isinstance(model, torch.nn.parallel.DistributedDataParallel):
                with model.no_sync():
                    mean.backward()  # type: ignore[no-untyped-call]
            else:
                mean.backward()  # type: ignore[no-untyped-call]

    return step


def normalised_step(case: Case) -> StepFunction:
    """`memplan.accumulate`."""

    def step(model: nn.Module, micro_batches: list[Any]) -> None:
        accumulation.accumulate(model, micro_batches, loss=case.loss, count=case.num_losses)

    return step


def measure_loop(
    case: Case,
    model: nn.Module,
    step: StepFunction,
    steps: Sequence[Sequence[Sequence[Any]]],
    means: Sequence[Mapping[str, torch.Tensor]],
    rank: int = 0,
) -> Loop:
    """Run a step function over windows.

    Args:
        case: What is trained, with the module that `model` is or wraps.
        model: As the step function gets it: across ranks in DistributedDataParallel.
        step: The function.
        steps: Micro-batches by window, rank and micro-step.
        means: The gradients of all means, by window.
        rank: This one.
    """
    windows, unclipped, gradients, smaller = [], [], [], []
    is_changed, kept_in, autocast = False, "", ""
    for window, wanted in zip(steps, means, strict=True):
        mine = list(window[rank])
        found, watch = _run(case, model, step, mine, 1.0)
        gradients.append(found)
        windows.append(window_of(found, wanted, len(mine), _num_tokens(case, window)))
        is_changed |= watch.is_changed
        autocast = autocast or watch.autocast
        kept_in = kept_in or watch.kept_in(len(mine))
    if any(not one.error <= SAME_UPDATE for one in windows):
        for window, wanted in zip(steps, means, strict=True):
            found, _ = _run(case, model, step, list(window[rank]), SMALLER)
            smaller.append(found / SMALLER)
            unclipped.append(window_of(smaller[-1], wanted, len(window[rank]), _num_tokens(case, window)))
    sizes = [int(case.num_losses(part)) for each in steps[0] for part in each]
    case.restore()
    return Loop(
        windows=windows,
        accumulation=len(steps[0][rank]),
        ranks=len(steps[0]),
        spread=max(sizes) / max(min(sizes), 1),
        unclipped=unclipped,
        is_clipped_whole=bool(smaller) and all(map(_is_clipped, gradients, smaller)),
        is_changed_between=is_changed,
        kept_in=kept_in,
        autocast=autocast,
    )


def _num_tokens(case: Case, window: Sequence[Sequence[Any]]) -> int:
    return sum(int(case.num_losses(part)) for each in window for part in each)


def _is_clipped(found: torch.Tensor, unclipped: torch.Tensor) -> bool:
    """Whether a gradient is another one clipped as a whole, by its norm or by its values."""
    shorter = unclipped * (found.norm() / unclipped.norm())
    cut_off = unclipped.clamp(-found.abs().max(), found.abs().max())
    return min(relative(shorter, found), relative(cut_off, found)) <= SAME_UPDATE


def _run(
    case: Case, model: nn.Module, step: StepFunction, micro_batches: list[Any], scale: float
) -> tuple[torch.Tensor, Watch]:
    """The gradient that a step leaves behind."""
    case.restore()
    with Watch(case.module, scale) as watch:
        step(model, micro_batches)
    return vector(case.module), watch
