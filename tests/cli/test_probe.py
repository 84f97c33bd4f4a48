"""`memplan probe`: what it says where nothing can be measured, and one real measurement on the CPU."""

from __future__ import annotations

import json
import os

import jsonschema
import pytest

import memplan.report

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("gpt2 --find-max --target-batch 8 --limit 8GB", 2, "--find-max and --target-batch contradict each other"),
        ("gpt2 --matrix core", 2, "MODEL and --matrix contradict each other"),
        ("--matrix core --seq-len 12", 2, "--seq-len and --matrix contradict each other"),
        ("--matrix core --limit 8GB", 2, "--limit and --matrix contradict each other"),
        ("gpt2 --target-batch 8", 2, "--target-batch has no --limit"),
        ("gpt2 --target-batch 8 --limit 8GB --micro-batch 2", 2, "--micro-batch and --target-batch contradict"),
        ("gpt2 --find-max --limit 8GB --snapshot x", 2, "--snapshot is of one trial"),
        ("gpt2 --limit 8", 2, "8"),
        ("gpt2 --limit 2xrtx4090", 2, "names 2 GPUs"),
        ("gpt2 --time-budget soon", 2, "--time-budget: 'soon' is no time to wait"),
        ("gpt2 --time-limit 0", 2, "--time-limit: '0' is no time to wait"),
        ("gpt2 --lora-dropout 0.1", 2, "no rank"),
        ("gpt2 --lora-rank 0", 2, "--lora-rank is '0'"),
        ("gpt2 --device tpu", 2, "--device 'tpu' is not known"),
        ("gpt2 --gpu 24GB", 2, "There is no option --gpu"),
        ("banana", 1, "banana"),
        ("some.module:factory", 2, "a probe builds models from a config.json"),
        ("gpt2 --device cpu --limit 8GB", 2, "--limit is for a GPU, and --device is cpu"),
        ("gpt2 --device cpu --snapshot x", 2, "--snapshot is for a GPU"),
        ("gpt2 --snapshot /nowhere/x", 2, "No snapshot could be written"),
        ("--matrix nowhere.toml", 1, "nowhere.toml cannot be read"),
        ("gpt2 --snapshot -", 2, "is not for the screen"),
    ],
)
def test_faults_are_said_before_anything_is_started(run, arguments, status, says):
    ran = run(f"probe {arguments}")
    assert ran.status == status
    assert says in ran.err
    assert not ran.out


def test_ranks_that_make_no_sense(run, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = run("probe gpt2")
    assert (ran.status, "RANK=2 and WORLD_SIZE=2 make no sense" in ran.err) == (2, True)


def test_searches_are_for_one_rank(run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ran = run("probe gpt2 --find-max --limit 8GB")
    assert (ran.status, "--find-max is for one rank" in ran.err) == (2, True)


@pytest.mark.slow
def test_a_measurement_on_the_cpu_and_a_matrix_that_knows_it(run, tiny, tmp_path):
    """One start of PyTorch for all of it: the JSON, the record, the schema, resuming, and no GPU."""
    records = tmp_path / "records"
    ran = run(f"probe {tiny} --device cpu --seq-len 32 --dropout 0 --records {records} --json")
    assert ran.status == 0, ran.err
    document = json.loads(ran.out)
    _check(document, "probe")
    assert document["outcome"] == "done"
    assert document["setup"]["dropout"] == 0.0
    assert document["peak_allocated_bytes"] == document["predicted"]["peak_allocated_bytes"]
    assert document["peak_reserved_bytes"] is None
    assert len((records / "cpu.jsonl").read_text().splitlines()) == 1

    matrix = tmp_path / "grid.toml"
    matrix.write_text(f'[[trial]]\nmodel = "{tiny}"\nseq_len = [32, 48]\ndropout = 0.0\n')
    ran = run(f"probe --matrix {matrix} --device cpu --records {records} --json")
    assert ran.status == 0, ran.err
    several = json.loads(ran.out)
    _check(several, "probes")
    assert (several["num_measured"], several["num_known"]) == (1, 1)
    assert len((records / "cpu.jsonl").read_text().splitlines()) == 2

    text = run(f"probe --matrix {matrix} --device cpu --records {records}").out
    assert "2 known from before" in " ".join(text.split())
    assert all(len(line) <= 80 or str(records) in line for line in text.splitlines())


@pytest.mark.slow  # the same process and words as in tests/unit/test_probe_child.py
def test_without_a_gpu_it_says_so(run, tiny):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    ran = run(f"probe {tiny} --records -")
    assert ran.status == 1
    assert "CUDA" in ran.err
    assert "--device cpu" in ran.err or "nvidia-smi" in ran.err


def _check(document, name):
    path = os.path.join(os.path.dirname(memplan.report.__file__), "schemas", f"{name}.schema.json")
    with open(path, encoding="utf-8") as file:
        schema = json.load(file)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)
    assert set(document) == set(schema["properties"])
