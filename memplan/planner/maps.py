"""Which micro-batches and lengths fit around a plan?  A sweep for each way of checkpointing that was open.

Each sweep is of training steps with the plan's accumulation; an evaluation between them is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.estimation.sweep import Sweep, sweep
from memplan.planner.levers import SHORTEST
from memplan.specs.values import replace

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimator
    from memplan.planner.goal import Goal
    from memplan.specs.training import Setup

SHOWN_MODES = ("none", "every-2", "full")
"""Beside the plan's own: what saves nothing, half and all."""

NUM_SIZES = 5
"""Micro-batches, and lengths."""


def maps(estimator: Estimator, goal: Goal, setup: Setup) -> tuple[Sweep, ...]:
    """Around `setup`, its own way of checkpointing first.

    Args:
        estimator: The model and the GPU.
        goal: What was asked for: what has to stay free, and which ways of checkpointing are open.
        setup: The configuration in the middle.
    """
    own = setup.activation_checkpointing
    bare = replace(setup, evaluation=None)
    batches = doublings(setup.micro_batch_size, 1)
    lengths = [n for n in doublings(setup.seq_len, SHORTEST) if n == setup.seq_len or estimator.other(bare, seq_len=n)]
    modes = (own, *(mode for mode in SHOWN_MODES if mode in goal.modes() and mode != own))
    return tuple(
        sweep(estimator, replace(bare, activation_checkpointing=mode), batches, lengths, margin=goal.margin)
        for mode in modes
    )


def doublings(size: int, least: int) -> list[int]:
    """Halves and doubles of `size`, itself among them: two below where they are whole and not below `least`."""
    start = size
    for _ in range(NUM_SIZES // 2):
        if start % 2 == 0 and start // 2 >= least:
            start //= 2
    return [start << n for n in range(NUM_SIZES)]
