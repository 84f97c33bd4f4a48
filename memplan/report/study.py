"""A study as plain data: what the page of a plan shows, and what is embedded in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.planner.schedule import schedule
from memplan.report.beside import frontier_document, growth_document, maps_document, schedule_document
from memplan.report.document import envelope, row_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.estimation.estimate import Estimate
    from memplan.estimation.growth import Growth
    from memplan.estimation.profile import Profile
    from memplan.estimation.sweep import Sweep
    from memplan.planner.frontier import FrontierPoint

    Document = dict[str, Any]


def study_document(
    plan: Document,
    estimate: Estimate,
    command: str,
    profile: Profile | None,
    *,
    maps: Sequence[Sweep] = (),
    growth: Growth | None = None,
    frontier: Sequence[FrontierPoint] = (),
) -> Document:
    """What the page of a plan shows.

    Args:
        plan: The document of the plan.
        estimate: Everything about its best configuration, or about the nearest where nothing fits.
        command: The command line that makes the plan.
        profile: How the memory of a run goes up and down; None where it is not known.
        maps: What fits around it; empty where it is not known.
        growth: How memory grows; None where it is not known.
        frontier: What else reaches the batch; empty where it is not known.
    """
    return {
        **envelope("report"),
        "plan": plan,
        "command": command,
        "ledger": [row_document(row) for row in estimate.ledger],
        "profile": None if profile is None else profile_document(profile),
        "maps": maps_document(maps),
        "growth": None if growth is None else growth_document(growth),
        "frontier": frontier_document(frontier),
        "schedule": schedule_document(schedule(estimate.setup)),
    }


def profile_document(profile: Profile) -> Document:
    """How memory goes up and down, by kind: a list of kinds, and bytes in their order for each point."""
    kinds = list(dict.fromkeys(kind for point in profile.points for kind in point.by_kind))
    return {
        "kinds": kinds,
        "points": [[point.at, *(point.by_kind.get(kind, 0) for kind in kinds)] for point in profile.points],
        "parts": [part._asdict() for part in profile.parts],
    }
