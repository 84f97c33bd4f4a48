"""Every cause is found in what was built to have it, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from memplan.equivalence.diagnosis import Subject, Window, diagnose_loop, diagnose_subject, tolerance
from memplan.equivalence.records import parse_loop, parse_subject
from memplan.equivalence.runner.measuring import Shape, measure
from memplan.equivalence.weights import predicted, step_weights, summary, token_weights
from memplan.errors import UsageError
from memplan.sequences.lengths import Lengths, Spans, at_the_end
from tests.support import updates
from tests.support.ranks import on_ranks

SHAPE = Shape(micro_batch_size=2, accumulation=4, ranks=1, seq_len=12)


def found(module: Any, step: Any = None, shape: Shape = SHAPE, rank: int = 0) -> dict[str, Any]:
    made = module()
    record = measure(made, made.make_inputs, None, shape, step=step, rank=rank)
    subject = parse_subject(record["subject"])
    loops = {name: parse_loop(loop) for name, loop in record["loops"].items()}
    return {
        "subject": subject,
        "of_subject": diagnose_subject(subject),
        "count": record["count"],
        "loops": loops,
        "of_loops": {name: diagnose_loop(loop, tolerance(subject.floor)) for name, loop in loops.items()},
    }


# -- modules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kinds", "count"),
    [
        (updates.language_model, (), "count_next_tokens"),
        (updates.encoder, (), "count_labels"),
        (updates.classifier, (), "num_samples"),
        (updates.mixture_without_balance, (), "count_next_tokens"),
        (updates.batch_norm, ("batch norm",), "num_samples"),
        (updates.mixture, ("balance loss",), "count_next_tokens"),
        (updates.contrastive, ("in-batch negatives",), "num_samples"),
        (updates.summed, ("sum",), "num_samples"),
        (updates.coupled, ("coupled",), "num_samples"),
        (updates.random, ("random",), "num_samples"),
    ],
)
def test_modules(module: Any, kinds: tuple[str, ...], count: str) -> None:
    """Whether a batch may be cut, why not, and what the module takes its mean over."""
    answer = found(module)
    assert answer["of_subject"].kinds == kinds
    assert answer["of_subject"].is_same is (not kinds)
    assert answer["count"] == count
    if kinds != ("random",):  # the loop of memplan is right whatever the module is
        assert answer["of_loops"]["normalised"].is_same


def test_a_module_of_equal_tokens_has_no_wrong_mean() -> None:
    answer = found(updates.classifier)
    assert answer["of_loops"]["naive"].is_same
    assert "as many tokens" in answer["of_loops"]["naive"].notes[0]


# -- step functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "kinds", "words"),
    [
        (updates.right, (), ""),
        (updates.summed_over_steps, ("scale",), "4 times too large (K = 4"),
        (updates.four_times, ("scale",), "4 times too large (K = 4"),
        (updates.divided_twice, ("scale",), "0.25 times too large (1 / K = 1 / 4"),
        (updates.sum_of_tokens, ("scale",), "N, the tokens"),
        (updates.micro_averaged, ("mean of micro-batches",), "mean(n) / n_i"),
        (updates.never_divided, ("mean of micro-batches", "scale"), "K = 4"),
        (updates.fixed_accumulation, ("partial window",), "has 2 micro-batches and is divided by 4"),
        (updates.micro_averaged_and_fixed, ("mean of micro-batches", "partial window"), "divided by 4"),
        (updates.sample_averaged, ("mean of samples",), "mean(n) / n of its sample"),
        (updates.clipped_each_time, ("clipping",), "clipping per micro-step"),
        (updates.clipped_by_hand_each_time, ("clipping",), "clipping per micro-step"),
        (updates.clipped_once, (), ""),
        (updates.values_clipped_once, (), ""),
        (updates.each_parameter_clipped_once, (), ""),
        (updates.micro_averaged_and_clipped_once, ("mean of micro-batches",), ""),
        (updates.kept_in_bf16, ("16-bit accumulation",), "bfloat16"),
        (updates.kept_in_fp16, ("16-bit accumulation",), "float16"),
        (updates.autocast, ("autocast",), "autocast to bfloat16"),
        (updates.shuffled_weights, ("unknown",), "none of the causes"),
    ],
)
def test_steps(step: Any, kinds: tuple[str, ...], words: str) -> None:
    answer = found(updates.language_model, step)
    diagnosis = answer["of_loops"]["own"]
    assert diagnosis.kinds == kinds
    assert diagnosis.is_same is (not kinds)
    assert words in " ".join(cause.says for cause in diagnosis.causes)
    if "clipped_once" in step.__name__:
        assert "clipped once" in diagnosis.notes[0]


@pytest.mark.parametrize("module", [updates.batch_norm, updates.contrastive])
def test_a_right_step_is_right_on_a_module_that_does_not_cut(module: Any) -> None:
    """Two questions, two answers."""

    def step(model: Any, micro_batches: list[Any]) -> None:
        for one in micro_batches:
            (model(*one) / len(micro_batches)).backward()

    answer = found(module, step)
    assert not answer["of_subject"].is_same
    assert answer["of_loops"]["own"].is_same


@pytest.mark.parametrize("accumulation", [1, 2, 3, 5])
def test_any_number_of_micro_steps(accumulation: int) -> None:
    answer = found(updates.language_model, shape=Shape(2, accumulation, 1, 12))
    assert answer["of_loops"]["normalised"].is_same
    assert answer["of_loops"]["naive"].kinds == (("mean of micro-batches",) if accumulation > 1 else ())
    assert max(one.error for one in answer["loops"]["normalised"].windows) < 1e-6


def two(rank: int) -> list[dict[str, Any]]:
    shape = Shape(micro_batch_size=2, accumulation=3, ranks=2, seq_len=12)
    steps = (
        updates.right,
        updates.uncompensated,
        updates.micro_averaged,
        updates.clipped_each_time,
        updates.clipped_once,
    )
    return [found(updates.language_model, step, shape, rank) for step in steps]


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Any]]]:
    return on_ranks(two, 2)


def test_two_ranks(ranks: list[list[dict[str, Any]]]) -> None:
    """Micro-averaging over ranks, the mean of the ranks' means, and an average that nobody made up for."""
    for answers in ranks:
        kinds = [answer["of_loops"]["own"].kinds for answer in answers]
        assert kinds[:3] == [("mean of ranks",), ("scale",), ("mean of micro-batches",)]
        assert "clipping" in kinds[3]
        assert kinds[4] == ("mean of ranks",)
        assert "clipped once" in answers[4]["of_loops"]["own"].notes[0]
        assert "1 / R = 1 / 2" in answers[1]["of_loops"]["own"].causes[0].says
        for answer in answers:
            assert answer["of_loops"]["normalised"].is_same
            assert answer["of_loops"]["naive"].kinds == ("mean of micro-batches",)


