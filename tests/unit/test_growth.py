"""How memory grows: the formula of the kept activations against the bytes, and the points around a plan."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import api
from memplan.estimation.dimensions import dimensions
from memplan.estimation.growth import around, first_that_does, growth
from memplan.estimation.kept import SUMS, multiplied_out, symbol
from memplan.operators.sizes import Size
from memplan.report.beside import growth_document
from memplan.report.growth import headline, meaning, meanings, take_over
from memplan.specs.values import replace

GPT2_EAGER = {"micro_batch": 4, "seq_len": 512, "attention": "eager"}


def made(model: str, choices: dict[str, Any], gpus: int = 1) -> tuple[Any, Any]:
    """The estimator and the setup."""
    found = api.find_model(model)
    assert isinstance(found, api.Model)
    spec, _ = api.find_gpu("h100", None)
    estimator = api.estimator_of(found, spec, api.find_speed(spec), remembers=False)
    return estimator, api.make_setup(found, gpus, choices)


@pytest.mark.parametrize(
    ("model", "choices"),
    [
        ("gpt2", {"micro_batch": 1, "seq_len": 1000}),
        ("gpt2", GPT2_EAGER),
        ("llama-3-8b", {"micro_batch": 3, "seq_len": 777, "checkpointing": "every-2"}),
        ("llama-3-8b", {"micro_batch": 2, "seq_len": 515, "supervised": 0.3, "loss": "tiled"}),
        ("llama-3-8b", {"micro_batch": 3, "seq_len": 333, "batching": "padding-free"}),
        ("llama-3-8b", {"micro_batch": 2, "seq_len": 1024, "batching": "packed"}),
        ("Qwen/Qwen2.5-1.5B", {"micro_batch": 3, "seq_len": 77, "objective": "dpo"}),
        ("Qwen/Qwen2.5-1.5B", {"micro_batch": 1, "seq_len": 130, "lora_rank": 8, "quantize": "nf4"}),
    ],
)
def test_the_formula_is_the_kept_bytes_but_for_rounding(model: str, choices: dict[str, Any]) -> None:
    """At the setup and at other micro-batches and lengths, too: each block is rounded up by less than 512 bytes."""
    estimator, setup = made(model, choices)
    kept = growth(estimator, setup).kept
    assert kept.num_blocks > 0
    for b, s in ((setup.micro_batch_size, setup.seq_len), (2, 96), (5, 401)):
        other = replace(setup, micro_batch_size=b, seq_len=s)
        bytes_kept = int(estimator.peaks(other).kept_activation_bytes)
        assert 0 <= bytes_kept - kept.value(dimensions(other)) <= kept.rounding_bytes
        assert kept.rounding_bytes < 0.02 * bytes_kept or s == 96  # so that the bound says something


def test_the_formula_of_eager_attention_has_a_square() -> None:
    """GPT-2, 12 layers with 12 heads, fp32 scores of s x s: softmax, dropout and its mask, 2+2+1 bytes in bf16."""
    estimator, setup = made("gpt2", {**GPT2_EAGER, "precision": "bf16"})
    found = growth(estimator, setup).kept
    (square,) = (term for term in found.terms if term.dims.count("s") == 2)
    assert square.dims == ("b", "s", "s")
    assert square.factor % (12 * 12) == 0
    assert f"{square.factor:,}·b·s²" in found.formula()


def test_dimensions_are_multiplied_out() -> None:
    assert multiplied_out(Size(8, ("b", "s+1")), SUMS) == {("b", "s"): 8, ("b",): 8}
    assert multiplied_out(Size(2, ("b*(s-1)", "s")), SUMS) == {("b", "s", "s"): 2, ("b", "s"): -2}
    assert multiplied_out(Size(3, ("s to 16",)), SUMS) == {("s to 16",): 3}


def test_symbols_say_what_they_mean() -> None:
    assert symbol("s", is_one_row=True) == "t"
    assert symbol("s to 16", is_one_row=True) == "[t to 16]"
    assert meaning("[t to 16]") == "t, rounded up to a multiple of 16"
    assert meaning("[min(n, 256)]") == "n, but at most 256"
    assert meaning("[more(n, 256)]") == "1 where n is more than 256, else 0"
    assert meaning("[pow2(b*s / 16)]") == "b*s / 16, rounded up to a power of two"


def test_points_are_those_of_single_estimates() -> None:
    """Their kinds add up to the least the process takes, and the configuration is among them."""
    estimator, setup = made("gpt2", {"micro_batch": 8, "seq_len": 512})
    found = growth(estimator, setup)
    assert [point.size for point in found.by_micro_batch] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [point.size for point in found.by_length] == [128, 256, 384, 512, 640, 768, 896, 1024]
    for point in found.by_micro_batch:
        memory = estimator.memory(replace(setup, micro_batch_size=point.size))
        assert sum(num for _, num in point.by_kind) == memory.peak_process_bytes
    for point in found.by_length:
        memory = estimator.memory(replace(setup, seq_len=point.size))
        assert sum(num for _, num in point.by_kind) == memory.peak_process_bytes


def test_lengths_end_where_the_model_has_no_positions() -> None:
    estimator, setup = made("gpt2", {"micro_batch": 1, "seq_len": 1024})
    assert [point.size for point in growth(estimator, setup).by_length] == [256, 512, 768, 1024]


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (1, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, [1, 2, 3, 4, 5, 6, 7, 8]),
        (6, [1, 3, 4, 6, 7, 9, 10, 12]),
        (5003, [1250, 2501, 3752, 5003, 6253, 7504, 8755, 10006]),
    ],
)
def test_sizes_around(size: int, found: list[int]) -> None:
    assert around(size) == found


def test_where_activations_take_over() -> None:
    """The micro-batch named is the first: one less keeps no more than the states."""
    estimator, setup = made("gpt2", GPT2_EAGER)
    found = growth(estimator, setup)
    states = found.state_bytes

    def kept(**changes: int) -> int:
        return int(estimator.peaks(replace(setup, **changes)).kept_activation_bytes)

    micro, length = found.takes_over
    assert micro is not None
    assert length is not None
    assert micro > 1
    assert kept(micro_batch_size=micro - 1) <= states < kept(micro_batch_size=micro)
    assert kept(seq_len=length - 1) <= states < kept(seq_len=length)
    said = take_over(growth_document(found))
    assert f"from micro-batch {micro:,} on" in said
    assert f"from {length:,} tokens on" in said


@pytest.mark.parametrize("first", [1, 2, 3, 5, 17, 100])
@pytest.mark.parametrize("end", [1, 4, 17, 100, 10**9])
def test_the_first_size_that_does(first: int, end: int) -> None:
    """By bisection; None where there is none before the sizes end."""
    found = first_that_does(lambda size: None if size > end else size >= first)
    assert found == (first if first <= end else None)


def test_the_headline_leaves_small_terms_to_the_whole() -> None:
    estimator, setup = made("gpt2", GPT2_EAGER)
    document = growth_document(growth(estimator, setup))
    text = headline(document["kept"])
    assert "·b·s + " in text
    assert "·b·s² bytes, and " in text
    assert text.endswith("small terms")


def test_sequences_of_pairs_are_counted_twice() -> None:
    estimator, setup = made("Qwen/Qwen2.5-1.5B", {"micro_batch": 3, "seq_len": 77, "objective": "dpo"})
    document = growth_document(growth(estimator, setup))
    assert document["kept"]["sequences"] == 6
    assert dict(meanings(document, ["b", "s"])) == {
        "b": "sequences in a micro-batch, two a pair",
        "s": "tokens in each",
    }
