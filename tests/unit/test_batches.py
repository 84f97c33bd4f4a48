"""What naive averaging does to tokens, for each way to make batches of a data set."""

from __future__ import annotations

import numpy as np
import pytest

from memplan.equivalence.batches import Step, Weighed, weigh
from memplan.equivalence.weights import FEWEST_STEPS
from memplan.errors import UsageError
from memplan.sequences.analysis import STRATEGIES
from memplan.sequences.lengths import Lengths, at_the_end
from memplan.sequences.placement import PLACING_BY_STRATEGY


def ways(lengths: Lengths, step: Step, **given: object) -> dict[str, Weighed]:
    return {one.batching: one for one in weigh(lengths, step, **given)}  # type: ignore[arg-type]


def ragged(num: int = 6000, *, answers: bool = False) -> Lengths:
    """Log-normal lengths of a median of 120 tokens; with `answers` of a fifth, on average, the rest is prompt."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.lognormal(np.log(120), 0.9, num).astype(np.int64) + 2, 2048)
    labelled = np.maximum((tokens * rng.beta(1, 4, num)).astype(np.int64), 1)
    return at_the_end(tokens, labelled) if answers else Lengths(tokens)


def test_packing_brings_the_weights_near_one() -> None:
    """Several-fold at micro-batch 1; grouping by length and packing make it less."""
    found = ways(ragged(), Step(1, 8, 2), most=2048, strategies=tuple(STRATEGIES))
    spread = {name: one.weights.spread for name, one in found.items() if one.weights is not None}
    assert list(spread) == ["rows", "grouped", *STRATEGIES]
    assert spread["rows"] > 5
    assert 1 < spread["grouped"] < spread["rows"] / 2
    assert all(1 <= spread[name] < 1.15 for name in STRATEGIES)
    share = {name: one.weights.effective_share for name, one in found.items() if one.weights is not None}
    assert share["rows"] < 0.7
    assert all(share[name] > 0.9 for name in STRATEGIES)


def test_short_answers_are_spread_even_when_packed() -> None:
    """Rows are as full, and have other numbers of tokens with a loss."""
    found = ways(ragged(answers=True), Step(1, 8, 2), most=2048)
    assert 1.15 < found["bfd"].weights.spread < found["rows"].weights.spread / 2


def test_sequences_that_fill_their_rows_weigh_the_same_by_any_way() -> None:
    """Of 64 tokens in rows of 256: 63 a sequence are predicted, 255 a row where nothing masks the first labels."""
    found = ways(Lengths(np.full(4000, 64)), Step(2, 4, 1), most=256, strategies=tuple(STRATEGIES))
    means = {name: one.weights.mean_tokens for name, one in found.items()}
    apart = {"rows": 2 * 63, "grouped": 2 * 63, "bfd": 2 * 4 * 63, "bfd-split": 2 * 4 * 63, "ffd": 2 * 4 * 63}
    assert means == pytest.approx(apart | {"wrapped": 2 * 255, "first-fit": 8 * 64 - 1})
    assert {one.weights.spread for one in found.values()} == {1.0}
    assert {name: one.row_tokens for name, one in found.items()} == {
        "rows": None,
        "grouped": None,
        **dict.fromkeys(("bfd", "bfd-split", "wrapped", "ffd"), 256),
        "first-fit": 512,  # axolotl's row is the whole micro-batch
    }


def test_rows_that_are_packed_once_are_drawn_as_sequences_are() -> None:
    """A row of every strategy of TRL is drawn once an epoch: their tokens are those of the placement."""
    lengths = ragged(1000, answers=True)
    found = ways(lengths, Step(1, 2, 1), most=2048, seed=3)["bfd"]
    rows = PLACING_BY_STRATEGY["bfd"].place(lengths.tokens, 2048).predicted(lengths, restarts=True)
    assert found.weights.num_steps >= FEWEST_STEPS
    assert found.weights.mean_tokens == pytest.approx(rows.mean(), rel=0.02)


def test_a_step_of_grouped_sequences_is_of_one_sorted_stretch() -> None:
    """Two lengths, half of the data each: nearly every step has one of them alone, whose tokens weigh the same."""
    lengths = Lengths(np.repeat([11, 101], 4000))
    found = ways(lengths, Step(2, 4, 2))
    assert found["rows"].weights.spread > 2
    assert (found["grouped"].weights.p5, found["grouped"].weights.p95) == (1, 1)
    assert found["grouped"].weights.variation < found["rows"].weights.variation / 3


def test_what_is_longer_is_cut_where_it_is_said() -> None:
    """Answers of 10 tokens behind prompts of 90, cut to 64: the end is what has labels."""
    lengths = at_the_end(np.full(400, 100), np.full(400, 10))
    assert ways(lengths, Step(2), most=64, side="left")["rows"].weights.mean_tokens == 20
    with pytest.raises(UsageError, match="Cut to 64 tokens, no sequence"):
        weigh(lengths, Step(2), most=64)
    half = at_the_end([100, 50] * 200, [10, 10] * 200)
    dropped = ways(half, Step(2), most=64, side="drop")
    assert dropped["rows"].weights.mean_tokens == 20
    assert dropped["rows"].weights.empty_share == 0
    kept = ways(half, Step(1, 4), most=64, side="right", strategies=("bfd", "bfd-split", "first-fit"))
    assert kept["rows"].weights.empty_share == pytest.approx(0.45, abs=0.05)  # half, less the steps without any token
    assert kept["bfd"].weights.empty_share > 0.4  # a prompt alone in its row, which TRL packs as it is
    assert kept["bfd-split"].weights.mean_tokens > 1.2 * kept["bfd"].weights.mean_tokens  # no answer is cut off
    assert kept["first-fit"].weights.empty_share == 0  # axolotl leaves it out


def test_too_few_rows_for_a_step_are_said() -> None:
    found = ways(Lengths(np.full(64, 100)), Step(1, 16, 4), most=1000, strategies=("bfd", "first-fit"))
    assert found["rows"].weights is not None
    assert found["bfd"] == Weighed("bfd", 1000, None, "fewer rows than the 64 of a step")
    assert found["first-fit"].why == "fewer rows than the 64 of a step"
    with pytest.raises(UsageError, match="The data has 64 samples and a step takes 128"):
        weigh(Lengths(np.full(64, 100)), Step(1, 128))


def test_a_row_is_as_long_as_the_longest_where_nothing_is_cut() -> None:
    assert ways(ragged(), Step(1, 4))["bfd"].row_tokens == int(ragged().tokens.max())


def test_sequences_without_a_token_are_none() -> None:
    tokens = np.tile([0, 50], 300)
    assert ways(Lengths(tokens), Step(1, 4))["rows"].weights.empty_share == 0
