"""A study as plain data: what the page of a plan shows, and what is embedded in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.document import envelope, row_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.estimation.estimate import Estimate
    from memplan.estimation.profile import Profile

    Document = dict[str, Any]


def study_document(
    plan: Document,
    estimate: Estimate | None,
    command: str,
    profile: Profile | None,
    *,
    notes: Sequence[str] = (),
) -> Document:
    """What the page of a plan shows.

    Args:
        plan: The document of the plan.
        estimate: Everything about its best configuration, or about the nearest where nothing fits; None for a plan
            from a file whose model is not to be had.
        command: The command line that makes the plan.
        profile: How the memory of a run goes up and down; None where it is not known.
        notes: What there is to say about the page itself, such as a plan that another version of memplan made.
    """
    return {
        **envelope("report"),
        "plan": plan,
        "command": command,
        "notes": list(notes),
        "ledger": [] if estimate is None else [row_document(row) for row in estimate.ledger],
        "profile": None if profile is None else profile_document(profile),
    }


def profile_document(profile: Profile) -> Document:
    """How memory goes up and down, by kind: a list of kinds, and bytes in their order for each point."""
    kinds = list(dict.fromkeys(kind for point in profile.points for kind in point.by_kind))
    return {
        "kinds": kinds,
        "points": [[point.at, *(point.by_kind.get(kind, 0) for kind in kinds)] for point in profile.points],
        "parts": [part._asdict() for part in profile.parts],
    }