# -- what no module here shows -----------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_a_number() -> None:
    nan = float("nan")
    assert diagnose_subject(Subject(nan, 0.0, 0.0, [], None)).kinds == ("not a number",)
    answer = found(updates.language_model)["loops"]["naive"]
    broken = answer._replace(windows=[Window(4, nan, 1, {})])
    assert diagnose_loop(broken).kinds == ("not a number",)


def test_the_rounding_of_a_module_is_allowed_for() -> None:
    """A deep module in fp32 has a larger rounding error, which the same batch in another order shows."""
    assert diagnose_subject(Subject(5e-5, 0.0, 8e-6, [], None)).is_same
    assert not diagnose_subject(Subject(5e-5, 0.0, 1e-7, [], 0.0)).is_same


# -- weights of tokens -------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    """Micro-batches of 10, 20 and 30 tokens: the mean is 20, so that a token weighs 2, 1 and 2 / 3."""
    counts = np.array([[10, 20, 30]])
    assert step_weights(counts)[0].tolist() == pytest.approx([2, 1, 2 / 3])
    got = summary(counts)
    assert (got.smallest, got.p5, got.p50, got.p95, got.largest) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 2, 2))
    assert got.spread == pytest.approx(3)
    assert got.effective_share == pytest.approx(60**2 / (60 * (10 * 4 + 20 + 30 * 4 / 9)))
    assert got.variation == pytest.approx((200 / 3) ** 0.5 / 20)


def test_equal_lengths_weigh_the_same() -> None:
    got = token_weights(np.full(640, 100), micro_batch_size=2, accumulation=4, ranks=2)
    assert (got.p5, got.p95, got.spread, got.effective_share) == pytest.approx((1, 1, 1, 1))
    assert got.variation == 0


def test_larger_micro_batches_spread_less() -> None:
    tokens = np.random.default_rng(0).integers(1, 500, 20_000)
    spreads = [token_weights(tokens, micro_batch_size=b, accumulation=8).spread for b in (1, 4, 16)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[2] < 2
    assert spreads[0] > 4


def test_the_mean_weight_of_a_token_is_one() -> None:
    """Over a step sum(n_i mean(n) / n_i) = N, whatever the n_i."""
    counts = np.random.default_rng(1).integers(1, 50, (30, 6))
    assert (step_weights(counts) * counts).sum(1) == pytest.approx(counts.sum(1))


def test_empty_micro_batches_are_counted_and_not_weighed() -> None:
    got = summary(np.array([[0, 10], [10, 10]]))
    assert got.empty_share == 0.25
    assert got.smallest == pytest.approx(0.5)


def test_data_that_is_too_small_or_has_no_labels() -> None:
    with pytest.raises(UsageError, match="3 samples and a step takes 4"):
        token_weights(np.array([1, 2, 3]), micro_batch_size=2, accumulation=2)
    with pytest.raises(UsageError, match="No token"):
        token_weights(np.zeros(8, np.int64), micro_batch_size=2)


def test_predicted_tokens() -> None:
    """The first token of a sequence is never predicted."""
    assert predicted(Lengths(np.array([5, 1, 0]))).tolist() == [4, 0, 0]
    assert predicted(at_the_end([5, 5, 3], [2, 5, 0])).tolist() == [2, 4, 0]
    chat = Lengths(np.array([9]), Spans(np.array([0, 0]), np.array([0, 5]), np.array([2, 9])))
    assert predicted(chat).tolist() == [5]


def test_ragged_labels_leave_what_is_masked_already() -> None:
    from memplan.equivalence.runner.case import ragged

    batch = {"labels": torch.tensor([[1, 2, -100, 4]])}
    assert ragged(batch, 0) is batch
    assert ragged({"x": torch.zeros(2)}, 0).keys() == {"x"}
    many = ragged({"labels": torch.ones(64, 10, dtype=torch.int64)}, 0)["labels"]
    counts = (many != -100).sum(1)
    assert int(counts.min()) >= 2
    assert len(set(counts.tolist())) > 4
