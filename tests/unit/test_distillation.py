"""Distillation, worked out by hand: what the loss keeps and holds, what a teacher adds, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.estimate import Estimator
from memplan.estimation.grid import estimate_grid
from memplan.estimation.step import TEACHER
from memplan.export.trainer import trainer_arguments
from memplan.operators.sizes import allocated
from memplan.specs.adapter import Lora
from memplan.specs.choices import dropout_of, setup_fields
from memplan.specs.records import parse_setup, setup_record
from memplan.specs.training import Setup

WORDS, LENGTH, BATCH, LAYERS = 5000, 128, 3, 4
SCALAR = 512
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": WORDS,
}
TAUGHT_BY = LLAMA | {"num_hidden_layers": LAYERS, "hidden_size": 128, "num_key_value_heads": 1}
LOGITS = 2 * BATCH * LENGTH * WORDS
PREDICTING = allocated(2 * BATCH * (LENGTH - 1) * WORDS)
"""Bytes of what the loss computes of the logits."""


def estimator(teacher: dict[str, Any] | None = TAUGHT_BY, **changes: Any) -> Estimator:
    """A small Llama, and a deeper one that teaches it."""
    taught = None if teacher is None else read_architecture(teacher, "teacher", dropout=0.0)
    return Estimator(read_architecture(LLAMA | changes, "config"), "llama", teacher=taught)


def setup_of(**choices: Any) -> Setup:
    """A setup of a student."""
    plain = {"micro_batch_size": BATCH, "seq_len": LENGTH, "objective": "distillation", "teacher": "large"}
    return Setup(**plain | choices)


def kept(setup: Setup) -> int:
    """Bytes kept for the backward pass."""
    found = estimator()
    return int(found.program(setup).peaks(found.sizes(setup), 1).kept_activation_bytes)


def test_what_the_loss_keeps() -> None:
    """GIVEN logits WHEN the loss is taken THEN seven tensors of their size are kept, where one was in fp32.

    The student's log-probabilities, the two in the stack, their log-sum-exp, both exponentials and the difference of
    student and mixture; the mask, beta and 1 - beta.
    """
    plain = Setup(micro_batch_size=BATCH, seq_len=LENGTH)
    own = allocated(4 * BATCH * LENGTH * WORDS) + allocated(8 * BATCH * LENGTH) + SCALAR  # targets, total weight
    theirs = 5 * PREDICTING + allocated(2 * 2 * BATCH * (LENGTH - 1) * WORDS)
    mask = allocated(BATCH * (LENGTH - 1))
    assert kept(setup_of()) - kept(plain) == theirs + mask + 2 * SCALAR - own


def test_a_teacher_is_in_memory() -> None:
    """GIVEN a teacher THEN its parameters are there, and no gradients or states of it."""
    found = estimator().estimate(setup_of())
    alone = Estimator(read_architecture(LLAMA, "config"), "llama").estimate(Setup())
    taught = Estimator(read_architecture(TAUGHT_BY, "config"), "large").estimate(Setup())
    assert found.parameter_bytes == alone.parameter_bytes + taught.parameter_bytes
    assert found.gradient_bytes == alone.gradient_bytes
    assert found.optimizer_state_bytes == alone.optimizer_state_bytes
    assert found.model == alone.model


def test_the_ledger_has_rows_of_the_teacher() -> None:
    """Its parameters, its logits and the keys and values of its layers, by name."""
    rows = [row for row in estimator().estimate(setup_of()).ledger if row.module.startswith("teacher")]
    by_name = {row.tensor: row for row in rows}
    assert by_name["logits of the teacher"].bytes_at_peak == allocated(LOGITS)
    assert by_name["logits of the teacher"].module == "teacher: lm_head"
    assert sum(row.num_bytes for row in rows if row.kind == "parameter") > 0
    cached = by_name["cat (cache), without graph"]
    assert cached.num == 2 * LAYERS
    assert cached.num_bytes == 2 * LAYERS * 2 * BATCH * LENGTH * 64
    assert {row.tensor for row in rows if row.kind == "parameter"} == {"parameter, teacher"}


def test_the_teacher_in_a_dtype_of_its_own() -> None:
    """GIVEN fp32 weights under autocast THEN a teacher in bf16 takes its bytes in bf16."""
    mixed = estimator().estimate(setup_of(precision="bf16-mixed"))
    narrow = estimator().estimate(setup_of(precision="bf16-mixed", teacher_dtype="bf16"))
    taught = Estimator(read_architecture(TAUGHT_BY, "config"), "large")
    wide, half = (taught.estimate(Setup(precision=precision)).parameter_bytes for precision in ("fp32", "bf16"))
    assert mixed.parameter_bytes - narrow.parameter_bytes == wide - half


def test_a_grid_and_a_time() -> None:
    """Arrays say what single estimates say; the teacher's forward pass takes time."""
    from memplan.catalog.gpus import read_gpu

    grid = estimate_grid(estimator(), setup_of(), [1, 4], [64, 128])
    for b, s, peak in zip((1, 4), (64, 128), grid.peak_allocated_bytes.tolist(), strict=True):
        assert peak == estimator().memory(setup_of(micro_batch_size=b, seq_len=s)).peak_allocated_bytes
    card = read_gpu("a100-80gb")
    teacher = read_architecture(TAUGHT_BY, "teacher", dropout=0.0)
    timed = Estimator(read_architecture(LLAMA, "config"), "llama", card, teacher=teacher)
    with_it, without = timed.step_time(setup_of()), timed.step_time(Setup(micro_batch_size=BATCH, seq_len=LENGTH))
    assert with_it is not None
    assert without is not None
    assert with_it.forward_s > 2 * without.forward_s


