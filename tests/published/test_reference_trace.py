"""The reference trace against numbers that others measured or counted.

Three kinds: bytes that autograd saves, counted with saved-tensor hooks on a CPU; peaks of PyTorch's MemTracker under
FakeTensorMode; and peaks of real CUDA runs (torch.cuda.max_memory_allocated, RTX A6000, torch 2.14.1, transformers
4.57.6) that the README of vramcalc 0.1.2 publishes.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support.reference_trace import kept_bytes_per_layer, trace_step
from tests.support.storage_recorder import round_to_block

GIB = 2**30
CUBLAS_WORKSPACE_BYTES = 24 * 2**20
"""What a CUDA run allocates besides: cuBLAS and cuBLASLt workspaces, 8 to 24 MiB on compute capability 8.6."""

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LLAMA_32_1B = {
    **LLAMA_3_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_32_3B = {
    **LLAMA_3_8B,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN_25_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "attn_pdrop": 0.0}
BERT_LARGE: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_probs_dropout_prob": 0.0,
}
TINY = {**LLAMA_3_8B, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 1024}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "settings", "bytes_per_token", "bytes_per_layer"),
    [
        (LLAMA_3_8B, {"precision": "bf16"}, 200_840, 0),
        (LLAMA_3_8B, {"precision": "bf16", "attention": "eager"}, 213_000 + 192 * 128, 0),
        (LLAMA_3_8B, {"precision": "bf16-mixed"}, 241_800, 2 * (218_103_808)),
        (LLAMA_3_8B, {"precision": "fp32", "sdpa_kernel": "flash"}, 368_776, 0),
        (LLAMA_3_8B, {"precision": "bf16", "checkpointing": "full"}, 2 * 4096, 0),
        (QWEN_25_05B, {"precision": "bf16"}, 57_408, 0),
        (QWEN_25_05B, {"precision": "bf16", "attention": "eager"}, 60_424 + 84 * 128, 0),
        (QWEN_25_05B, {"precision": "bf16-mixed"}, 66_368, 2 * 14_909_440),
        (QWEN_25_05B, {"precision": "fp32", "sdpa_kernel": "flash"}, 107_584, 0),
    ],
)
def test_bytes_that_one_layer_keeps(
    config: dict[str, Any], settings: dict[str, Any], bytes_per_token: int, bytes_per_layer: int
) -> None:
    """Autograd's saved tensors; under autocast also the cached bf16 weights, 2 bytes per matrix element.

    The fp32 counts are of the CPU's flash kernel. CUDA has no fused fp32 kernel for grouped heads and keeps more.
    """
    assert kept_bytes_per_layer(config, batch=1, seq=128, **settings) == 128 * bytes_per_token + bytes_per_layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "peak_gib"),
    [
        ({"padding": True}, 77.89),
        ({"padding": True, "accumulation": 2}, 92.85),
        ({"checkpointing": "full"}, 74.79),
    ],
)
def test_llama_3_8b_peaks_of_mem_tracker(settings: dict[str, Any], peak_gib: float) -> None:
    """bf16, batch 1, length 4096. MemTracker cannot look into data, so it ran with masks and repeated k and v."""
    step = trace_step(LLAMA_3_8B, batch=1, seq=4096, **settings)
    assert step.peak_allocated_bytes / GIB == pytest.approx(peak_gib, abs=0.006)  # printed to 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "batch", "seq", "settings", "num_dropouts", "peak_gib"),
    [
        (GPT2, 8, 1024, {"padding": True}, 2 * 12 + 1, 14.88),
        (GPT2, 8, 1024, {"attention": "eager", "padding": True}, 2 * 12 + 1, 19.00),
        (BERT_LARGE, 4, 512, {"auto_class": "AutoModelForMaskedLM"}, 2 * 24 + 1, 7.87),
    ],
)
def test_fp32_peaks_of_mem_tracker(
    config: dict[str, Any], batch: int, seq: int, settings: dict[str, Any], num_dropouts: int, peak_gib: float
) -> None:
    """Attention dropout off. The CPU keeps a dropout mask as fp32, CUDA as bool: 3 bytes per element between them."""
    step = trace_step(config, batch=batch, seq=seq, precision="fp32", **settings)
    mask_bytes = 3 * num_dropouts * batch * seq * config.get("hidden_size", 768)
    assert (step.peak_allocated_bytes + mask_bytes) / GIB == pytest.approx(peak_gib, abs=0.006)  # printed to 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "settings", "phase", "peak_gb"),
    [
        (LLAMA_32_1B, {"padding": True}, "backward", 17.51),
        (LLAMA_32_1B, {"padding": True, "checkpointing": "full"}, "backward", 13.76),
        (LLAMA_32_1B, {"attention": "eager"}, "backward", 30.26),
        (LLAMA_32_1B, {"padding": True, "precision": "bf16-mixed"}, "backward", 30.55),
        (LLAMA_32_1B, {"padding": True, "precision": "bf16-mixed", "checkpointing": "full"}, "forward", 25.22),
        (LLAMA_32_3B, {"checkpointing": "full"}, "optimizer_step", 32.15),
    ],
)
def test_cuda_peaks_of_vramcalc_bench(
    config: dict[str, Any], settings: dict[str, Any], phase: str, peak_gb: float
) -> None:
    """Batch 1, length 2048, foreach AdamW, a plain loop that holds its outputs until the end of the backward pass.

    `zero_grad(set_to_none=False)` leaves the gradients in place, which two micro-batches do as well. transformers
    4.57 always materialised the mask and repeated k and v in training, which `padding` does.
    """
    settings = {**settings, "keep_outputs": phase == "backward", "outputs_to_fp32": False}
    step = trace_step(config, batch=1, seq=2048, accumulation=2, clip=False, **settings)
    printed_to = 0.005e9
    assert step.peak_phase == phase
    assert -printed_to <= peak_gb * 1e9 - step.peak_allocated_bytes <= CUBLAS_WORKSPACE_BYTES + printed_to


@pytest.mark.parametrize("checkpointing", ["none", "full", "every-2"])
def test_nothing_outlives_a_step_but_parameters_buffers_and_states(checkpointing: str) -> None:
    step = trace_step(TINY, batch=2, seq=32, num_layers=3, checkpointing=checkpointing)
    kinds = {"parameter": 1, "exp_avg": 1, "exp_avg_sq": 1}
    buffers = 2 * round_to_block(4 * 256 // 8 // 2)
    assert step.resident_bytes == sum(kinds.values()) * step.parameter_bytes + buffers


def test_foreach_needs_one_more_copy_of_the_parameters_than_fused() -> None:
    foreach, fused = (
        trace_step(TINY, batch=1, seq=16, num_layers=2, optimizer=o) for o in ("adamw-foreach", "adamw-fused")
    )
    counters = 512 * (2 * 9 + 3)
    assert foreach.phase_peaks["optimizer_step"] + counters == (
        fused.phase_peaks["optimizer_step"] + foreach.parameter_bytes
    )


def test_the_flash_kernel_keeps_its_random_state_besides() -> None:
    sdpa, flash = (trace_step(TINY, batch=1, seq=16, num_layers=2, attention=a) for a in ("sdpa", "flash"))
    assert flash.kept_activation_bytes - sdpa.kept_activation_bytes == 2 * (16 + 8)
    assert flash.kept_allocated_bytes - sdpa.kept_allocated_bytes == 2 * 2 * 512


def test_rows_add_up() -> None:
    step = trace_step(TINY, batch=1, seq=16, num_layers=2)
    assert sum(row.num_bytes for row in step.kept_rows) == step.kept_activation_bytes
    blocks = sum(row.count * round_to_block(row.num_bytes // row.count) for row in step.peak_rows)
    assert blocks + step.peak_transient_bytes == step.peak_allocated_bytes
