"""Many trials, one after the other: what is known is not measured again, what is measured is saved at once.

    largest micro-batch that survives: start from the prediction, go up or down in doubling steps, then bisect

What survives at b survives at b - 1 (the planner's law), so that the answer is exact once a survivor and a failure are
neighbours; three trials where the prediction is right and its neighbour is tried.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from memplan.specs.measurement import describe, identity, trial_identity
from memplan.specs.training import LARGEST_COUNT
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from memplan.probes.launch import Place
    from memplan.specs.measurement import Measurement, Trial

    Measure = Callable[[Trial], Measurement]
    Save = Callable[[Measurement], None]
    Notify = Callable[[str], None]


class Largest(NamedTuple):
    """The largest micro-batch that survives."""

    micro_batch_size: int | None
    """None: not even one sequence does."""
    tried: tuple[tuple[int, bool], ...]
    """(micro-batch, whether it survived), in the order in which they were tried."""
    complete: bool
    """Whether its neighbour was seen to fail; not where a trial had no answer or the time was over."""


def largest_that_survives(survives: Callable[[int], bool | None], start: int, most: int = LARGEST_COUNT) -> Largest:
    """Bisect to the largest micro-batch from 1 to `most` that survives, beginning with `start`.

    `survives`: None where it was not found out; then what is known so far is the answer.
    """
    tried: dict[int, bool] = {}

    def outcome(complete: bool) -> Largest:
        survivors = [b for b, ok in tried.items() if ok]
        return Largest(max(survivors, default=None), tuple(tried.items()), complete)

    low, high = 0, most + 1  # survives, fails
    guess, stride = min(max(start, 1), most), 1
    while high - low > 1:
        ok = survives(guess)
        if ok is None:
            return outcome(False)
        tried[guess] = ok
        low, high = (guess, high) if ok else (low, guess)
        if high > most and low:  # no failure yet
            guess, stride = min(low + stride, most), 2 * stride
        elif not low:  # no survivor yet
            guess, stride = max(high - stride, 1), 2 * stride
        else:
            guess = (low + high) // 2
    return outcome(True)


class Budget:
    """Time that may be spent."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`seconds`: None for as long as it takes."""
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return float("inf") if self._end is None else max(self._end - self._clock(), 0.0)

    @property
    def is_over(self) -> bool:
        """Whether there are none."""
        return self.left_s <= 0


class Session:
    """Trials on one device."""

    def __init__(
        self,
        place: Place,
        measure: Measure,
        *,
        known: Iterable[Measurement] = (),
        save: Save | None = None,
        budget: Budget | None = None,
        again: bool = False,
        notify: Notify | None = None,
    ) -> None:
        """`known`: earlier measurements; `again`: do not look at them; `notify`: is told what is being measured."""
        self._place = place
        self._measure = measure
        self._save = save
        self._notify = notify
        self.budget = budget or Budget(None)
        self._known: dict[str, Measurement] = {}
        self._asked: dict[str, set[tuple[str, int | None]]] = {}
        for one in () if again else known:
            if one.survived is not None:
                self._questions(one).add((one.trial.role, one.trial.target_batch))
                self._known[trial_identity(one.trial, one.card, one.versions)] = one
        self.measured: list[Measurement] = []
        """What was measured here, in this order."""
        self.seen: list[Measurement] = []
        """The same, and what was known, in the order in which they were asked for."""
        self.position = ""
        """Which of how many is being measured, in words."""
        self.num_known = 0
        """Trials that earlier measurements answered."""
        self.num_left = 0
        """Trials that there was no time for."""

    def run(self, trial: Trial) -> Measurement | None:
        """What a trial says: known, or measured now and saved; None where there is no time."""
        key = trial_identity(trial, self._place.card, self._place.versions)
        if key in self._known:
            self.num_known += 1
            return self._answered(trial, self._known[key])
        if self.budget.is_over:
            self.num_left += 1
            return None
        if self._notify is not None:
            self._notify(f"{self.position} {describe(trial)}".strip())
        found = self._measure(trial)
        if self.budget.is_over and found.survived is None:  # cut off: it says nothing about the trial
            self.num_left += 1
            return None
        self.measured.append(found)
        self.seen.append(found)
        if found.survived is not None:
            self._known[key] = found
        if self._save is not None:
            self._save(found)
        return found

    def _answered(self, trial: Trial, known: Measurement) -> Measurement:
        """An earlier measurement; one that answers another question now is saved with that question, too."""
        asked = (trial.role, trial.target_batch)
        if trial.role and asked != (known.trial.role, known.trial.target_batch):
            known = replace(known, trial=trial)
            if self._save is not None and asked not in self._questions(known):
                self._save(known)
                self._questions(known).add(asked)
        self.seen.append(known)
        return known

    def _questions(self, measurement: Measurement) -> set[tuple[str, int | None]]:
        """(role, batch) of all that this trial was measured for."""
        return self._asked.setdefault(identity(measurement), set())

    def find_max(self, trial: Trial, start: int, most: int = LARGEST_COUNT) -> Largest:
        """The largest micro-batch of a trial that survives."""

        def survives(micro_batch_size: int) -> bool | None:
            found = self.run(with_micro_batch(trial, micro_batch_size))
            return None if found is None else found.survived

        return largest_that_survives(survives, start, most)


def with_micro_batch(trial: Trial, micro_batch_size: int) -> Trial:
    """The same trial with another micro-batch."""
    return replace(trial, setup=replace(trial.setup, micro_batch_size=micro_batch_size))
