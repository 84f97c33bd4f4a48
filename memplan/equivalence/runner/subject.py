"""Does a module let a batch be cut?  The experiments of `memplan.equivalence.diagnosis.Subject`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memplan.accumulation.splitting import split
from memplan.equivalence.diagnosis import Subject, tolerance
from memplan.equivalence.runner.case import Case, gradient_of, num_samples, picked, relative
from memplan.equivalence.runner.suspects import suspects_of, switched_off

if TYPE_CHECKING:
    from collections.abc import Iterator


def measure_subject(case: Case, batch: Any, micro_batch_size: int) -> tuple[Subject, tuple[str, ...]]:
    """What was found, and the suspects whose absence makes the error go."""
    whole = gradient_of(case, [batch], [1.0])
    again = gradient_of(case, [batch], [1.0])
    backwards = torch.arange(num_samples(batch) - 1, -1, -1)
    floor = relative(gradient_of(case, [picked(batch, backwards)], [1.0]), whole)
    cut = cut_gradient(case, batch, micro_batch_size)
    error = relative(cut, whole)
    residual = float((cut - (cut @ whole) / (whole @ whole) * whole).norm() / (cut.norm() or 1))
    without: list[tuple[tuple[str, ...], float]] = []
    guilty: tuple[str, ...] = ()
    doubled = None
    if not error <= tolerance(floor):
        for names in _sets(suspects_of(case.module)):
            with switched_off(case.module, names):
                alone = gradient_of(case, [batch], [1.0])
                without.append((names, relative(cut_gradient(case, batch, micro_batch_size), alone)))
            if without[-1][1] <= tolerance(floor):
                guilty = names
                break
        else:
            doubled = _doubled(case, batch)
    return Subject(error, relative(again, whole), floor, without, doubled, residual), guilty


def _sets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Each suspect alone, then all of them."""
    yield from ((name,) for name in names)
    if len(names) > 1:
        yield tuple(names)


def cut_gradient(case: Case, batch: Any, micro_batch_size: int) -> torch.Tensor:
    """The gradient of the mean, micro-batch by micro-batch, each token with the same weight."""
    parts = split(batch, micro_batch_size)
    sizes = [int(case.num_losses(part)) for part in parts]
    return gradient_of(case, parts, [size / max(sum(sizes), 1) for size in sizes])


def _doubled(case: Case, batch: Any) -> float:
    """How much the loss grows when each sample is there twice, suspects off."""
    twice = picked(batch, torch.arange(num_samples(batch)).repeat(2))
    means = []
    with switched_off(case.module, suspects_of(case.module)), torch.no_grad():
        for one in (batch, twice):
            case.restore()
            total, num = case.loss(case.module, one)
            means.append(float(total) / max(int(num), 1))
    return means[1] - means[0]
