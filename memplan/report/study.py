"""A study as plain data: what the page of a plan shows, and what is embedded in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.document import envelope, row_document
from memplan.report.what_if import what_if_document

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimate
    from memplan.estimation.profile import Profile
    from memplan.planner.what_if import WhatIf

    Document = dict[str, Any]


def study_document(
    plan: Document, estimate: Estimate, command: str, profile: Profile | None, what_if: WhatIf | None = None
) -> Document:
    """What the page of a plan shows.

    Args:
        plan: The document of the plan.
        estimate: Everything about its best configuration, or about the nearest where nothing fits.
        command: The command line that makes the plan.
        profile: How the memory of a run goes up and down; None where it is not known.
        what_if: What other sizes and choices take; None where it is not known.
    """
    return {
        **envelope("report"),
        "plan": plan,
        "command": command,
        "ledger": [row_document(row) for row in estimate.ledger],
        "profile": None if profile is None else profile_document(profile),
        "what_if": None if what_if is None else what_if_document(what_if, command),
    }


def profile_document(profile: Profile) -> Document:
    """How memory goes up and down, by kind: a list of kinds, and bytes in their order for each point."""
    kinds = list(dict.fromkeys(kind for point in profile.points for kind in point.by_kind))
    return {
        "kinds": kinds,
        "points": [[point.at, *(point.by_kind.get(kind, 0) for kind in kinds)] for point in profile.points],
        "parts": [part._asdict() for part in profile.parts],
    }
