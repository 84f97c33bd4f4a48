"""The answer to "what should I run": the best configuration, the next ones, what was refused, what each lever gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.specs.pictured import PicturedPlan
from memplan.specs.tabular import Tabular
from memplan.specs.values import NamedTuple, dataclass

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimate, Memory, ModelSummary
    from memplan.planner.feed import Feed
    from memplan.planner.goal import Goal, Target
    from memplan.planner.long_accumulation import LongAccumulation
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.training import Setup
    from memplan.steptime.step import StepTime


class Candidate(NamedTuple):
    """A configuration with its bytes and its time."""

    setup: Setup
    memory: Memory
    upper_bound_bytes: int
    """Process bytes plus the headroom that has to stay free and what is reserved for others."""
    headroom_bytes: int
    """Usable bytes of the card less the upper bound; negative: missing."""
    step_time: StepTime

    @property
    def fits(self) -> bool:
        """Whether the upper bound is within the budget."""
        return self.headroom_bytes >= 0

    @property
    def short_by_bytes(self) -> int:
        """Bytes missing, 0 where it fits."""
        return max(0, -self.headroom_bytes)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all GPUs, at most."""
        return self.setup.tokens_per_step / self.step_time.total_s


class Rejection(NamedTuple):
    """A candidate that was refused."""

    candidate: Candidate
    reason: str


class Lever(NamedTuple):
    """One change to a configuration, and what it brings."""

    name: str
    flag: str
    """The option that makes it."""
    candidate: Candidate
    delta_bytes: int
    """Change of the allocated peak; negative frees.  Levers are not replayed through the allocator."""
    delta_step_time_s: float
    departure: int
    """How far it goes from the run that was asked for, from 0, the same update, to 5 (`memplan.planner.levers`)."""
    price: str = ""
    """What it may do to the result of training, where that is not plain."""

    @property
    def same_update(self) -> bool:
        """Whether the optimizer sees the same gradients: no change of mathematics, batch or data."""
        return self.departure == 0

    @property
    def gives_up_adam(self) -> bool:
        """Whether the optimizer becomes one without moments: the last thing to try."""
        return self.flag == "--optimizer sgd"


class WayOut(NamedTuple):
    """Some levers that together make the nearest configuration fit."""

    levers: tuple[Lever, ...]
    candidate: Candidate
    """The configuration with all of them."""

    @property
    def same_update(self) -> bool:
        """Whether all of them keep the update."""
        return all(lever.same_update for lever in self.levers)


@dataclass(frozen=True, kw_only=True)
class Plan(Tabular, PicturedPlan):
    """What to run."""

    model: ModelSummary
    gpu: GpuSpec
    goal: Goal
    target: Target
    best: Candidate | None
    """None: nothing fits."""
    estimate: Estimate
    """Everything about the best one, or about the nearest where nothing fits."""
    alternatives: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    levers: tuple[Lever, ...]
    """Single changes to the best configuration, or to the smallest one where nothing fits."""
    ways_out: tuple[WayOut, ...]
    """Where nothing fits: the fewest changes that make it fit, cheapest first."""
    nearest: Candidate | None
    """Where nothing fits: the one that lacks least."""
    speed_source: str
    """Whose FLOP/s and bandwidth the times are of."""
    long_accumulation: LongAccumulation | None = None
    """What there is to say about accumulation beyond the usual; None: nothing."""
    feed: Feed | None = None
    """The data it was made for, where there is some."""

    def coarseness(self) -> str | None:
        """A sentence about a target that its neighbours divide better; None where they do not."""
        said = self.goal.coarseness()
        if said is not None or self.best is None:
            return said
        best = self.best
        found = self.goal.neighbour(best.setup.micro_batch_size, self._largest_that_may_fit(best))
        if found is None:
            return None
        target, micro = found
        given = ""
        if self.target.target_tokens is not None:
            given = f" (--target-tokens {target * best.setup.tokens_per_example})"
        return (
            f"{self.target.global_batch_size:,} sequences allow micro-batches of {best.setup.micro_batch_size:,} here; "
            f"--target-batch {target}{given} would allow {micro:,}"
        )

    def _largest_that_may_fit(self, best: Candidate) -> float:
        """The micro-batch, whatever the target, up to which `best` would fit.

        Bytes are convex in the micro-batch, so that on the line to the next that was refused they are overestimated.
        """
        refused = [r.candidate for r in self.rejections if _beside(r.candidate.setup, best.setup)]
        if not refused:
            return best.setup.micro_batch_size
        above = min(refused, key=lambda c: c.setup.micro_batch_size)
        step = above.setup.micro_batch_size - best.setup.micro_batch_size
        more = best.headroom_bytes - above.headroom_bytes
        return best.setup.micro_batch_size + step * best.headroom_bytes / more

    def records(self) -> list[dict[str, Any]]:
        """The plans that fit, best first."""
        plans = ([] if self.best is None else [self.best]) + list(self.alternatives)
        return [
            {
                "micro_batch_size": plan.setup.micro_batch_size,
                "gradient_accumulation_steps": plan.setup.gradient_accumulation_steps,
                "data_parallel_size": plan.setup.data_parallel_size,
                "activation_checkpointing": plan.setup.activation_checkpointing,
                "peak_allocated_bytes": plan.memory.peak_allocated_bytes,
                "peak_process_bytes": plan.memory.peak_process_bytes,
                "upper_bound_bytes": plan.upper_bound_bytes,
                "headroom_bytes": plan.headroom_bytes,
                "step_time_s": plan.step_time.total_s,
                "tokens_per_s": plan.tokens_per_s,
            }
            for plan in plans
        ]


def _beside(setup: Setup, best: Setup) -> bool:
    """Whether `setup` differs from `best` by a larger micro-batch alone."""
    same_mode = setup.activation_checkpointing == best.activation_checkpointing
    return same_mode and setup.micro_batch_size > best.micro_batch_size
