"""Finding the plan.

For every open checkpointing choice the largest micro-batch that fits is found by bisection over the divisors of the
target: with accumulation, what fits at b fits at every smaller b (a law that the tests hold); the micro-batch that
needs no accumulation is looked at by itself.  Everything that fits is ranked by the estimated time of a step, then by
headroom, and the first whose run also fits when it is replayed through the caching allocator is the plan.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.planner.levers import levers_of
from memplan.planner.long_accumulation import long_accumulation
from memplan.planner.plan import Candidate, Lever, Plan, Rejection, WayOut
from memplan.specs.adapter import Lora
from memplan.specs.evaluation import Evaluation
from memplan.specs.training import IN_BATCH
from memplan.specs.values import replace
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from memplan.estimation.estimate import Estimator as Described
    from memplan.estimation.traced_estimator import TracedEstimator

    Estimator: TypeAlias = Described | TracedEstimator
    from memplan.planner.goal import Goal
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.training import Setup

MOST_ALTERNATIVES = 5
MOST_WAYS_OUT = 4


class Search:
    """One goal, one model, one GPU."""

    def __init__(self, estimator: Estimator, goal: Goal) -> None:
        self.estimator = estimator
        self.goal = goal
        self._seen: dict[Setup, Candidate] = {}

    def candidate(self, setup: Setup) -> Candidate:
        """A configuration with its bytes and time."""
        if setup not in self._seen:
            memory = self.estimator.memory(setup)
            step_time = self.estimator.step_time(setup)
            if step_time is None:
                raise ValueError("a plan needs the rates of a GPU")
            bound = self.goal.margin.upper_bound(memory.peak_process_bytes)
            self._seen[setup] = Candidate(
                setup=setup,
                memory=memory,
                upper_bound_bytes=bound,
                headroom_bytes=self.goal.usable_bytes - bound,
                step_time=step_time,
            )
        return self._seen[setup]

    def replayed(self, candidate: Candidate) -> Candidate:
        """The same with what the caching allocator really reserves."""
        margin, usable = self.goal.margin, self.goal.usable_bytes
        memory = self.estimator.replayed_memory(candidate.setup, margin.budget(usable))
        bound = margin.upper_bound(memory.peak_process_bytes)
        return candidate._replace(memory=memory, upper_bound_bytes=bound, headroom_bytes=usable - bound)

    def first_that_fits(self, ranked: Sequence[Candidate]) -> tuple[int, list[Candidate]]:
        """Position of the first candidate that fits as replayed (their number where none does); all that were."""
        tried = []
        for position, candidate in enumerate(ranked):
            tried.append(self.replayed(candidate))
            if tried[-1].fits:
                return position, tried
        return len(ranked), tried

    def choose(self) -> tuple[Candidate | None, list[Candidate], list[Candidate], list[Candidate]]:
        """The fastest that fits as replayed, None where none does; what was replayed; what may fit; what does not.

        What may fit is in the order in which it is replayed.
        """
        splits = list(self.goal.splits())
        fitting: list[Candidate] = []
        refused: list[Candidate] = []
        for mode in self.goal.modes():
            candidates = [self.candidate(self.goal.at(*split, mode)) for split in self.worth_looking_at(splits, mode)]
            fitting += [c for c in candidates if c.fits]
            refused += [c for c in candidates if not c.fits]
        ranked = undominated(fitting)
        ranked += [c for c in sorted(fitting, key=_by_time) if c not in ranked]
        position, tried = self.first_that_fits(ranked)
        best = tried[-1] if position < len(ranked) else None
        return best, tried, ranked, refused + tried[:position]

    def nearest(self, refused: Sequence[Candidate]) -> Candidate:
        """Of what does not fit the one that lacks least, as replayed."""
        return self.replayed(min(refused, key=lambda c: (c.short_by_bytes, c.setup.micro_batch_size)))

    def worth_looking_at(self, splits: Sequence[tuple[int, int]], mode: str) -> list[tuple[int, int]]:
        """The largest micro-batches that fit, the one above them, and the one without accumulation.

        With accumulation gradients stay resident: a micro-batch that reaches the target at once may fit where smaller
        ones do not, so that it is looked at by itself.
        """
        alone = [split for split in splits if split[1] == 1]
        others = [split for split in splits if split[1] > 1]
        first = self._first_that_fits(others, mode)
        return alone + others[max(first - 1, 0) : first + MOST_ALTERNATIVES]

    def _first_that_fits(self, splits: Sequence[tuple[int, int]], mode: str) -> int:
        """Position in `splits` (largest micro-batch first) of the first that fits; their number where none does."""
        low, high = 0, len(splits)
        while low < high:
            middle = (low + high) // 2
            if self.candidate(self.goal.at(*splits[middle], mode)).fits:
                high = middle
            else:
                low = middle + 1
        return low


def search(estimator: Estimator, goal: Goal, gpu: GpuSpec, speed_source: str) -> Plan:
    """The plan for `goal`."""
    estimator.check(goal.setup)
    look = Search(estimator, goal)
    best, tried, ranked, refused = look.choose()
    nearest = None if best else look.nearest(refused)
    start = best or nearest
    assert start is not None
    levers = levers_of(look.candidate, look.candidate(start.setup)) if estimator.prices_levers else ()
    return Plan(
        model=estimator.summary(start.setup),
        gpu=gpu,
        goal=goal,
        target=goal.target,
        best=best,
        estimate=estimator.estimate(start.setup, margin=goal.margin),
        alternatives=tuple(undominated(ranked[len(tried) :])[:MOST_ALTERNATIVES]),
        rejections=_rejections(refused, best),
        levers=levers,
        ways_out=() if best else _ways_out(look, start, levers),
        nearest=nearest,
        speed_source=speed_source,
        long_accumulation=None if best is None else long_accumulation(look, best, levers, refused),
    )


def _by_time(candidate: Candidate) -> tuple[int, float, int, int]:
    """Where a rule of thumb gives the same time, fewer passes come first: each has costs that it leaves out.

    Where the loss compares the examples of a micro-batch, larger ones come before faster ones: accumulation adds none.
    """
    time_s = float(f"{candidate.step_time.total_s:.9g}")
    steps = candidate.setup.gradient_accumulation_steps
    return (steps if candidate.setup.objective in IN_BATCH else 0), time_s, steps, -candidate.headroom_bytes


def undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """By time, then headroom; without those that another beats in both."""
    ranked: list[Candidate] = []
    for c in sorted(candidates, key=_by_time):
        if not ranked or c.headroom_bytes > ranked[-1].headroom_bytes:
            ranked.append(c)
    return ranked


def _rejections(refused: Sequence[Candidate], best: Candidate | None) -> tuple[Rejection, ...]:
    """What was refused, the neighbour of the best plan first."""

    def distance(candidate: Candidate) -> tuple[bool, int]:
        other = best is None or candidate.setup.activation_checkpointing != best.setup.activation_checkpointing
        return other, candidate.short_by_bytes

    return tuple(
        Rejection(candidate=c, reason=f"{format_bytes(c.short_by_bytes)} short of the budget")
        for c in sorted(refused, key=distance)
    )


def _ways_out(look: Search, start: Candidate, levers: Sequence[Lever]) -> tuple[WayOut, ...]:
    """The fewest levers that make `start` fit: those that keep the update first, then the fastest.

    One that frees nothing by itself may free the second-highest point of the step: it counts beside others.
    """
    keeping = [lever for lever in levers if lever.same_update and lever.delta_bytes <= 0]
    helping = [lever for lever in levers if lever.delta_bytes <= 0]
    found = _fewest(look, start, keeping)
    found += [way for way in _fewest(look, start, helping) if way.levers not in [one.levers for one in found]]
    return tuple(found[:MOST_WAYS_OUT])


def _fewest(look: Search, start: Candidate, levers: Sequence[Lever]) -> list[WayOut]:
    """The cheapest of the fewest levers that fit, as replayed."""
    for num in (1, 2, 3):
        found = []
        for group in combinations(levers, num):
            candidate = _with_all(look, start.setup, group)
            if candidate is not None and candidate.fits:
                found.append(WayOut(levers=group, candidate=candidate))
        replayed = [
            way._replace(candidate=look.replayed(way.candidate)) for way in sorted(found, key=_cost)[:MOST_WAYS_OUT]
        ]
        if fitting := [way for way in replayed if way.candidate.fits]:
            return fitting
    return []


def _cost(way: WayOut) -> tuple[int, int, float]:
    """What changes training least comes first: by its furthest lever, then by all of them, then by time."""
    departures = [lever.departure for lever in way.levers]
    return max(departures), sum(departures), way.candidate.step_time.total_s


def _with_all(look: Search, setup: Setup, levers: Sequence[Lever]) -> Candidate | None:
    """All changes together; None where two change the same thing, or cannot be had together."""
    changes: dict[str, dict[str, object]] = {}
    for lever in levers:
        for name, parts in _changed(setup, lever.candidate.setup).items():
            there = changes.setdefault(name, {})
            if there.keys() & parts.keys() or (there and WHOLE in (*there, *parts)):
                return None
            there |= parts
    try:
        return look.candidate(_changed_setup(setup, changes))
    except UsageError:
        return None


WHOLE = ""
"""The name of a setting as a whole, beside those of its parts."""


def _changed(setup: Setup, other: Setup) -> dict[str, dict[str, object]]:
    """For each setting that differs its parts that do: of an evaluation or adapters several may be changed apart."""
    found: dict[str, dict[str, object]] = {}
    for name, value in vars(other).items():
        before = getattr(setup, name)
        if value == before:
            continue
        if isinstance(value, (Evaluation, Lora)) and before is not None:
            found[name] = {part: new for part, new in vars(value).items() if new != getattr(before, part)}
        else:
            found[name] = {WHOLE: value}
    return found


def _changed_setup(setup: Setup, changes: dict[str, dict[str, object]]) -> Setup:
    fields: dict[str, Any] = {
        name: parts[WHOLE] if WHOLE in parts else replace(getattr(setup, name), **parts)
        for name, parts in changes.items()
    }
    return replace(setup, **fields)
