"""Padded, grouped by length, padding-free or packed: what does an epoch take, where a step keeps its sequences?

Each way is planned on the worst micro-batch that it can give, and timed on the mean one: a row of so many tokens, with
its padding, as the data has on average.  The time of a step is convex in the length (attention grows with its square),
so that the mean length gives no more than the mean time: a lower bound, as all times here.

    rows           padded to the longest of the micro-batch, in random order (expected) or grouped (one shuffle); where
                   fewer rows pad so much less that an epoch is faster, smaller micro-batches, too
    padding-free   the mean length
    packed         the mean of the rows that TRL's strategy makes (`best_fit_decreasing`)

A packed row holds several sequences; an optimizer step of as many sequences has that many fewer rows.

Of a sample, rows are counted for the whole data, as many of them for each sequence as the sample has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import MemplanError
from memplan.planner.feed import BATCHING_BY_WAY, GROUPED, PACKED, PADDED, PADDING_FREE, SMALLER, Rows, Way
from memplan.planner.goal import Target
from memplan.planner.search import Search
from memplan.planner.worst_batch import mean_share, most_packed, worst_batch_goal
from memplan.sequences import padding
from memplan.sequences.packing import best_fit_decreasing
from memplan.specs.training import LEAST_PACKED, divisors
from memplan.specs.values import replace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from memplan.estimation.estimate import Estimator
    from memplan.planner.feed import Cut
    from memplan.planner.goal import Goal
    from memplan.planner.plan import Candidate
    from memplan.specs.training import Setup

WAYS = (PADDED, GROUPED, PADDING_FREE, PACKED)
NEAR = 0.02
"""Share by which an optimizer step may have more or fewer sequences, so that its rows divide better."""


def rows_of(cut: Cut) -> dict[str, Rows]:
    """What an epoch hands over in each way."""
    size, tokens = int(cut.tokens.size), int(cut.tokens.sum())
    each = Rows(round(size * cut.weight), 1.0, tokens / size)
    num = best_fit_decreasing(cut.tokens, cut.most).num_rows
    packed = Rows(round(num * cut.weight), size / num, tokens / num)
    return {PADDED: each, GROUPED: each, PADDING_FREE: each, PACKED: packed}


def target_of(rows: Rows, samples: float, ranks: int) -> Target:
    """The rows of an optimizer step that are nearest to so many sequences and that all GPUs can share, at least one."""
    return Target(max(round(samples / rows.samples / ranks), 1) * ranks)


def near_target(rows: Rows, samples: float, ranks: int) -> Target:
    """The same, or rows beside it that divide better and hold nearly as many sequences: a prime leaves no choice."""
    nearest = target_of(rows, samples, ranks).global_batch_size // ranks
    reach = int(NEAR * nearest) + 1
    near = [
        each
        for each in range(max(nearest - reach, 1), nearest + reach + 1)
        if each == nearest or abs(each * ranks * rows.samples - samples) <= NEAR * samples
    ]
    return Target(ranks * max(near, key=lambda each: (len(divisors(each)), -abs(each - nearest))))


class Ways:
    """One data set, one model, one GPU."""

    def __init__(
        self, estimator: Estimator, goal: Goal, cut: Cut, *, counts_labels: bool, chooses_attention: bool
    ) -> None:
        """How batches can be made.

        Args:
            estimator: The model, the GPU and its speed.
            goal: Everything but the batches; its padding says whether padded rows have a mask.
            cut: The data.
            counts_labels: Whether the share of the tokens with a label is the data's.
            chooses_attention: Whether flash attention may be chosen where sequences lie end to end.
        """
        self.estimator = estimator
        self.goal = goal
        self.cut = cut
        self.counts_labels = counts_labels
        self.chooses_attention = chooses_attention

    def compare(self, rows: Mapping[str, Rows], samples: float, known: Mapping[str, Candidate]) -> Iterator[Way]:
        """Every way, with its plan.

        Args:
            rows: What an epoch hands over in each way.
            samples: Sequences of an optimizer step.
            known: Plans that were made before, by their `batching`.
        """
        plans: dict[str, Candidate | str] = dict(known)
        for name in WAYS:
            batching = BATCHING_BY_WAY[name]
            if batching not in plans:
                divided = near_target if rows[name].samples > 1 else target_of
                target = divided(rows[name], samples, self.goal.setup.data_parallel_size)
                plans[batching] = self._plan(batching, target)
            found = plans[batching]
            if isinstance(found, str):
                yield Way(name, rows[name], refused=found)
                continue
            way = self.timed(name, found, rows[name])
            yield way
            if name == PADDED and found.fits:
                yield from self._smaller(way)

    def _plan(self, batching: str, target: Target) -> Candidate | str:
        """The fastest plan with such batches, or what lacks least; or why there is none."""
        if batching == "packed" and most_packed(self.cut) < LEAST_PACKED:
            return "no two records fit in a row"
        try:
            goal = self._with_flash() if batching != "rows" and self.chooses_attention else self.goal
            goal = worst_batch_goal(goal, self.cut, batching, target, counts_labels=self.counts_labels)
            self.estimator.check(goal.setup)
        except MemplanError as fault:
            return fault.cause
        look = Search(self.estimator, goal)
        best, _, _, refused = look.choose()
        return look.nearest(refused) if best is None else best

    def _smaller(self, padded: Way) -> Iterator[Way]:
        """The fastest of smaller micro-batches, where an epoch takes less with it: fewer rows have less padding."""
        assert padded.candidate is not None
        setup = padded.candidate.setup
        target = Target(setup.global_batch_size)
        goal = worst_batch_goal(self.goal, self.cut, "rows", target, counts_labels=self.counts_labels)
        look = Search(self.estimator, goal)
        splits = [split for split in goal.splits() if split[0] < setup.micro_batch_size]
        candidates = [look.candidate(goal.at(*split, mode)) for mode in goal.modes() for split in splits]
        ways = [self.timed(SMALLER, one, padded.rows) for one in candidates if one.fits]
        for way in sorted(ways, key=lambda way: way.epoch_s):
            if way.epoch_s >= (1 - NEAR) * padded.epoch_s:
                return
            assert way.candidate is not None
            replayed = look.replayed(way.candidate)
            if replayed.fits:
                yield way._replace(candidate=replayed)
                return

    def _with_flash(self) -> Goal:
        """With the attention that keeps sequences in a row apart at no cost, where the model and the card have it."""
        flash = replace(self.goal.setup, attention="flash", padding=False)
        return replace(self.goal, setup=flash) if self.estimator.accepts(flash) else self.goal

    def timed(self, name: str, plan: Candidate, row: Rows) -> Way:
        """A way with the time of its epoch."""
        slots = self._slots(name, plan.setup.micro_batch_size) or row.tokens
        mean = plan.setup
        if self.counts_labels:
            mean = replace(mean, supervised=mean_share(self.cut) * row.tokens / slots)
        if name == PACKED:
            mean = replace(mean, packed_sequences=max(-int(-row.samples // 1), LEAST_PACKED))
        steps = row.num / plan.setup.global_batch_size
        return Way(name, row, plan, "", slots, steps * self._step_s(mean, slots))

    def _slots(self, name: str, micro_batch: int) -> float:
        """Tokens of a padded row on average; 0 where nothing is padded."""
        tokens = self.cut.tokens
        if micro_batch == 1:
            return 0.0
        if name in {PADDED, SMALLER}:
            return padding.longest(tokens, micro_batch).slots / tokens.size
        return padding.grouped(tokens, micro_batch).slots / tokens.size if name == GROUPED else 0.0

    def _step_s(self, setup: Setup, length: float) -> float:
        """Seconds of a step with rows of a length between two whole numbers: on the line between theirs."""
        below = max(int(length), setup.sequences_per_row)
        at, above = (self.estimator.step_time(replace(setup, seq_len=one)) for one in (below, below + 1))
        assert at is not None
        assert above is not None
        return at.total_s + max(length - below, 0.0) * (above.total_s - at.total_s)
