"""How does the memory of a run go up and down, by kind?  The timeline, thinned to what an eye can tell apart.

Left out: times.  Places are numbers of events, as an allocator sees them; most of a step's seconds pass between few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.estimation.step import OPTIMIZER
from memplan.estimation.timeline import timeline
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from memplan.estimation.estimate import Estimator
    from memplan.estimation.timeline import Moment
    from memplan.specs.training import Setup

MOST_POINTS = 150

SHOWN_MICRO_STEPS = 2
"""Micro-steps of a step that is followed: the third is as the second."""


class Point(NamedTuple):
    """What is there at one place."""

    at: int
    """Number of the event."""
    by_kind: dict[str, int]
    """Allocated bytes of each kind."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_kind.values())


class Part(NamedTuple):
    """A part of the run: from here on until the next one."""

    at: int
    name: str
    step: int
    """Number of the optimizer step, from 0."""


class Summit(NamedTuple):
    """The allocation at which the run is highest."""

    at: int
    instant: str
    step: int
    module: str
    tensor: str
    num_bytes: int
    """Allocated bytes then, all together."""


class Profile(NamedTuple):
    """A run in at most about twice `MOST_POINTS` points, the highest among them."""

    points: tuple[Point, ...]
    parts: tuple[Part, ...]
    summit: Summit


def profile_of(estimator: Estimator, setup: Setup) -> Profile:
    """The first two steps of a setup."""
    program, sizes, steps = estimator.program(setup), estimator.sizes(setup), setup.gradient_accumulation_steps
    return profile(timeline(program, sizes, steps, most_micro_steps=SHOWN_MICRO_STEPS))


def profile(moments: Iterable[Moment]) -> Profile:
    """The profile of a run; of each stretch of events its highest and its last point stay.

    Raises:
        ValueError: nothing is allocated.
    """
    by_kind: dict[str, int] = {}
    points: list[Point] = []
    parts: list[Part] = []
    summit: Summit | None = None
    step = 0
    for at, moment in enumerate(moments):
        if not parts or parts[-1].name != moment.instant:
            step += bool(parts) and parts[-1].name == OPTIMIZER
            parts.append(Part(at, moment.instant, step))
        kind = moment.row.kind
        by_kind[kind] = by_kind.get(kind, 0) + moment.sign * moment.num_bytes
        points.append(Point(at, dict(by_kind)))
        if summit is None or points[-1].total > summit.num_bytes:
            row = moment.row
            summit = Summit(at, moment.instant, step, row.module, row.tensor, points[-1].total)
    if summit is None:
        raise ValueError("a run without an allocation has no profile")
    return Profile(tuple(_thinned(points)), tuple(parts), summit)


def _thinned(points: Sequence[Point]) -> Iterator[Point]:
    stretch = max(1, -(-len(points) // MOST_POINTS))
    for start in range(0, len(points), stretch):
        some = points[start : start + stretch]
        highest = max(some, key=lambda point: point.total)
        yield highest
        if highest is not some[-1]:
            yield some[-1]
