"""Every row of the ledger says how its bytes come about and who makes them."""

from __future__ import annotations

import math

import pytest

import memplan
from memplan.operators.sizes import ALLOCATION_STEP_BYTES, bind
from memplan.report.document import estimate_document

CASES = [
    ("gpt2", {}),
    ("gpt2", {"optimizer": "adamw-8bit", "accumulation": 3, "seq_len": 1000}),
    ("gpt2", {"optimizer": "sgd-momentum", "gpus": 2, "micro_batch": 3}),
    ("qwen2.5-1.5b", {"micro_batch": 2, "seq_len": 1024, "optimizer": "adamw-fused", "checkpointing": "full"}),
    ("qwen2.5-0.5b", {"precision": "bf16-mixed", "checkpointing": "selective", "padding": True}),
    ("gemma-2-9b", {"attention": "eager", "checkpointing": "every-2", "seq_len": 777, "optimizer": "adamw-forloop"}),
    ("bert", {"micro_batch": 4}),
    ("deberta-v3", {"micro_batch": 2, "precision": "fp16-mixed"}),
    ("modernbert", {"accumulation": 2, "seq_len": 300}),
    ("bloom-560m", {}),
]


def product(formula: str, micro_batch: int, seq_len: int) -> int:
    """What a formula comes to."""
    named = bind(micro_batch, seq_len)
    return math.prod(int(factor) if factor.isdigit() else int(named[factor]) for factor in formula.split(" x "))


@pytest.mark.parametrize(("model", "choices"), CASES)
def test_formulas_and_sources(model: str, choices: dict) -> None:
    """GIVEN any row, THEN its formula begins with its count, comes to its bytes before rounding, and has a source."""
    found = memplan.estimate(model, **choices)
    setup = found.setup
    rows = estimate_document(found)["ledger"]
    assert [row for row in rows if not row["formula"] or not row["source"]] == []
    for row in rows:
        exact = product(row["formula"], setup.micro_batch_size, setup.seq_len)
        assert exact <= row["bytes"] or row["bytes"] == 0, row
        assert row["bytes"] - exact < ALLOCATION_STEP_BYTES * row["count"], row
        if row["module"] != "process":
            assert row["formula"].startswith(f"{row['count']} x "), row


def test_formulas_have_the_dimensions() -> None:
    rows = memplan.estimate("qwen2.5-1.5b", checkpointing="none").ledger
    by_kind = {(row.module, row.kind, row.tensor): row.formula for row in rows}
    path = "model.layers.*.mlp"
    assert by_kind[f"{path}.gate_proj.weight", "parameter", "parameter"] == "28 x 8960 x 1536 x 2"
    assert by_kind[f"{path}.gate_proj", "activation", "linear"] == "28 x b x s x 8960 x 2"


@pytest.mark.parametrize(
    ("optimizer", "tensor", "source"),
    [
        ("adamw", "exp_avg", "torch.optim.AdamW"),
        ("adamw-8bit", "absmax of exp_avg", "bitsandbytes"),
        ("sgd-momentum", "momentum_buffer", "torch.optim.SGD"),
    ],
)
def test_states_name_their_optimizer(optimizer: str, tensor: str, source: str) -> None:
    rows = memplan.estimate("gpt2", optimizer=optimizer).ledger
    assert {source in row.source for row in rows if row.tensor == tensor} == {True}


def test_temporaries_name_their_operator() -> None:
    rows = memplan.estimate("gpt2", checkpointing="full", micro_batch=8).ledger
    sources = {row.source for row in rows if row.kind == "temporary" and row.module != "process"}
    assert any(source.startswith("made by ") for source in sources)
    assert any("backward pass" in source for source in sources)
