"""A plan and everything that shows why: what a report is made of.

    study = memplan.studies.study("llama-3-8b", gpu="h100", target_batch=32, optimizer="adamw-8bit")

The plan is that of `memplan.api.suggest`; beside it stand the bytes of other sizes and choices, each by the estimator
that the plan is made by.  Left out: how it looks.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memplan import api
from memplan.catalog.accuracy import read_accuracy
from memplan.catalog.measurements import read_all_measurements
from memplan.estimation.growth import growth
from memplan.estimation.profile import profile_of
from memplan.planner.frontier import frontier
from memplan.planner.maps import maps
from memplan.planner.study import Study
from memplan.planner.what_if import what_if
from memplan.specs.values import replace

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.estimation.estimate import Estimate
    from memplan.estimation.profile import Profile
    from memplan.planner.plan import Plan
    from memplan.specs.measurement import Measurement
    from memplan.specs.training import Setup


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
        return Study(plan=plan, origin=found.origin, accuracy=read_accuracy())
    estimator = api.estimator_of(found, plan.gpu, api.find_speed(plan.gpu))
    bare = Study(plan=plan, origin=found.origin, accuracy=read_accuracy())
    tell("following one step")
    bare = replace(bare, profile=profile_of(estimator, bare.setup), measured=_measured(found, bare.setup))
    tell("looking around it")
    around = replace(
        bare,
        maps=maps(estimator, plan.goal, bare.setup),
        growth=growth(estimator, bare.setup),
        frontier=frontier(estimator, plan.goal, bare.setup),
    )
    tell("asking what if")
    return replace(around, what_if=what_if(estimator, plan.goal, bare.setup))


def _measured(model: api.Model, setup: Setup) -> tuple[Measurement, ...]:
    """What was measured of the same model and setup, newest first."""
    records = read_all_measurements(os.environ).measurements
    alike = [one for one in records if one.trial.setup == setup and one.trial.config == model.values and one.steps]
    return tuple(sorted(alike, key=lambda one: one.measured_at, reverse=True))


def profile_of_estimate(found: Estimate, model: api.Model | api.UserModule) -> Profile | None:
    """How memory goes up and down in the first two steps of an estimate; None for what is known from traces alone."""
    if isinstance(model, api.UserModule):
        return None
    return profile_of(api.estimator_of(model, found.gpu), found.setup)
