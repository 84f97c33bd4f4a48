"""What an answer says that its user may not know: each lint where its cause is, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import memplan

if TYPE_CHECKING:
    from memplan.estimation.lints import Lint

GPT2 = "gpt2"


def said(model: str = GPT2, **choices: object) -> dict[str, Lint]:
    return {lint.what: lint for lint in memplan.estimate(model, **choices).lints}  # type: ignore[arg-type]


def peak(model: str = GPT2, **choices: object) -> int:
    return memplan.estimate(model, **choices).memory.peak_allocated_bytes  # type: ignore[arg-type]


CASES = [
    ("dtype left at fp32", GPT2, {"precision": "fp32"}, {"precision": "bf16"}),
    ("logits larger than all activations", GPT2, {"checkpointing": "full", "micro_batch": 8}, {"loss": "tiled"}),
    ("adapters in fp32", "qwen2.5-0.5b", {"lora_rank": 16, "micro_batch": 4}, {"lora_dtype": "base"}),
    (
        "int8 layers hold on to their inputs",
        "qwen2.5-0.5b",
        {"lora_rank": 16, "quantize": "int8", "checkpointing": "full"},
        {"quantize": "nf4"},
    ),
    (
        "reentrant checkpointing",
        GPT2,
        {"checkpointing": "full", "reentrant": True, "micro_batch": 8, "loss": "tiled", "optimizer": "sgd"},
        {"reentrant": False},
    ),
    (
        "adapters of experts",
        "qwen3-30b-a3b",
        {"lora_rank": 8},
        {"lora_targets": "q_proj,k_proj,v_proj,o_proj"},
    ),
    ("a mask rules flash attention out", "qwen2.5-0.5b", {"padding": True}, {"padding": False}),
    (
        "sequences in one row without flash attention",
        "qwen2.5-0.5b",
        {"batching": "padding-free", "micro_batch": 4},
        {"attention": "flash"},
    ),
    (
        "sequences in one row without flash attention",
        "qwen2.5-0.5b",
        {"batching": "packed"},
        {"attention": "flash"},
    ),
]


@pytest.mark.parametrize(("what", "model", "given", "heeded"), CASES, ids=[case[0] for case in CASES])
def test_a_lint_and_its_effect(what: str, model: str, given: dict[str, object], heeded: dict[str, object]) -> None:
    """GIVEN the cause WHEN it is estimated THEN it is said, and its effect is the difference of two estimates."""
    lint = said(model, **given)[what]
    assert lint.effect_bytes == peak(model, **{**given, **heeded}) - peak(model, **given)
    assert lint.source
    assert what not in said(model, **{**given, **heeded})


def test_one_sequence_in_a_row_needs_no_mask() -> None:
    """One sequence by itself is as many tokens in a row as it ever was."""
    assert "sequences in one row without flash attention" not in said("qwen2.5-0.5b", batching="padding-free")


def test_checkpointing_that_saves_little() -> None:
    """Where the optimizer step is the peak, activations are not there."""
    lint = said("qwen2.5-0.5b", checkpointing="full", seq_len=128)["checkpointing that saves little"]
    assert lint.effect_bytes is None
    assert "checkpointing that saves little" not in said("qwen2.5-0.5b", checkpointing="full", micro_batch=16)


def test_heads_too_wide_for_flash() -> None:
    """Heads of 512; those of Gemma, 256, are the widest that the kernel takes."""
    assert "heads too wide for flash attention" not in said("gemma-2b")


def test_8_bit_states_that_are_not() -> None:
    """bert-base has a quarter of its numbers in embeddings, which the Trainer registers with 32 bits."""
    assert "8-bit states that are not" in said("bert-base-uncased", optimizer="adamw-8bit", seq_len=128)
    assert "8-bit states that are not" not in said("llama-2-7b", optimizer="adamw-8bit", seq_len=128)


def test_reentrant_checkpointing_after_a_frozen_embedding() -> None:
    """Not where a copy of the embedding is trained, not where all is, and not without reentrant checkpointing."""
    what, lora = "reentrant checkpointing after a frozen embedding", {"lora_rank": 8, "checkpointing": "full"}
    assert what in said("qwen2.5-0.5b", **lora, reentrant=True)
    assert what not in said("qwen2.5-0.5b", **lora)
    assert what not in said("qwen2.5-0.5b", **lora, reentrant=True, modules_to_save="embed_tokens")
    assert what not in said("qwen2.5-0.5b", checkpointing="full", reentrant=True)


def test_nothing_to_say() -> None:
    """An ordinary configuration is left alone."""
    assert not said("llama-3-8b", micro_batch=1, seq_len=2048)
