"""Laws of plans for data: the worst micro-batch bounds all that an epoch can give, and no step takes more than it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.planner.feed import Cut
from memplan.planner.goal import Goal, Target
from memplan.planner.ways import near_target, rows_of, target_of
from memplan.planner.worst_batch import worst_batch_goal
from memplan.sequences.lengths import at_the_end
from memplan.sequences.maximum import candidates, choose
from memplan.sequences.worst import most_in_row
from memplan.specs.training import LEAST_PACKED, Setup
from memplan.specs.values import replace
from tests.laws.models import models
from tests.laws.test_planner_laws import ESTIMATORS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RECORDS = st.lists(st.tuples(st.integers(4, 400), st.floats(0, 1)), min_size=4, max_size=40)


def cut_of(records: Sequence[tuple[int, float]]) -> Cut:
    """Each with so many tokens, a share of which, but not the first, has a label."""
    tokens = np.array([num for num, _ in records], np.int64)
    labelled = np.array([round(share * (num - 1)) for num, share in records], np.int64)
    return Cut(tokens, labelled, int(tokens.max()))


def seen_of(cut: Cut, records: Sequence[tuple[int, float]], num: int | None) -> tuple[Cut, Cut]:
    """What is planned with, and all that comes in an epoch, cut at the longest of what is planned with.

    `num`: so many of the records are a sample; None: all are planned with.
    """
    if num is None:
        return cut, cut
    seen = cut_of(records[:num])
    tokens = np.minimum(cut.tokens, seen.most)
    every = Cut(tokens, np.minimum(cut.labelled, tokens - 1), seen.most)
    return seen._replace(weight=len(records) / num), every


def given_setup(setup: Setup, tokens: int, labelled: int) -> Setup:
    """With a share of labels that counts so many, and one that is never above 1."""
    return replace(setup, supervised=min(max(labelled / max(tokens, 1), 1e-6), 1.0))


@settings(max_examples=60, deadline=None)
@given(
    model=models,
    records=RECORDS,
    micro=st.sampled_from([1, 2, 4]),
    loss=st.sampled_from(["full", "tiled", "chunked"]),
    mode=st.sampled_from(["none", "full"]),
    order=st.randoms(use_true_random=False),
    sample=st.sampled_from([None, 1, 3]),
)
def test_no_padded_batch_takes_more_than_the_worst(
    model, records, micro: int, loss: str, mode: str, order, sample: int | None
) -> None:
    """In every order each micro-batch, padded to its longest, takes at most what was planned with."""
    estimator = ESTIMATORS[model]
    seen, cut = seen_of(cut_of(records), records, sample)
    setup = Setup(padding=True, loss=loss if model in {"llama", "qwen2"} else "full")
    goal = worst_batch_goal(
        Goal(setup=setup, target=Target(8), usable_bytes=2**40), seen, "rows", Target(8), counts_labels=True
    )
    worst = goal.at(micro, 8 // micro, mode)
    most = estimator.memory(worst).peak_allocated_bytes
    for batch in batches(records, micro, order):
        tokens = [cut.tokens[at] for at in batch]
        longest = int(max(tokens))
        one = replace(
            worst, micro_batch_size=len(batch), seq_len=longest, padding=len(batch) > 1 and min(tokens) < longest
        )
        labelled = int(sum(cut.labelled[at] for at in batch))
        one = given_setup(one, len(batch) * (longest - 1), labelled)
        assert estimator.memory(one).peak_allocated_bytes <= most


@settings(max_examples=60, deadline=None)
@given(
    records=RECORDS,
    micro=st.sampled_from([1, 2, 4]),
    order=st.randoms(use_true_random=False),
    sample=st.sampled_from([None, 1, 3]),
)
def test_no_sum_exceeds_that_of_the_worst_micro_batch(records, micro: int, order, sample: int | None) -> None:
    """End to end the tokens of every micro-batch, and those of them that have a label, are at most the worst one's."""
    seen, cut = seen_of(cut_of(records), records, sample)
    goal = worst_batch_goal(
        Goal(setup=Setup(), target=Target(8), usable_bytes=2**40), seen, "padding-free", Target(8), counts_labels=True
    )
    worst = goal.at(micro, 8 // micro, "none")
    labels = worst.supervised * (worst.tokens_per_micro_batch - micro)
    for batch in batches(records, micro, order):
        assert sum(cut.tokens[at] for at in batch) <= worst.tokens_per_micro_batch
        assert sum(cut.labelled[at] for at in batch) <= labels + 1e-9


@given(records=RECORDS, capacity=st.integers(400, 900), order=st.randoms(use_true_random=False))
def test_no_row_holds_more_than_the_shortest_that_fit(records, capacity: int, order) -> None:
    """However sequences are put into a row."""
    tokens = cut_of(records).tokens
    shuffled = list(tokens)
    order.shuffle(shuffled)
    held = room = 0
    for one in shuffled:
        held, room = (held + 1, room + one) if room + one <= capacity else (1, one)
        assert held <= most_in_row(tokens, capacity)


@given(records=RECORDS, samples=st.integers(1, 200), ranks=st.sampled_from([1, 2, 8]))
def test_targets_divide_and_keep_the_records(records, samples: int, ranks: int) -> None:
    """Rows come in whole numbers for each GPU: the nearest is half of one for each off at most, or one for each."""
    for row in rows_of(cut_of(records)).values():
        nearest = target_of(row, samples, ranks).global_batch_size
        assert nearest % ranks == 0
        off = abs(nearest * row.samples - samples)
        assert off <= row.samples * ranks / 2 + 1e-9 or nearest == ranks
        near = near_target(row, samples, ranks).global_batch_size
        assert near % ranks == 0
        assert near == nearest or abs(near * row.samples - samples) <= 0.02 * samples


@given(records=RECORDS, max_loss=st.floats(0, 1))
def test_the_length_loses_no_more_than_is_allowed(records, max_loss: float) -> None:
    """And the next shorter candidate loses more."""
    cut = cut_of(records)
    found = choose(at_the_end(cut.tokens, cut.labelled), max_loss=max_loss)
    assert found.loss.of_supervised <= max_loss
    assert found.most in candidates(cut.most)
    if found.shorter is not None:
        assert found.shorter.of_supervised > max_loss


def test_packed_rows_hold_two_at_least() -> None:
    """As a setup has it; whether two fit is looked at before."""
    cut = Cut(np.array([9, 9]), None, 9)
    goal = Goal(setup=Setup(), target=Target(2), usable_bytes=2**40)
    assert worst_batch_goal(goal, cut, "packed", Target(2), counts_labels=False).setup.packed_sequences == LEAST_PACKED


def batches(records: Sequence[object], micro: int, order) -> Iterator[list[int]]:
    """An epoch in random order, the last micro-batch with what is left."""
    shuffled = list(range(len(records)))
    order.shuffle(shuffled)
    for start in range(0, len(shuffled), micro):
        yield shuffled[start : start + micro]
