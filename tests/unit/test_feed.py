"""What a data set means for a plan, with small numbers worked out by hand."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest

import memplan
from memplan.errors import UsageError
from memplan.feeding import suggest_for_data
from memplan.planner.feed import Cut, Rows
from memplan.planner.goal import Goal, Target
from memplan.planner.uncut import longest_that_fits
from memplan.planner.ways import near_target, rows_of, target_of
from memplan.planner.worst_batch import mean_share, worst_batch_goal
from memplan.sequences.lengths import Lengths, at_the_end
from memplan.sequences.maximum import GIVEN, LONGEST, LOSS, POSITIONS, candidates, choose
from memplan.sequences.worst import chance_of_long_row, chance_of_long_sum, largest_sums, most_in_row, share_unseen
from memplan.specs.training import Setup

GIB = 2**30


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# -- the maximum length ------------------------------------------------------------------------------------------------


def test_candidates_are_powers_of_two_and_the_longest() -> None:
    assert candidates(1000) == [64, 128, 256, 512, 1000]
    assert candidates(256) == [64, 128, 256]
    assert candidates(10) == [10]


DATA = at_the_end(numbers(100, 200, 300), numbers(50, 100, 100))
"""250 tokens with a label, at the end.  Cut at 256 on the right the third loses 44 of its 100, cut at 128 all of them,
and the second 72: 172 in all."""


@pytest.mark.parametrize(
    ("max_loss", "most", "why", "lost", "below"),
    [
        (0.0, 300, LONGEST, 0, 44),
        (44 / 250, 256, LOSS, 44, 172),
        (43 / 250, 300, LONGEST, 0, 44),
        (172 / 250, 128, LOSS, 172, None),
    ],
)
def test_the_shortest_that_loses_few_enough(max_loss: float, most: int, why: str, lost: int, below: int | None) -> None:
    found = choose(DATA, max_loss=max_loss)
    assert (found.most, found.why) == (most, why)
    assert found.loss.of_supervised == pytest.approx(lost / 250)
    if below is not None:
        assert found.shorter is not None
        assert found.shorter.of_supervised == pytest.approx(below / 250)


def test_what_is_lost_at_128() -> None:
    """The third has none of its labels left; two records and 72 + 172 of 600 tokens are lost."""
    loss = choose(DATA, max_loss=0.5, given=128).loss
    assert (loss.num_cut, loss.num_without) == (2, 1)
    assert loss.of_tokens == pytest.approx((72 + 172) / 600)


def test_positions_and_what_is_given_go_first() -> None:
    assert choose(DATA, max_loss=0.0, positions=200).why == POSITIONS
    assert choose(DATA, max_loss=0.0, positions=200).most == 200
    assert choose(DATA, max_loss=0.0, positions=300).why == LONGEST
    assert (choose(DATA, max_loss=0.0, given=64).why, choose(DATA, max_loss=0.0, given=64).most) == (GIVEN, 64)


def test_without_labels_all_tokens_count() -> None:
    silent = at_the_end(numbers(100, 300), numbers(0, 0))
    assert choose(silent, max_loss=0.2).most == 256  # 44 of 400 tokens
    assert choose(Lengths(numbers(100, 300)), max_loss=0.2).most == 256


# -- the worst micro-batch ---------------------------------------------------------------------------------------------


def test_sums_of_the_longest() -> None:
    assert largest_sums(numbers(3, 9, 5, 1), 3).tolist() == [9, 14, 17]
    assert largest_sums(numbers(3, 9), 5).tolist() == [9, 12]


def test_the_most_that_a_row_holds() -> None:
    """1 + 2 + 3 fit in 8; the fourth would make 11."""
    assert most_in_row(numbers(5, 1, 3, 2, 0), 8) == 3
    assert most_in_row(numbers(9), 8) == 1


def test_a_long_row_comes_for_certain_but_in_the_last_batch() -> None:
    """5 records 2 at a time: the one that is too long is alone in the last batch with probability 1/5; two never."""
    assert chance_of_long_row(numbers(1, 2, 3, 4, 9), 2, 9).value == 0
    one = chance_of_long_row(numbers(1, 2, 3, 4, 9), 2, 8)
    assert one.value == pytest.approx(4 / 5)
    assert not one.is_exact
    assert chance_of_long_row(numbers(1, 2, 3, 9, 9), 2, 8).value == 1
    assert chance_of_long_row(numbers(1, 2, 3, 9), 2, 8) == (1.0, 0, True)


@pytest.mark.parametrize("most", range(5, 14))
def test_a_long_sum_against_all_orders(most: int) -> None:
    """Drawn epochs against the 120 orders of five records, two at a time."""
    tokens = numbers(1, 3, 4, 5, 8)
    exact = np.mean(
        [max(a + b, c + d, e) > most for a, b, c, d, e in permutations(tokens.tolist())]  # a batch of the last alone
    )
    found = chance_of_long_sum(tokens, 2, most)
    if found.num_epochs:
        assert found.num_epochs == 1000
        assert abs(found.value - exact) < 4 * (exact * (1 - exact) / 1000) ** 0.5
    else:
        assert found.value == exact
        assert found.is_exact


def test_bounds_of_a_long_sum_are_exact() -> None:
    tokens = numbers(1, 3, 4, 5, 8)
    assert chance_of_long_sum(tokens, 2, 13) == (0.0, 0, True)
    assert chance_of_long_sum(tokens, 2, 7) == (1.0, 0, True)


def goal(**given: object) -> Goal:
    return Goal(setup=Setup(**given), target=Target(4), usable_bytes=GIB)  # type: ignore[arg-type]


CUT = Cut(numbers(10, 20, 30, 40), numbers(5, 20, 6, 12), 40)


def test_padded_rows_are_as_long_as_the_maximum() -> None:
    """A single row has nothing to be padded to; 20 of the 39 tokens behind another have a label at most."""
    found = worst_batch_goal(goal(padding=True), CUT, "rows", Target(4), counts_labels=True)
    setup = found.at(2, 2, "none")
    assert (setup.seq_len, setup.padding, setup.supervised) == (40, True, 20 / 39)
    assert not found.at(1, 4, "none").padding


def test_the_longest_come_together_where_nothing_is_padded() -> None:
    """40, 40 + 30, and 40 + 30 + 20 + 10: on average 40, 35 and 25; of tokens with a label 20, 32 and 43."""
    found = worst_batch_goal(goal(), CUT, "padding-free", Target(4), counts_labels=True)
    setups = [found.at(b, 4 // b, "none") for b in (1, 2, 4)]
    assert [one.seq_len for one in setups] == [40, 35, 25]
    assert [one.supervised for one in setups] == pytest.approx([20 / 39, 32 / 68, 43 / 96])


def test_packed_rows_hold_the_shortest() -> None:
    """10 and 20 fit in 40, with 30 it would be 60; of the second every token may have a label."""
    found = worst_batch_goal(goal(), CUT, "packed", Target(4), counts_labels=True)
    setup = found.at(2, 2, "none")
    assert (setup.seq_len, setup.packed_sequences, setup.supervised) == (40, 2, 1.0)
    assert mean_share(CUT) == pytest.approx(43 / 96)


# -- a sample ----------------------------------------------------------------------------------------------------------


def test_what_no_sample_has() -> None:
    """Of 10 that have none of it, (1 - p)^10 = 5 %; of 1,000 about 3 in 1,000."""
    assert (1 - share_unseen(10)) ** 10 == pytest.approx(0.05)
    assert share_unseen(1) == pytest.approx(0.95)
    assert share_unseen(1000) == pytest.approx(3 / 1000, rel=0.01)


def test_a_long_row_of_a_sample_comes_with_all_others() -> None:
    """One of two is too long: of 5 records 2 at a time it is alone in the last micro-batch with probability 1/5."""
    found = chance_of_long_row(numbers(1, 9), 2, 8, num_records=5)
    assert (found.value, found.is_exact) == (pytest.approx(4 / 5), False)
    assert chance_of_long_row(numbers(1, 9), 2, 8, num_records=6) == (1.0, 0, True)


def test_epochs_of_a_sample_take_its_records_again() -> None:
    """Of 1 and 3 a pair has 6 with probability 1/4, and one of two pairs does with 1 - (3/4)^2."""
    found = chance_of_long_sum(numbers(1, 3), 2, 5, num_records=4)
    assert found.num_epochs == 1000
    assert abs(found.value - 7 / 16) < 4 * (7 / 16 * 9 / 16 / 1000) ** 0.5
    assert chance_of_long_sum(numbers(1, 3), 2, 6, num_records=4) == (0.0, 0, True)
    assert chance_of_long_sum(numbers(1, 3), 2, 2, num_records=4) == (1.0, 0, True)


SAMPLE = CUT._replace(weight=2.5)


def test_a_sample_is_planned_with_what_it_may_lack() -> None:
    """Every record as long as the maximum, with a label on each token; in a row of 40 four as short as the shortest."""
    rows = worst_batch_goal(goal(padding=True), SAMPLE, "rows", Target(4), counts_labels=True).at(2, 2, "none")
    assert (rows.seq_len, rows.padding, rows.supervised) == (40, True, 1.0)
    flat = worst_batch_goal(goal(), SAMPLE, "padding-free", Target(4), counts_labels=True)
    assert [(one.seq_len, one.supervised) for one in (flat.at(b, 4 // b, "none") for b in (1, 2, 4))] == [(40, 1.0)] * 3
    packed = worst_batch_goal(goal(), SAMPLE, "packed", Target(4), counts_labels=True).at(2, 2, "none")
    assert (packed.seq_len, packed.packed_sequences, packed.supervised) == (40, 4, 1.0)


def test_a_sample_of_equal_records_may_lack_others() -> None:
    assert Cut(numbers(5, 5), None, 5).is_even
    assert not Cut(numbers(5, 5), None, 5, weight=2.0).is_even


def test_the_rows_of_an_epoch_are_those_of_all_records() -> None:
    """4 records stand for 10; packed, 3 rows of them for 7.5."""
    found = rows_of(SAMPLE)
    assert found["padded"] == (10, 1.0, 25.0)
    assert found["packed"] == (8, 4 / 3, 100 / 3)


# -- keeping the tokens of a step --------------------------------------------------------------------------------------


def test_rows_of_an_epoch() -> None:
    """10 + 20 and 30 make a row of 40 each with another: 40, 30 + 10, 20."""
    found = rows_of(CUT)
    assert found["padded"] == (4, 1.0, 25.0)
    assert found["packed"] == (3, 4 / 3, 100 / 3)


def test_packed_targets_keep_the_records() -> None:
    """32 records in rows of 4 are 8 rows, of 3.6 9, for 2 GPUs 8 (4.4 each)."""
    assert target_of(Rows(9, 4.0, 1.0), 32, 1).global_batch_size == 8
    assert target_of(Rows(9, 3.6, 1.0), 32, 1).global_batch_size == 9
    assert target_of(Rows(9, 3.6, 1.0), 32, 2).global_batch_size == 8
    assert target_of(Rows(9, 50.0, 1.0), 32, 2).global_batch_size == 2


def test_a_prime_number_of_rows_gives_way_to_one_beside_it() -> None:
    """114 records of 3.63 a row are 31.4 rows: 32 of them, 1.9 % more, have six divisors; 9 rows have none so near."""
    assert near_target(Rows(9, 3.63, 1.0), 114, 1).global_batch_size == 32
    assert near_target(Rows(9, 3.63, 1.0), 32, 1).global_batch_size == 9


def test_the_longest_that_fits() -> None:
    for limit in range(5, 40):
        assert longest_that_fits(lambda at, limit=limit: at <= limit, 5, 30) == min(limit, 30)


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> str:
    """101 records of 10 to 1,010 tokens, half of which have a label."""
    path = tmp_path / "data.jsonl"
    rows = [{"num_tokens": 10 * n, "num_supervised_tokens": 5 * n} for n in range(1, 102)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_plan_of_rows_is_that_of_its_length(data: str) -> None:
    """Nothing but the length, the mask and the share of labels is the data's."""
    found = suggest_for_data(data, "gpt2", gpu="t4", target_batch=32, seq_len=512, loss="tiled")
    assert found.feed is not None
    assert found.best is not None
    assert found.best.setup.micro_batch_size > 1
    # at 512 a record of 510 tokens keeps all of its 255 labels; longer ones lose some, as they are at the end
    assert found.feed.worst.supervised == pytest.approx(255 / 511)
    same = memplan.suggest(
        "gpt2", gpu="t4", target_batch=32, seq_len=512, loss="tiled", padding=True, supervised=255 / 511
    )
    assert found.best == same.best