def test_what_there_is_to_say() -> None:
    """The loss and its trainer, the teacher's cache, and what is left out."""
    found = estimator().estimate(setup_of())
    said = {one.what: one for one in found.assumptions}
    assert "beta 0.5" in said["objective"].value
    assert "GKDTrainer" in said["objective"].why
    held = 4 * 2 * 3 * 128 * 64 * 2  # layers, keys and values, sequences, tokens, one head's width, bytes of bf16
    assert f"{held // 1024} KiB" in said["teacher's cache"].value
    assert {"generation", "the prompts"} <= {what for what, _ in found.unmodelled}
    assert TEACHER in {one.name for one in found.instants}


def test_defaults_of_the_objective() -> None:
    """GKDTrainer switches dropout off."""
    fields = setup_fields({"objective": "distillation", "teacher": "gpt2"})
    assert fields == {"objective": "distillation", "teacher": "gpt2", "loss": "full", "dropout": 0.0}
    assert dropout_of({"objective": "distillation"}) == 0.0


def test_the_arguments_of_gkd_trainer() -> None:
    """GIVEN a teacher in bf16 beside fp32 weights THEN it is loaded like this, and the student generates nothing."""
    found = trainer_arguments(setup_of(precision="bf16-mixed", teacher_dtype="bf16", attention="eager", dropout=0.0))
    assert found is not None
    assert found["config"] == "GKDConfig"
    assert found["dtype"] == "float32"
    arguments = found["arguments"]
    assert arguments["lmbda"] == 0.0
    assert arguments["max_length"] == LENGTH
    assert arguments["teacher_model_init_kwargs"] == {"dtype": "bfloat16", "attn_implementation": "eager"}
    assert "disable_dropout" not in arguments


def test_gkd_trainer_keeps_what_attention_gives() -> None:
    """As SFTTrainer does, of which it is an heir; trainers of pairs do not."""
    found = trainer_arguments(setup_of(activation_checkpointing="save-attention"))
    assert found is not None
    assert found["arguments"]["activation_checkpointing_kwargs"] == {"selective": True}
    assert trainer_arguments(Setup(objective="dpo", loss="tiled", activation_checkpointing="save-attention")) is None


def test_a_record_keeps_the_teacher() -> None:
    """To JSON and back."""
    setup = setup_of(precision="bf16-mixed", teacher_dtype="bf16")
    assert parse_setup(setup_record(setup)) == setup


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"teacher": None}, "needs a teacher"),
        ({"loss": "tiled"}, "not modelled as --loss tiled"),
        ({"lora": Lora(rank=4, dropout=0.1)}, "GKDTrainer switches dropout off"),
        ({"teacher_dtype": "fp32"}, "two dtypes"),
        ({"teacher_dtype": "nf4", "precision": "bf16-mixed"}, "not known"),
        ({"objective": "lm"}, "--teacher is about distillation"),
        ({"objective": "lm", "teacher": None, "teacher_dtype": "bf16"}, "--teacher-dtype is about distillation"),
    ],
)
def test_what_is_refused(choices: dict[str, Any], said: str) -> None:
    """By name."""
    with pytest.raises(UsageError, match=said):
        setup_of(**choices)


def test_teachers_that_do_not_fit() -> None:
    """None at all, one of other words, and one that is no language model."""
    with pytest.raises(UsageError, match="none was read"):
        estimator(None).memory(setup_of())
    with pytest.raises(UsageError, match="5,000 tokens, and its teacher large one of 5,001"):
        estimator(TAUGHT_BY | {"vocab_size": WORDS + 1}).memory(setup_of())
    bert = LLAMA | {"model_type": "bert", "max_position_embeddings": 256, "type_vocab_size": 2}
    with pytest.raises(UsageError, match="as student and as teacher"):
        estimator(bert).memory(setup_of())
    few = LLAMA | {"max_position_embeddings": 100}
    with pytest.raises(UsageError, match="The teacher large has positions for 100 tokens"):
        estimator(few).estimate(setup_of())
