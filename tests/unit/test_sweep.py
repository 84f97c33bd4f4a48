"""A sweep: its axes, its verdicts against replays of every point, its numbers against single estimates."""

from __future__ import annotations

import numpy as np
import pytest

import memplan
from memplan import UsageError, api
from memplan.cli.axes import MOST_NUMBERS, read_axis
from memplan.estimation.estimate import Estimator
from memplan.estimation.sweep import MOST_LENGTHS_REPLAYED, MOST_POINTS, _Boundary, spread
from memplan.specs.margin import Margin
from memplan.specs.values import replace

# -- axes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("8", [8]),
        ("1,2,4", [1, 2, 4]),
        (" 4, 1 ", [1, 4]),
        ("1..4", [1, 2, 3, 4]),
        ("3..3", [3]),
        ("1..64x2", [1, 2, 4, 8, 16, 32, 64]),
        ("3..20x3", [3, 9]),
        ("512..1600+512", [512, 1024, 1536]),
        ("1..3,8..16x2", [1, 2, 3, 8, 16]),
        ("1_000", [1000]),
        ("1..1000000000x10", [10**n for n in range(10)]),
    ],
)
def test_an_axis(text: str, numbers: list[int]) -> None:
    assert read_axis(text, "--micro-batch") == tuple(numbers)


@pytest.mark.parametrize(
    ("text", "cause", "cure"),
    [
        ("", "is '', where a number is missing", "1..64x2 (doubling)"),
        ("1,,2", "where a number is missing", "1..64x2"),
        ("1..", "where a number is missing", "1..64x2"),
        ("..4", "where a number is missing", "1..64x2"),
        ("a", "is 'a', no whole number", "1..64x2"),
        ("1..x", "where a number is missing", "1..64x2"),
        ("1..8x2x2", "with '2x2', no whole number", "1..64x2"),
        ("-3", "no whole number", "1..64x2"),
        ("1.5", "no whole number", "1..64x2"),
        ("²", "no whole number", "1..64x2"),
        ("0", "is '0'.", "from 1 to 1,000,000,000"),
        ("0..4", "with '0'", "from 1 to"),
        ("1..4+0", "with '0'", "from 1 to"),
        ("9" * 5000, "'99999", "from 1 to"),
        ("4..1", "runs backwards", "1..4."),
        ("4..1x2", "runs backwards", "1..4x2."),
        ("1..4x1", "does not grow", "1..4x2."),
        ("1,2,1", "names 1 more than once", "once"),
        ("1..8,4", "names 4 more than once", "once"),
        ("1..1000000000", "1,000,000,000 numbers", f"{MOST_NUMBERS:,}"),
    ],
)
def test_what_is_no_axis(text: str, cause: str, cure: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_axis(text, "--micro-batch")
    assert caught.value.cause.startswith("--micro-batch ")
    assert cause in caught.value.cause
    assert cure in caught.value.cure
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("model", "lengths"),
    [
        ("qwen2.5-1.5b", (512, 1024, 2048, 4096, 8192)),
        ("gpt2", (512, 1024)),
        ("bert", (64, 128, 256, 512)),
        ("mpt-7b", (512, 1024, 2048)),
    ],
)
def test_the_lengths_where_none_are_given(model: str, lengths: tuple[int, ...]) -> None:
    assert api.default_seq_lens(api.find_model(model)) == lengths


def test_positions_that_are_spread() -> None:
    assert spread(5, 8) == [0, 1, 2, 3, 4]
    assert spread(100, 8) == [0, 14, 28, 42, 57, 71, 85, 99]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "choices"),
    [
        ("gpt2", {}),
        ("qwen2.5-0.5b", {"lora_rank": 8, "quantize": "nf4", "checkpointing": "full"}),
        ("llama-3.2-3b", {"precision": "bf16-mixed", "accumulation": 4, "optimizer": "adamw-8bit", "gpus": 2}),
        ("gemma-2-9b", {"attention": "eager", "padding": True, "seq_lens": (1024, 4095, 4096, 4097)}),
        ("mistral-7b", {"batching": "padding-free", "seq_lens": (512, 4097)}),
        ("llama-3.2-3b", {"batching": "packed", "packed_sequences": 7, "attention": "flash"}),
    ],
)
def test_every_point_is_the_estimate_of_it(model: str, choices: dict) -> None:
    """Allocated and kept bytes are those of `estimate`; process bytes are at most those, which are replayed."""
    swept = {"micro_batches": (1, 3), "seq_lens": (77, 1024), **choices}
    plain = {name: value for name, value in choices.items() if name != "seq_lens"}
    for point in api.sweep(model, **swept).records():
        one = memplan.estimate(model, micro_batch=point["micro_batch_size"], seq_len=point["seq_len"], **plain)
        assert point["peak_allocated_bytes"] == one.memory.peak_allocated_bytes
        assert point["kept_activation_bytes"] == one.kept_activation_bytes
        rest = one.memory.context_bytes + one.memory.workspace_bytes
        assert point["peak_allocated_bytes"] + rest <= point["peak_process_bytes"] <= one.memory.peak_process_bytes
        assert (point["headroom_bytes"], point["verdict"]) == (None, None)


def test_a_margin_is_part_of_the_bound() -> None:
    gpu, reserve = "24GB", 3 * 2**30
    found = api.sweep("gpt2", gpu=gpu, reserve=reserve, headroom=10, micro_batches=(1, 16), seq_lens=(512,))
    for point in found.records():
        free = reserve + int(24 * 10**9 * 10 / 100)
        assert point["upper_bound_bytes"] == point["peak_process_bytes"] + free
        assert point["headroom_bytes"] == 24 * 10**9 - point["upper_bound_bytes"]
        assert (point["verdict"] == "oom") == (point["headroom_bytes"] < 0)


