"""The range of a step under ``torch.compile``: its ends by hand, who is told, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import memplan
from memplan.architectures.registry import read_architecture
from memplan.errors import UsageError
from memplan.estimation.compiled import least, least_kept, least_peak
from memplan.estimation.step import Recordings
from memplan.memory.events import Sizes
from memplan.operators.sizes import bind
from memplan.specs.training import Setup

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
}


def program_of(**choices: Any) -> Any:
    setup = Setup(micro_batch_size=2, seq_len=32, compile=True, **choices)
    return Recordings(read_architecture(LLAMA, "config")).program(setup)


TOKENS = 2 * 32
KEPT_OF_A_LAYER = {
    "input of q, k and v": TOKENS * 64 * 2,
    "rotated queries": TOKENS * 64 * 2,
    "keys and values of all heads": 2 * TOKENS * 64 * 2,
    "output of attention, input of o": TOKENS * 64 * 2,
    "logsumexp": 2 * 4 * 32 * 4,
    "input of gate and up": TOKENS * 64 * 2,
    "gate": TOKENS * 128 * 2,
    "up": TOKENS * 128 * 2,
    "input of down": TOKENS * 128 * 2,
}
INPUT_OF_THE_LOGITS = TOKENS * 64 * 2


def test_what_products_need_by_hand() -> None:
    """Norms, rotations and the loss can be computed again from these; the mask is one for all layers."""
    low = least_kept(program_of(), Sizes(bind(2, 32)))
    assert low == 3 * sum(KEPT_OF_A_LAYER.values()) + INPUT_OF_THE_LOGITS


def test_a_checkpointed_layer_keeps_what_goes_in() -> None:
    low = least_kept(program_of(activation_checkpointing="full"), Sizes(bind(2, 32)))
    assert low == 3 * TOKENS * 64 * 2 + INPUT_OF_THE_LOGITS


@pytest.mark.parametrize(
    ("kept", "gradients", "accumulates", "update", "peak"),
    [
        (500, 100, False, 0, 1000 + 500),
        (50, 100, False, 0, 1000 + 100),
        (500, 100, True, 0, 1000 + 500 + 100),
        (50, 100, True, 0, 1000 + 100 + 100),
        (500, 100, False, 1700, 1700),
    ],
    ids=["kept", "gradients", "kept beside gradients", "gradients twice", "the update"],
)
def test_the_lower_end_of_the_peak(kept: int, gradients: int, accumulates: bool, update: int, peak: int) -> None:
    instants = {"forward": 9999, "backward": 9999, "optimizer step": update}
    assert least_peak(1000, gradients, kept, instants, accumulates=accumulates) == peak


CHOICES: list[dict[str, Any]] = [
    {},
    {"attention": "eager"},
    {"attention": "flash"},
    {"precision": "bf16-mixed"},
    {"checkpointing": "full"},
    {"checkpointing": "every-2"},
    {"accumulation": 3},
    {"gpus": 2, "accumulation": 2},
    {"lora_rank": 8},
    {"optimizer": "adafactor", "precision": "fp32"},
    {"padding": True},
    {"eval_batch": 8},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_a_range_has_two_ends_and_the_upper_one_is_answered(choices: dict[str, Any]) -> None:
    answer = memplan.estimate("gpt2", micro_batch=2, seq_len=256, compile=True, **choices)
    assert answer.compiled is not None
    assert not answer.compiled.is_traced
    for name in ("kept_activation_bytes", "peak_allocated_bytes", "peak_process_bytes"):
        low, high = getattr(answer.compiled, name)
        assert 0 < low <= high
    assert answer.compiled.kept_activation_bytes.high == answer.kept_activation_bytes
    assert answer.compiled.peak_allocated_bytes.high == answer.memory.peak_allocated_bytes
    assert answer.compiled.peak_process_bytes.high == answer.memory.peak_process_bytes
    assert any("inductor" in what for what, _ in answer.unmodelled)


def test_without_the_compiler_there_is_no_range() -> None:
    answer = memplan.estimate("gpt2")
    assert answer.compiled is None
    assert not any("inductor" in what for what, _ in answer.unmodelled)


def test_the_upper_end_is_never_below_the_step_without_the_compiler() -> None:
    """A mask comes in, and gradients of a later micro-step are there all at once."""
    plain, compiled = (memplan.estimate("gpt2", accumulation=2, micro_batch=2, compile=c) for c in (False, True))
    assert compiled.memory.peak_allocated_bytes > plain.memory.peak_allocated_bytes
    assert compiled.kept_activation_bytes > plain.kept_activation_bytes


def test_a_grid_has_the_ends_of_each_point() -> None:
    batches, lengths = np.array([1, 4]), np.array([128, 256])
    grid = memplan.estimate_grid("gpt2", micro_batch=batches[:, None], seq_len=lengths, compile=True)
    for row in grid.records():
        one = memplan.estimate(
            "gpt2", micro_batch=row["micro_batch_size"], seq_len=row["seq_len"], compile=True
        ).compiled
        assert one is not None
        assert row["least_kept_activation_bytes"] == one.kept_activation_bytes.low
        assert row["least_peak_process_bytes"] == one.peak_process_bytes.low
        assert row["kept_activation_bytes"] == one.kept_activation_bytes.high
    plain = memplan.estimate_grid("gpt2", micro_batch=1, seq_len=lengths)
    assert not any(name.startswith("least") for name in plain.records()[0])


def test_a_plan_fits_by_the_upper_end_and_leaves_selective_checkpointing_out() -> None:
    plan = memplan.suggest("gpt2", gpu="24GB", target_batch=16, compile=True)
    assert plan.best is not None
    assert plan.estimate.compiled is not None
    assert plan.estimate.compiled.peak_process_bytes.high <= plan.gpu.usable_bytes
    assert plan.best.setup.compile
    modes = {one.setup.activation_checkpointing for one in (plan.best, *plan.alternatives)}
    assert "selective" not in modes


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": "lomo"}, "updates in the backward pass"),
    ({"lora_rank": 8, "quantize": "nf4"}, "bitsandbytes' kernels"),
    ({"lora_rank": 8, "dora": True}, "DoRA"),
    ({"checkpointing": "full", "offload": "activations"}, "Offloading"),
    ({"loss": "tiled"}, "The tiled loss"),
    ({"checkpointing": "selective"}, "Selective checkpointing"),
    ({"checkpointing": "save-attention"}, "Saving what attention gives"),
    ({"checkpointing": "full", "reentrant": True}, "Reentrant checkpointing"),
    ({"batching": "padding-free", "attention": "flash"}, "Several sequences in a row"),
    ({"objective": "dpo", "loss": "tiled"}, "Training for dpo"),
    ({"label_smoothing": 0.1}, "Label smoothing"),
]


@pytest.mark.parametrize(("choices", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_is_not_modelled_together_is_refused(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        memplan.estimate("gpt2", compile=True, **choices)


def test_a_mask_that_is_not_modelled_is_refused() -> None:
    """BERT's bidirectional attention gets one under torch.compile, too."""
    with pytest.raises(UsageError, match="gives bert a mask"):
        memplan.estimate("bert-base", compile=True)
    assert memplan.estimate("bert-base", attention="eager", compile=True).compiled is not None


def test_arrays_give_what_numbers_give() -> None:
    program = program_of()
    lengths = np.array([32, 64])
    sizes = Sizes(bind(np.array([2, 2]), lengths))
    kept, low = least(program, sizes, program.peaks(sizes, 1).by_instant, 1)
    for n, length in enumerate(lengths.tolist()):
        one = Sizes(bind(2, length))
        assert (kept[n], low[n]) == least(program, one, program.peaks(one, 1).by_instant, 1)
