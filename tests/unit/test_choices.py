"""A setup as JSON, and the arguments that ask for it again."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.report.document import setup_document
from memplan.specs.choices import choices_of, setup_fields
from memplan.specs.training import Setup


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"micro_batch": 4, "accumulation": 8, "seq_len": 512, "precision": "fp16-mixed", "optimizer": "lion"},
        {"dropout": 0.0, "label_smoothing": 0.1, "supervised": 0.5, "padding": True},
        {"batching": "packed", "packed_sequences": 3},
        {"compile": True},
        {"checkpointing": "full", "offload": "activations", "attention": "flash", "loss": "fused"},
        {"objective": "dpo"},
        {"objective": "distillation", "teacher": "gpt2", "teacher_dtype": "bf16", "dropout": 0.2},
        {"lora_rank": 8, "quantize": "nf4", "upcast": True, "lora_dtype": "base", "dora": True},
        {"lora_rank": 8, "lora_targets": "q_proj,v_proj", "lora_layers": "0,2-4", "lora_ranks": "q_proj=4,v_proj=2"},
        {"lora_rank": 8, "lora_dropout": 0.1, "modules_to_save": ["lm_head"], "freeze": "model.embed_tokens"},
        {"eval_batch": 4, "eval_samples": 100, "eval_accumulation": 2},
        {"eval_generate": 16},
    ],
)
def test_a_setup_is_asked_for_again(choices: dict[str, Any]) -> None:
    setup = Setup(**setup_fields(choices))
    assert Setup(**setup_fields(choices_of(setup_document(setup)))) == setup