# -- verdicts ----------------------------------------------------------------------------------------------------------

GRIDS = [
    ("gpt2", "24GB", {"micro_batches": (1, *range(14, 40, 2)), "seq_lens": (500, 1024)}),
    ("gpt2", "8GB", {"micro_batches": range(1, 12), "seq_lens": (512, 1000), "lora_rank": 8, "quantize": "nf4"}),
    ("qwen2.5-0.5b", "16GB", {"checkpointing": "full", "accumulation": 2, "micro_batches": range(1, 7)}),
]


@pytest.mark.parametrize(("model", "gpu", "chosen"), GRIDS)
def test_verdicts_are_those_of_replays_of_every_point(model: str, gpu: str, chosen: dict) -> None:
    """The boundary alone was replayed; replaying all that fit at the least says the same."""
    swept = {"seq_lens": (512, 1024), **chosen}
    found = api.sweep(model, gpu=gpu, **swept)
    described = api.find_model(model)
    estimator = Estimator(described.architecture, described.name, found.gpu)
    budget = found.margin.budget(found.gpu.usable_bytes)
    seen = set()
    for point in found.records():
        seen.add(point["verdict"])
        size = {"micro_batch_size": point["micro_batch_size"], "seq_len": point["seq_len"]}
        setup = replace(found.grid.setup, **size)
        assert (estimator.memory(setup).peak_process_bytes > budget) == (point["verdict"] == "oom")
        if point["verdict"] != "oom":
            replayed = estimator.replayed_memory(setup, budget, "").peak_process_bytes
            assert (replayed <= budget) == (point["verdict"] == "fits"), size
    assert seen >= {"fits", "oom"}


def test_a_tight_point_may_fit_with_expandable_segments() -> None:
    """GIVEN the point above the largest, THEN `estimate` needs expandable segments, or says that it does not fit."""
    found = api.sweep("gpt2", gpu="24GB", micro_batches=range(10, 25), seq_lens=(1024,))
    (largest,) = found.largest
    assert largest.is_replayed
    assert largest.micro_batch_size < largest.with_expandable_segments <= largest.at_the_least
    for batch in (largest.micro_batch_size, largest.with_expandable_segments):
        one = memplan.estimate("gpt2", gpu="24GB", micro_batch=batch, seq_len=1024)
        assert one.fits
        assert bool(one.memory.alloc_conf) == (batch != largest.micro_batch_size)
    above = memplan.estimate("gpt2", gpu="24GB", micro_batch=largest.with_expandable_segments + 1, seq_len=1024)
    assert above.fits is False
    verdicts = {one["micro_batch_size"]: one["verdict"] for one in found.records()}
    assert verdicts[largest.micro_batch_size] == "fits"
    assert verdicts[largest.with_expandable_segments] == "tight"
    assert verdicts[largest.at_the_least + 1] == "oom"


def test_what_is_replayed_is_said() -> None:
    """Somebody who waits is told; a later sweep remembers and says it again."""
    said: list[str] = []
    found = api.sweep("gpt2", gpu="24GB", micro_batches=(8, 16), seq_lens=(1024,), notify=said.append)
    assert said == ["estimating 2 points", "1/1 replaying 16 x 1,024 tokens through the allocator"]
    assert found.num_replays == 1


def boundary_of(monkeypatch, fits) -> _Boundary:
    """A search whose replays are a rule: (micro-batch, length, settings) -> whether it fits."""
    monkeypatch.setattr(_Boundary, "_fits", lambda self, n, length, conf: fits(self.batches[n], length, conf))
    described = api.find_model("gpt2")
    setup = api.make_setup(described, 1, {})
    return _Boundary(Estimator(described.architecture, described.name), setup, range(1, 101), Margin(), None)


@pytest.mark.parametrize("most", [1, 2, 37, 99, 100, 0])
def test_the_search_finds_the_last_that_fits(monkeypatch, most: int) -> None:
    boundary = boundary_of(monkeypatch, lambda batch, length, conf: batch <= (min(most + 5, 100) if conf else most))
    (one,) = boundary.find([512], np.array([100]))
    assert one.micro_batch_size == (most or None)
    assert one.with_expandable_segments == min(most + 5, 100)
    assert one.at_the_least == 100


def test_lengths_between_go_by_the_next_longer_one(monkeypatch) -> None:
    """GIVEN many lengths, THEN some are replayed, and no other is promised more than it can have."""
    lengths = list(range(10, 1010, 10))
    asked = set()

    def fits(batch: int, length: int, conf: str) -> bool:
        asked.add(length)
        return batch * length <= (11_000 if conf else 10_000)

    least = np.array([min(100, 12_000 // length) for length in lengths])
    found = boundary_of(monkeypatch, fits).find(lengths, least)
    assert len(asked) <= MOST_LENGTHS_REPLAYED
    for one in found:
        assert one.micro_batch_size <= 10_000 // one.seq_len
        assert one.with_expandable_segments <= 11_000 // one.seq_len
        if one.is_replayed and one.at_the_least > 1:
            assert one.micro_batch_size == min(100, 10_000 // one.seq_len)
    assert sum(not one.is_replayed for one in found) > 50


def test_a_sweep_that_is_too_large() -> None:
    with pytest.raises(UsageError) as caught:
        api.sweep("gpt2", micro_batches=range(1, 1002), seq_lens=range(1, 1001))
    assert "1,001 micro-batches x 1,000 lengths are 1,001,000 points" in caught.value.cause
    assert f"{MOST_POINTS:,}" in caught.value.cure
    assert "memplan.estimate_grid" in caught.value.cure
