"""A study as plain data: what the page of a plan shows, and what is embedded in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.planner.schedule import schedule
from memplan.report.beside import frontier_document, growth_document, maps_document, schedule_document
from memplan.report.document import envelope, row_document
from memplan.report.what_if import what_if_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.estimation.profile import Profile
    from memplan.planner.study import Study
    from memplan.specs.measurement import Measurement

    Document = dict[str, Any]


def study_document(study: Study | None, plan: Document, command: str, *, notes: Sequence[str] = ()) -> Document:
    """What the page of a plan shows.

    Args:
        study: The plan, and what shows why; None for a plan from a file whose model is not to be had.
        plan: The document of the plan.
        command: The command line that makes it.
        notes: What there is to say about the page itself, such as a plan that another version of memplan made.
    """
    return {
        **envelope("report"),
        "plan": plan,
        "command": command,
        "notes": list(notes),
        **(UNKNOWN if study is None else _known(study, command)),
    }


UNKNOWN: Document = {
    "ledger": [],
    "profile": None,
    "accuracy": None,
    "measured": [],
    "maps": [],
    "growth": None,
    "frontier": [],
    "schedule": None,
    "what_if": None,
}
"""What is said of a plan whose model is not to be had."""


def _known(study: Study, command: str) -> Document:
    estimate = study.plan.estimate
    return {
        "ledger": [row_document(row) for row in estimate.ledger],
        "profile": None if study.profile is None else profile_document(study.profile),
        "accuracy": dict(study.accuracy),
        "measured": [measured_document(one) for one in study.measured],
        "maps": maps_document(study.maps),
        "growth": None if study.growth is None else growth_document(study.growth),
        "frontier": frontier_document(study.frontier),
        "schedule": schedule_document(schedule(estimate.setup)),
        "what_if": None if study.what_if is None else what_if_document(study.what_if, command),
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