@pytest.mark.parametrize("way", ["padded", "padding-free", "packed"])
def test_each_way_takes_what_estimate_says(data: str, way: str) -> None:
    """The bytes of a way are those of its setup, replayed."""
    feed = suggest_for_data(data, "qwen2.5-0.5b", gpu="rtx4090", target_batch=8, seq_len=512).feed
    assert feed is not None
    (found,) = [one for one in feed.ways if one.name == way]
    assert found.candidate is not None
    setup = found.candidate.setup
    said = memplan.estimate(
        "qwen2.5-0.5b",
        gpu="rtx4090",
        micro_batch=setup.micro_batch_size,
        accumulation=setup.gradient_accumulation_steps,
        seq_len=setup.seq_len,
        padding=setup.padding,
        batching=setup.batching,
        packed_sequences=setup.packed_sequences,
        attention=setup.attention,
        checkpointing=setup.activation_checkpointing,
    )
    assert said.memory.peak_allocated_bytes == found.candidate.memory.peak_allocated_bytes
    assert said.memory.peak_reserved_bytes <= found.candidate.memory.peak_reserved_bytes


def test_a_step_keeps_its_records_in_every_way(data: str) -> None:
    feed = suggest_for_data(data, "qwen2.5-0.5b", gpu="rtx4090", target_batch=32, max_loss=0).feed
    assert feed is not None
    assert feed.maximum.most == 1010
    for way in feed.ways:
        assert way.samples_per_step == pytest.approx(
            32, rel=0.02 if way.name != "packed" else 0.5 * way.rows.samples / 32
        )
        assert way.tokens_per_step == pytest.approx(way.samples_per_step * 510)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_loss": 1, "seq_len": 512}, "--max-loss and --seq-len"),
        ({"max_loss": 100}, "max_loss is 100"),
        ({"packed_sequences": 3, "batching": "packed"}, "--packed-sequences and --data"),
        ({"objective": "dpo"}, "pairs of dpo"),
        ({"target_batch": None}, "needs one target"),
        ({"target_tokens": 64_000}, "both say"),
        ({"seq_len": 4096}, "positions"),
        ({"padding": True, "batching": "packed"}, "no padding"),
    ],
)
def test_what_does_not_go_with_data(data: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        suggest_for_data(data, "gpt2", **{"gpu": "t4", "target_batch": 8, **given})  # type: ignore[arg-type]


def test_nothing_is_left(data: str) -> None:
    with pytest.raises(UsageError, match="nothing of the data is left"):
        suggest_for_data(data, "gpt2", gpu="t4", target_batch=8, seq_len=9, truncation="drop")


def test_a_sample_says_so_and_counts_the_steps_of_all(data: str) -> None:
    """20 of 101 records: 51 steps of 2, and none that is longer than what is cut at by more than 1 in 7 (95 %)."""
    feed = suggest_for_data(data, "gpt2", gpu="t4", target_batch=2, sample=20).feed
    assert feed is not None
    assert (feed.survey.num_records, feed.survey.lengths.num_samples, feed.survey.is_sample) == (101, 20, True)
    assert feed.cut.is_sample
    assert feed.unseen == pytest.approx(1 - 0.05 ** (1 / 20))
    assert {way.steps_per_epoch for way in feed.ways if way.name in {"padded", "padding-free"}} == {51}
    assert feed.uncut is None or feed.uncut.chance is None or feed.uncut.chance.value > 0


def test_a_sample_as_large_as_the_data_is_none(data: str) -> None:
    whole = suggest_for_data(data, "gpt2", gpu="t4", target_batch=2)
    for num in (101, 5000):
        found = suggest_for_data(data, "gpt2", gpu="t4", target_batch=2, sample=num)
        assert found.feed is not None
        assert not found.feed.survey.is_sample
        assert found.feed.unseen is None
        assert found.best == whole.best


@pytest.mark.parametrize("batching", ["rows", "padding-free", "packed"])
def test_a_plan_of_a_sample_takes_no_less_than_that_of_all(data: str, batching: str) -> None:
    """Cut at the same length, with the same micro-batch: what the sample lacks is thought of."""
    given = {"gpu": "rtx4090", "target_batch": 8, "seq_len": 512, "micro_batch": 4, "loss": "tiled"}
    given |= {"batching": batching, "checkpointing": "none", "attention": "flash" if batching != "rows" else None}
    whole = suggest_for_data(data, "qwen2.5-0.5b", **given).best
    some = suggest_for_data(data, "qwen2.5-0.5b", **given, sample=5).best
    assert whole is not None
    assert some is not None
    assert some.memory.peak_allocated_bytes >= whole.memory.peak_allocated_bytes


@pytest.mark.parametrize("num", [0, -1, True, 1.5, "3"])
def test_a_sample_is_a_whole_number(data: str, num: object) -> None:
    with pytest.raises(UsageError, match="sample"):
        suggest_for_data(data, "gpt2", gpu="t4", target_batch=2, sample=num)  # type: ignore[arg-type]


def test_a_sample_without_a_token(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"num_tokens": 0}\n' * 50)
    with pytest.raises(UsageError, match="The sample holds no tokens"):
        suggest_for_data(str(path), "gpt2", gpu="t4", target_batch=2, sample=1)


def test_candidates_are_told_with_their_losses(data: str) -> None:
    """From the median (510) on, the last of those that lose too much among them.

    At 512 the records of 10 n tokens with n from 52 to 101 lose 10 n - 512 labels each: 12,650 of 25,755.
    """
    feed = suggest_for_data(data, "gpt2", gpu="t4", target_batch=2, max_loss=30).feed
    assert feed is not None
    assert [one.most for one in feed.candidates] == [512, 1010]
    assert feed.candidates[0] == feed.maximum.shorter
    assert feed.candidates[0].of_supervised == pytest.approx(12_650 / 25_755)
    assert feed.candidates[1] == feed.maximum.loss
