"""Were the recommended micro-batches right?

On a capped card some micro-batches survived and some ran out of memory.  What survives at b survives at b - 1, so that
the two sets are parted by the true maximum, which need not have been measured itself:

    recommended <= largest survivor < next option = a failure      the true maximum among the options
    recommended <  largest survivor                                 one option below it, or further
    recommended >= smallest failure                                 too large: an out-of-memory error

Options are the divisors of the batch where a plan for a batch was put to the test, and powers of two where the number
of accumulation steps was fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.specs.measurement import SAME_STACK, describe
from memplan.specs.training import divisors
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from memplan.specs.measurement import Measurement

    Recommend = Callable[["Question"], int | None]

TRUE_MAXIMUM, ONE_BELOW, FURTHER_BELOW, TOO_LARGE, UNDECIDED = (
    "true_maximum",
    "one_below",
    "further_below",
    "too_large",
    "undecided",
)
VERDICTS = (TRUE_MAXIMUM, ONE_BELOW, FURTHER_BELOW, TOO_LARGE, UNDECIDED)

LARGEST_POWER = 2**16
"""No micro-batch beyond this is an option."""


class Question(NamedTuple):
    """Trials that differ in the micro-batch alone."""

    example: Measurement
    """One of them."""
    target_batch: int | None
    """The batch that all of them reach; None: their accumulation steps are the same."""
    survivors: tuple[int, ...]
    failures: tuple[int, ...]

    def options(self) -> list[int]:
        """Micro-batches that may be recommended, ascending."""
        if self.target_batch is not None:
            return divisors(self.target_batch // self.example.trial.setup.data_parallel_size)
        return [2**n for n in range(LARGEST_POWER.bit_length())]


class Decision(NamedTuple):
    """A recommendation and what became of it."""

    question: Question
    recommended: int | None
    """None: nothing was said to fit."""
    verdict: str
    """One of `VERDICTS`."""

    @property
    def words(self) -> str:
        """What was asked, in a few words."""
        trial = self.question.example.trial
        words = describe(trial).split(", ")
        target = self.question.target_batch
        batch = [] if target is None else [f"batch {target}"]
        return ", ".join([words[0], f"{trial.setup.seq_len:,} tokens", *words[2:], *batch])


def questions(records: Iterable[Measurement]) -> tuple[Question, ...]:
    """The capped trials of the records, those that differ in the micro-batch alone together."""
    groups: dict[str, list[Measurement]] = {}
    for record in records:
        capped = record.card.device == "cuda" and record.trial.limit_bytes is not None
        if capped and record.survived is not None:
            groups.setdefault(_key(record), []).append(record)
    return tuple(_question(group) for group in groups.values())


def _key(record: Measurement) -> str:
    trial = record.trial
    steps = 1 if trial.target_batch is not None else trial.setup.gradient_accumulation_steps
    setup = replace(trial.setup, micro_batch_size=1, gradient_accumulation_steps=steps)
    config = sorted((str(name), repr(value)) for name, value in trial.config.items())
    place = (record.card.name, record.card.total_bytes, record.card.driver)
    stack = tuple(record.versions.get(name) for name in SAME_STACK)
    return repr((trial.model, config, setup, trial.limit_bytes, trial.alloc_conf, trial.target_batch, place, stack))


def _question(group: Sequence[Measurement]) -> Question:
    def micro_batches(survived: bool) -> tuple[int, ...]:
        return tuple(sorted({r.trial.setup.micro_batch_size for r in group if r.survived is survived}))

    return Question(group[0], group[0].trial.target_batch, micro_batches(True), micro_batches(False))


def decide(question: Question, recommended: int | None) -> Decision:
    """What became of a recommendation."""
    return Decision(question, recommended, verdict(question, recommended))


def verdict(question: Question, recommended: int | None) -> str:
    """One of `VERDICTS`."""
    fits, fails = max(question.survivors, default=0), min(question.failures, default=None)
    if recommended is not None:
        if fails is not None and recommended >= fails:
            return TOO_LARGE
        if recommended > fits:
            return UNDECIDED
    above = [option for option in question.options() if option > (recommended or 0)]
    for name, option in zip((TRUE_MAXIMUM, ONE_BELOW), above, strict=False):
        if fails is not None and option >= fails:
            return name
        if option > fits:
            return UNDECIDED
    return FURTHER_BELOW if len(above) > 1 else (TRUE_MAXIMUM, ONE_BELOW)[len(above)]
