"""The functions of the library with values that only a program can give them."""

from __future__ import annotations

import json

import numpy as np
import pytest

import memplan
from memplan import UsageError
from memplan.catalog.models import read_config


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"model": 3}, "model is 3"),
        ({"gpu": 24}, "gpu is 24, not a text"),
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 1.5}, "gpus is 1.5"),
        ({"micro_batch": 1.5}, "micro_batch is 1.5, not a whole number"),
        ({"micro_batch": True}, "micro_batch is True"),
        ({"accumulation": -1}, "accumulation is -1"),
        ({"seq_len": 10**5000}, "seq_len is a number of more than 40 digits"),
        ({"target_tokens": 1.5}, "target_tokens is 1.5"),
        ({"target_batch": "x" * 500}, "target_batch is 'xxx"),
        ({"gpu": "24GB", "reserve": 1.5}, "reserve is 1.5"),
        ({"gpu": "24GB", "reserve": -1}, "reserve is -1"),
        ({"gpu": "24GB", "headroom": "much"}, "headroom is 'much'"),
        ({"gpu": "24GB", "headroom": float("nan")}, "headroom is nan"),
        ({"checkpointing": "every-" + "9" * 5000}, "activation_checkpointing 'every-"),
    ],
)
def test_what_has_no_meaning_names_the_argument(arguments: dict, cause: str) -> None:
    with pytest.raises(UsageError) as caught:
        memplan.estimate(**{"model": "gpt2", **arguments})
    assert cause in caught.value.cause
    assert len(str(caught.value)) < 300


def test_a_path_is_a_model(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_config("gpt2")[0]))
    assert memplan.estimate(path).model.num_parameters == memplan.estimate("gpt2").model.num_parameters
    assert memplan.estimate(tmp_path).model.model_type == "gpt2"


def test_numbers_of_numpy() -> None:
    given = {"micro_batch": np.int64(4), "seq_len": np.uint8(128), "accumulation": np.int32(2), "gpus": np.int16(2)}
    plain = {name: int(value) for name, value in given.items()}
    assert memplan.estimate("gpt2", **given) == memplan.estimate("gpt2", **plain)
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=np.int64(8), seq_len=128)
    assert type(plan.best.setup.micro_batch_size) is int
    fixed = {"gpu": "24GB", "target_batch": 8, "seq_len": 128}
    assert memplan.suggest("gpt2", micro_batch=np.int8(2), **fixed) == memplan.suggest("gpt2", micro_batch=2, **fixed)


def test_a_reserve_in_bytes() -> None:
    """5 is 5 bytes; nothing is nothing, however it is said."""
    bounds = [
        memplan.estimate("gpt2", gpu="24GB", reserve=reserve).upper_bound_bytes
        for reserve in (None, 0, "0", "0GB", 5, "5B", np.int64(5))
    ]
    assert [bound - bounds[0] for bound in bounds] == [0, 0, 0, 0, 5, 5, 5]


@pytest.mark.parametrize(
    ("micro_batch", "seq_len"),
    [
        ([1.5], 8),
        ([float("nan")], 8),
        ([1, 2], [8.0]),
        ([True], 8),
        (["1"], 8),
        ([0, 1], 8),
        ([10**18], 8),
        ([10**30], 8),
        ([[1, 2], [3]], 8),
        ([1, 2], [8, 9, 10]),
    ],
)
def test_a_grid_of_what_are_no_whole_numbers(micro_batch: object, seq_len: object) -> None:
    with pytest.raises(UsageError, match=r"micro_batch|seq_len"):
        memplan.estimate_grid("gpt2", micro_batch=micro_batch, seq_len=seq_len)


def test_a_grid_of_any_whole_numbers() -> None:
    for batches in (range(1, 4), [1, 2, 3], np.array([1, 2, 3], np.uint16), np.array([], np.int64), []):
        assert len(memplan.estimate_grid("gpt2", micro_batch=batches, seq_len=8).records()) == len(batches)


# -- neighbouring targets ----------------------------------------------------------------------------------------------


def test_a_neighbour_that_divides_better() -> None:
    """GIVEN 4M tokens, 1,953 sequences, THEN a neighbour with a clearly larger micro-batch is named, and it fits."""
    plan = memplan.suggest("llama-3.2-3b", gpu="a100-80gb", target_tokens="4M")
    said = plan.coarseness()
    assert said is not None
    words = said.replace(",", "").split()
    batch = int(words[words.index("--target-batch") + 1])
    assert abs(batch - plan.target.global_batch_size) <= 2
    again = memplan.suggest("llama-3.2-3b", gpu="a100-80gb", target_batch=batch)
    assert again.best.setup.micro_batch_size >= 1.5 * plan.best.setup.micro_batch_size
    assert again.best.setup.micro_batch_size >= int(words[-1])


def test_what_is_fixed_has_no_neighbour() -> None:
    chosen = {"gpu": "a100-80gb", "target_tokens": "4M", "checkpointing": "full"}
    assert memplan.suggest("llama-3.2-3b", micro_batch=1, **chosen).coarseness() is None
    assert memplan.suggest("gpt2", gpu="24GB", target_batch=1024, seq_len=128).coarseness() is None
