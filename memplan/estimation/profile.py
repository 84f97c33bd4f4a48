"""How does the memory of a run go up and down, by kind?  The timeline, thinned to what an eye can tell apart.

Left out: times.  Places are numbers of events, as an allocator sees them; most of a step's seconds pass between few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.estimation.timeline import timeline
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

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


class Profile(NamedTuple):
    """A run in at most about twice `MOST_POINTS` points, the highest among them."""

    points: tuple[Point, ...]
    parts: tuple[Part, ...]

    @property
    def highest(self) -> Point:
        """The first of the highest points."""
        return max(self.points, key=lambda point: point.total)


def profile_of(estimator: Estimator, setup: Setup) -> Profile:
    """The first two steps of a setup."""
    steps = min(setup.gradient_accumulation_steps, SHOWN_MICRO_STEPS)
    return profile(timeline(estimator.program(setup), estimator.sizes(setup), steps))


def profile(moments: Iterable[Moment]) -> Profile:
    """The profile of a run; of each stretch of events its highest and its last point stay."""
    by_kind: dict[str, int] = {}
    points: list[Point] = []
    parts: list[Part] = []
    for at, moment in enumerate(moments):
        if not parts or parts[-1].name != moment.instant:
            parts.append(Part(at, moment.instant))
        kind = moment.row.kind
        by_kind[kind] = by_kind.get(kind, 0) + moment.sign * moment.num_bytes
        points.append(Point(at, dict(by_kind)))
    stretch = max(1, -(-len(points) // MOST_POINTS))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        some = points[start : start + stretch]
        highest = max(some, key=lambda point: point.total)
        kept += [highest] if highest is some[-1] else [highest, some[-1]]
    return Profile(tuple(kept), tuple(parts))
