"""Which is the smallest card that would hold a configuration?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.estimation.estimate import context_bytes, workspace_bytes
from memplan.specs.margin import Margin

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memplan.planner.goal import Goal
    from memplan.planner.plan import Candidate
    from memplan.specs.gpu import GpuSpec

MOST_CARDS = 4


def cards_that_hold(candidate: Candidate, goal: Goal, gpus: Iterable[GpuSpec]) -> list[dict[str, Any]]:
    """The smallest cards of `gpus` on which `candidate` fits, with the reserve and the headroom of `goal`.

    The context and the workspaces are those of each card.
    """
    found = []
    for gpu in gpus:
        process = candidate.memory.peak_reserved_bytes + context_bytes(gpu) + workspace_bytes(gpu)
        headroom = int(gpu.usable_bytes * goal.headroom_percent / 100)
        bound = Margin(headroom + goal.reserve_bytes, goal.bound_ratio).upper_bound(process)
        if bound <= gpu.usable_bytes:
            found.append(
                {
                    "name": gpu.name,
                    "label": gpu.label,
                    "usable_bytes": gpu.usable_bytes,
                    "is_from_nvidia_smi": gpu.is_from_nvidia_smi,
                    "headroom_bytes": gpu.usable_bytes - bound,
                }
            )
    return sorted(found, key=lambda card: (card["usable_bytes"], card["name"]))[:MOST_CARDS]
