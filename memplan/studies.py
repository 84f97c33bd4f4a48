"""A plan and everything that shows why: what a report is made of.

    study = memplan.studies.study("llama-3-8b", gpu="h100", target_batch=32, optimizer="adamw-8bit")

The plan is that of `memplan.api.suggest`; beside it stand the bytes of other sizes and choices, each by the estimator
that the plan is made by.  Left out: how it looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan import api
from memplan.estimation.profile import profile
from memplan.estimation.timeline import timeline
from memplan.specs.values import dataclass, replace

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from memplan.estimation.estimate import Estimate, Estimator
    from memplan.estimation.profile import Profile
    from memplan.planner.plan import Plan
    from memplan.specs.training import Setup

SHOWN_MICRO_STEPS = 2
"""Micro-steps of a step that is drawn: the third is as the second."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A plan, and what a page shows beside it; None where nobody knows, for models that are known from traces alone."""

    plan: Plan
    origin: str
    """Why it is this model."""
    profile: Profile | None = None
    """How memory goes up and down in the first two steps of the plan."""

    @property
    def setup(self) -> Setup:
        """The configuration it is about: the best, or the nearest where nothing fits."""
        shown = self.plan.best or self.plan.nearest
        assert shown is not None
        return shown.setup


def study(
    model: str | os.PathLike[str] | api.Model | api.UserModule | None = None,
    *,
    gpu: str,
    notify: Callable[[str], None] | None = None,
    **choices: Any,
) -> Study:
    """Everything about the plan that `memplan.api.suggest` makes of the same arguments.

    `notify` is told what is being worked out.

    Raises:
        UsageError: a value or a combination has no meaning, or the target cannot be divided exactly.
        MemplanError: the model cannot be read or modelled.
    """
    found = api.find_trained(model, choices)
    tell = notify or (lambda _: None)
    tell("planning")
    return study_of(api.suggest(found, gpu=gpu, **choices), found, notify=notify)


def study_of(plan: Plan, found: api.Model | api.UserModule, *, notify: Callable[[str], None] | None = None) -> Study:
    """Everything about a plan that `memplan.api.suggest` made for the model `found`."""
    tell = notify or (lambda _: None)
    if isinstance(found, api.UserModule):
        return Study(plan=plan, origin=found.origin)
    estimator = api.estimator_of(found, plan.gpu, api.find_speed(plan.gpu))
    bare = Study(plan=plan, origin=found.origin)
    tell("following one step")
    return replace(bare, profile=_profile(estimator, bare.setup))


def profile_of(found: Estimate, model: api.Model | api.UserModule) -> Profile | None:
    """How memory goes up and down in the first two steps of an estimate; None for what is known from traces alone."""
    if isinstance(model, api.UserModule):
        return None
    return _profile(api.estimator_of(model, found.gpu), found.setup)


def _profile(estimator: Estimator, setup: Setup) -> Profile:
    steps = min(setup.gradient_accumulation_steps, SHOWN_MICRO_STEPS)
    return profile(timeline(estimator.program(setup), estimator.sizes(setup), steps))
