"""The gradients of the means that a step could have taken, and how well each explains the one it took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.accumulation.splitting import split
from memplan.equivalence.diagnosis import MICRO, RANK, SAMPLE, TOKEN, Match, Window
from memplan.equivalence.runner.case import gradient_of, relative

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from memplan.equivalence.runner.case import Case

    Micro = Sequence[Sequence[Any]]
    """Micro-batches of one step, by rank."""

ALIKE = 1e-9
"""Two means whose weights differ by less are one."""


def means_of(case: Case, micro_batches: Micro, *, samples: bool) -> dict[str, torch.Tensor]:
    """Mean -> its gradient, over one step of all ranks; `samples`: that of samples, too, if one can be alone."""
    parts = [part for rank in micro_batches for part in rank]
    sizes = [int(case.num_losses(part)) for part in parts]
    weights = {
        TOKEN: [size / max(sum(sizes), 1) for size in sizes],
        MICRO: [1 / len(parts)] * len(parts),
        RANK: _by_rank(case, micro_batches),
    }
    found: dict[str, torch.Tensor] = {}
    for name, own in weights.items():
        twin = next((other for other in found if _alike(own, weights[other])), None)
        found[name] = gradient_of(case, parts, own) if twin is None else found[twin]
    if samples:
        found |= _of_samples(case, parts)
    return found


def _of_samples(case: Case, parts: Sequence[Any]) -> dict[str, torch.Tensor]:
    alone = [one for part in parts for one in split(part, 1)]
    sizes = [int(case.num_losses(one)) for one in alone]
    if min(sizes) == 0:
        return {}
    return {SAMPLE: gradient_of(case, alone, [1 / len(alone)] * len(alone))}


def _by_rank(case: Case, micro_batches: Micro) -> list[float]:
    weights = []
    for rank in micro_batches:
        sizes = [int(case.num_losses(part)) for part in rank]
        weights += [size / max(sum(sizes), 1) / len(micro_batches) for size in sizes]
    return weights


def _alike(these: Sequence[float], those: Sequence[float]) -> bool:
    return all(abs(a - b) < ALIKE for a, b in zip(these, those, strict=True))


def window_of(
    found: torch.Tensor, means: Mapping[str, torch.Tensor], num_micro_batches: int, num_tokens: int
) -> Window:
    """A step's gradient, explained by each mean up to a factor."""
    matches = {}
    for name, mean in means.items():
        ratio = float(found @ mean / (mean @ mean))
        matches[name] = Match(ratio, float((found - ratio * mean).norm() / (found.norm() or 1)))
    return Window(num_micro_batches, relative(found, means[TOKEN]), num_tokens, matches)
