"""Grids of trials: how a file is read, and that those which memplan comes with can be run."""

from __future__ import annotations

import pytest

from memplan import measuring
from memplan.catalog.matrix import named_matrices, parse_matrix, read_matrix
from memplan.errors import MemplanError
from memplan.specs.measurement import Card


def test_lists_are_crossed_in_order_and_defaults_fill_in():
    table = {
        "defaults": {"seq_len": 512, "precision": "bf16"},
        "trial": [{"model": ["a", "b"], "micro_batch": [1, 2], "precision": "fp32"}],
    }
    entries = parse_matrix(table, "grid")
    assert [(e.choices["model"], e.choices["micro_batch"]) for e in entries] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert all(e.choices["seq_len"] == 512 and e.choices["precision"] == "fp32" for e in entries)


def test_searches_and_plans_are_told_from_single_trials():
    table = {"trial": [{"model": "a", "find_max": True}, {"model": "a", "limit": "24GB", "target_batch": 32}]}
    search, plan = parse_matrix(table, "grid")
    assert (search.find_max, search.target_batch) == (True, None)
    assert (plan.find_max, plan.target_batch) == (False, 32)
    assert "target_batch" not in plan.choices


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, "no trials"),
        ({"trial": []}, "no trials"),
        ({"trial": [{"seq_len": 1}]}, "no model"),
        ({"trial": [{"model": "a", "sequence": 1}]}, "unknown key, 'sequence'"),
        ({"trial": [{"model": "a", "seq_len": "long"}]}, "seq_len is 'long' in trial 1"),
        ({"trial": [{"model": "a", "seq_len": True}]}, "seq_len is True"),
        ({"trial": [{"model": "a", "seq_len": []}]}, "an empty list"),
        ({"trial": ["a"]}, "is no table"),
        ({"trials": [{"model": "a"}]}, "'trials'"),
        ({"trial": [{"model": "a", "target_batch": 8}]}, "no limit"),
        ({"trial": [{"model": "a", "limit": "8GB", "target_batch": 8, "find_max": True}]}, "contradict"),
        ({"trial": [{"model": "a", "seq_len": list(range(1, 200)), "micro_batch": list(range(1, 200))}]}, "more than"),
    ],
)
def test_a_broken_matrix_says_where_and_what(table, says):
    with pytest.raises(MemplanError) as fault:
        parse_matrix(table, "grid")
    assert says in fault.value.cause
    assert fault.value.cure


def test_a_file_that_is_no_toml_or_is_not_there_is_a_fault(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[[trial]\nmodel=")
    with pytest.raises(MemplanError, match="is not TOML"):
        read_matrix(str(path))
    with pytest.raises(MemplanError, match="cannot be read"):
        read_matrix(str(tmp_path / "nowhere.toml"))


@pytest.mark.parametrize("name", ["core", "full"])
def test_every_trial_of_the_matrices_can_be_made(name):
    assert name in named_matrices()
    for entry in read_matrix(name):
        trial = measuring.make_trial(**entry.choices)
        assert trial.config
        assert (entry.target_batch is None and not entry.find_max) or trial.limit_bytes


H200 = Card(device="cuda", name="NVIDIA H200", total_bytes=150_754_820_096, compute_capability="9.0")


@pytest.mark.parametrize("name", ["core", pytest.param("full", marks=pytest.mark.slow)])
def test_every_entry_of_the_matrices_can_be_asked(name):
    """Plans exist, and the formula takes what is no adapter and of a described model: nothing ends a run of hours."""
    for entry in read_matrix(name):
        trial = measuring.make_trial(**entry.choices)
        gpu = measuring.gpu_of(H200, trial.limit_bytes, trial.limit)
        if entry.target_batch is not None:
            mode = entry.choices.get("checkpointing")
            plan = measuring.plan_of(trial, gpu, entry.target_batch, checkpointing=mode)
            assert plan is not None or name == "full", entry
        elif trial.setup.lora is None:
            measuring.estimator_of(trial, gpu).check(trial.setup)


def test_the_core_matrix_covers_what_it_promises():
    """About 40 trials: a plan takes two, a search some four."""
    entries = read_matrix("core")
    trials = [measuring.make_trial(**entry.choices) for entry in entries]
    num = sum(2 if entry.target_batch else 4 if entry.find_max else 1 for entry in entries)
    assert 35 <= num <= 45, num
    assert {trial.limit for trial in trials} >= {"8GB", "12GB", "16GB", "24GB", "40GB", "80GB"}
    setups = [trial.setup for trial in trials]
    assert {setup.attention for setup in setups} == {"sdpa", "eager", "flash"}
    assert {setup.precision for setup in setups} >= {"bf16", "fp32", "bf16-mixed"}
    assert {setup.gradient_accumulation_steps for setup in setups} >= {1, 4}
    assert {setup.activation_checkpointing for setup in setups} >= {"none", "full", "selective", "every-2"}
    assert any(setup.lora for setup in setups)
    assert entries[0].target_batch, "the decisive question comes first"
