"""What does memory buy in time?  Every split of the batch with every way of checkpointing that is open.

Bytes are the least that the allocator can hold (as the search compares them; only what it chooses is replayed), times
the lower bounds that the search ranks by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.estimation.sweep import spread
from memplan.planner.search import Search, undominated
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimator
    from memplan.planner.goal import Goal
    from memplan.planner.plan import Candidate
    from memplan.specs.training import Setup

MOST_SPLITS = 12
"""Of a batch with many divisors, spread over all of them."""


class FrontierPoint(NamedTuple):
    """A configuration that reaches the batch."""

    candidate: Candidate
    is_undominated: bool
    """Whether no other takes both less memory and less time."""
    is_plan: bool


def frontier(estimator: Estimator, goal: Goal, setup: Setup) -> tuple[FrontierPoint, ...]:
    """All of them, fastest first; `setup` is the plan's, and always among them."""
    look = Search(estimator, goal)
    splits = list(goal.splits())
    own = (setup.micro_batch_size, setup.gradient_accumulation_steps)
    chosen = {splits[n] for n in spread(len(splits), MOST_SPLITS)} | {own}
    setups = [goal.at(*split, mode) for mode in goal.modes() for split in splits if split in chosen]
    candidates = [look.candidate(one) for one in setups]
    best = undominated(candidates)
    points = [FrontierPoint(one, one in best, one.setup == setup) for one in candidates]
    return tuple(sorted(points, key=lambda p: (p.candidate.step_time.total_s, -p.candidate.headroom_bytes)))
