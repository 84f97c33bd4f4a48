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
    from memplan.specs.measurement import Measurement

    Document = dict[str, Any]


def study_document(
    plan: Document,
    estimate: Estimate,
    command: str,
    profile: Profile | None,
    accuracy: Document,
    *,
    measured: Sequence[Measurement] = (),
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
        accuracy: How near predictions were to measurements (`memplan.report.accuracy.summary`).
        measured: Measurements of that configuration.
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
        "accuracy": accuracy,
        "measured": [measured_document(one) for one in measured],
        "maps": maps_document(maps),
        "growth": None if growth is None else growth_document(growth),
        "frontier": frontier_document(frontier),
        "schedule": schedule_document(schedule(estimate.setup)),
    }


INSTANTS_BY_PHASE = {
    "forward": ("forward",),
    "backward": ("backward",),
    "clip": ("gradient clip",),
    "optimizer": ("optimizer step",),
}
"""Phase of a measured step -> the instants of the formula that lie in it alone: the loss is in two of them."""


def measured_document(measurement: Measurement) -> Document:
    """A measurement of the same configuration: the peaks of its phases in the first step and in the second."""
    return {
        "id": measurement.id,
        "device": measurement.card.device,
        "card": measurement.card.name,
        "measured_at": measurement.measured_at,
        "peak_allocated_bytes": measurement.peak_allocated_bytes,
        "peak_process_bytes": measurement.peak_process_bytes,
        "step_time_s": measurement.step_time_s,
        "phases": [
            {
                "step": step.number,
                "phase": phase.name,
                "instants": list(INSTANTS_BY_PHASE[phase.name]),
                "peak_allocated_bytes": phase.peak_allocated_bytes,
            }
            for step in measurement.steps[:2]
            for phase in step.phases
            if phase.name in INSTANTS_BY_PHASE
        ],
    }


def profile_document(profile: Profile) -> Document:
    """How memory goes up and down, by kind: a list of kinds, and bytes in their order for each point."""
    kinds = list(dict.fromkeys(kind for point in profile.points for kind in point.by_kind))
    return {
        "kinds": kinds,
        "points": [[point.at, *(point.by_kind.get(kind, 0) for kind in kinds)] for point in profile.points],
        "parts": [part._asdict() for part in profile.parts],
        "summit": profile.summit._asdict(),
    }
