"""The JSON of every command against the schema that is shipped for it."""

from __future__ import annotations

import json
import os

import jsonschema
import pytest

import memplan.report

SCHEMAS = os.path.join(os.path.dirname(memplan.report.__file__), "schemas")

COMMANDS = [
    ("estimate", "estimate gpt2"),
    ("estimate", "estimate llama-3-8b --gpu rtx4090 --precision bf16-mixed --accumulation 4"),
    ("estimate", "estimate qwen2.5-0.5b --gpu 2xa100-80gb --target-tokens 64k --optimizer adamw-8bit --dropout 0.1"),
    ("plan", "suggest gpt2 --gpu t4 --target-batch 32"),
    ("plan", "suggest gpt2 --gpu t4 --target-batch 32 --padding"),
    ("plan", "suggest gpt2 --gpu t4 --target-batch 32 --batching packed --packed-sequences 3"),
    ("sweep", "sweep gpt2 --batching padding-free"),
    ("plan", "suggest qwen2.5-0.5b --gpu 2xa100-80gb --target-tokens 4M --reserve 1GiB --optimizer sgd-momentum"),
    ("plan", "suggest llama-3-8b --gpu 24GB --target-batch 32"),
    ("plan", "suggest qwen2.5-1.5b --gpu 24GB --target-batch 32 --precision bf16-mixed"),
    ("sweep", "sweep gpt2"),
    ("sweep", "sweep gpt2 --gpu rtx4090 --micro-batch 8..24+4 --reserve 1GiB --lora-rank 4"),
    ("sweep", "sweep llama-3.1-405b --gpu 24GB --seq-len 512 --dropout 0.1"),
    ("accuracy", "validate --records /dev/null"),
    ("models", "models"),
    ("gpus", "gpus"),
]


def read_schema(name: str) -> dict:
    with open(os.path.join(SCHEMAS, f"{name}.schema.json"), encoding="utf-8") as file:
        return json.load(file)


def unlisted(value: object, schema: dict, root: dict, path: str = "$") -> list[str]:
    """Keys that a document has and its schema does not describe."""
    for branch in schema.get("anyOf", [schema]):
        here = root["$defs"][branch["$ref"].rpartition("/")[2]] if "$ref" in branch else branch
        if isinstance(value, dict) and "properties" in here:
            known = here["properties"]
            found = [f"{path}.{key}" for key in value if key not in known]
            return found + [
                item
                for key in value
                if key in known
                for item in unlisted(value[key], known[key], root, f"{path}.{key}")
            ]
        if isinstance(value, list) and "items" in here:
            return [item for one in value for item in unlisted(one, here["items"], root, f"{path}[]")]
    return []


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize(("schema", "command"), COMMANDS)
def test_document_and_schema(run, schema: str, command: str) -> None:
    """A document is valid, has no key that its schema does not describe, and no NaN."""
    document = json.loads(run(f"{command} --json").out, parse_constant=refuse)
    rules = read_schema(schema)
    jsonschema.Draft202012Validator.check_schema(rules)
    jsonschema.Draft202012Validator(rules).validate(document)
    assert unlisted(document, rules, rules) == []
    assert document["schema_version"] == 1


@pytest.mark.parametrize(("schema", "command"), COMMANDS)
def test_bytes_are_whole(run, schema: str, command: str) -> None:
    """Everything that is called bytes is an integer or null."""

    def check(value: object, key: str = "") -> None:
        if isinstance(value, dict):
            for name, one in value.items():
                check(one, name)
        elif isinstance(value, list):
            for one in value:
                check(one, key)
        elif (key == "bytes" or key.endswith("_bytes") or key == "bytes_at_peak") and value is not None:
            assert type(value) is int or key in {"label_bytes"}, key

    document = json.loads(run(f"{command} --json").out)
    if schema != "gpus":
        check(document)
    else:
        check([{**gpu, "sources": {}} for gpu in document["gpus"]])


@pytest.mark.parametrize("name", ["estimate", "plan", "sweep", "models", "gpus"])
def test_the_contract(name: str) -> None:
    """The keys that scripts rely on are required."""
    contract = {
        "estimate": {
            "schema_version kind model setup gpu parameter_bytes gradient_bytes optimizer_state_bytes",
            "kept_activation_bytes kept_activation_bytes_per_layer peak_allocated_bytes peak_reserved_bytes",
            "peak_process_bytes peak_instant instants upper_bound_bytes confidence step_time_s fits headroom_bytes",
            "ledger unmodelled",
        },
        "plan": {"schema_version kind model gpu target best alternatives rejections levers"},
        "sweep": {"schema_version kind model setup gpu micro_batch_sizes seq_lens fits largest points unmodelled"},
        "models": {"schema_version kind models"},
        "gpus": {"schema_version kind gpus"},
    }
    assert {key for line in contract[name] for key in line.split()} <= set(read_schema(name)["required"])
