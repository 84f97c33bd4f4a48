"""A plan and everything that shows why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.estimation.growth import Growth
    from memplan.estimation.profile import Profile
    from memplan.estimation.sweep import Sweep
    from memplan.planner.frontier import FrontierPoint
    from memplan.planner.plan import Plan
    from memplan.planner.what_if import WhatIf
    from memplan.specs.measurement import Measurement
    from memplan.specs.training import Setup


@dataclass(frozen=True, kw_only=True)
class Study:
    """A plan, and what a page shows beside it; None where nobody knows, for models that are known from traces alone."""

    plan: Plan
    origin: str
    """Why it is this model."""
    profile: Profile | None = None
    """How memory goes up and down in the first two steps of the plan."""
    accuracy: Mapping[str, Any]
    """How near predictions were to measurements, as `memplan.catalog.accuracy` has it."""
    measured: tuple[Measurement, ...] = ()
    """Measurements of that very configuration."""
    maps: tuple[Sweep, ...] = ()
    """Which micro-batches and lengths around it fit, for each way of checkpointing that was open."""
    growth: Growth | None = None
    """How memory grows with both."""
    frontier: tuple[FrontierPoint, ...] = ()
    """What else reaches the batch, with memory and time."""
    what_if: WhatIf | None = None
    """What other sizes and choices take."""

    @property
    def setup(self) -> Setup:
        """The configuration it is about: the best, or the nearest where nothing fits."""
        shown = self.plan.best or self.plan.nearest
        assert shown is not None
        return shown.setup
