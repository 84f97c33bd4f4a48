"""The law between two witnesses: what the formula says is kept, the trace of the real module keeps, byte for byte.

A small instance of every family, under every combination of attention, precision, checkpointing and accumulation; and
real models at real sizes.
Peaks may differ by 0.5 %: scratch memory that is rounded to the kernels' tiles, and blocks of 512 bytes.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from memplan.architectures.registry import READER_BY_MODEL_TYPE, read_architecture
from memplan.catalog.models import read_config
from memplan.estimation.step import Recordings
from memplan.memory.events import Sizes
from memplan.operators.sizes import bind
from memplan.probes.trace import trace_training
from memplan.specs.training import Setup
from tests.published import test_reference_families_a as family_a
from tests.published import test_reference_families_b as family_b
from tests.published import test_reference_families_c as family_c
from tests.published import test_reference_mixtures as mixtures

pytestmark = pytest.mark.slow

MICRO_BATCH_SIZE, SEQ_LEN = 2, 128
PEAK_TOLERANCE = 5e-3

NOT_IN_TRANSFORMERS = {"internlm2"}
"""Published with code of their own: there is no module to trace."""

EAGER_ONLY = {"bloom", "deberta-v2", "gemma2", "gpt_oss", "gptj", "mpt"}
"""transformers has, or allows, one implementation of attention."""

CONFIGS: list[dict[str, Any]] = [
    family_a.BASE | {"model_type": "llama"},
    *family_a.CONFIG_BY_NAME.values(),
    *family_b.CONFIG_BY_NAME.values(),
    *family_b.EAGER_ONLY_BY_NAME.values(),
    *family_b.FALCON_BY_NAME.values(),
    family_c.BERT,
    family_c.ROBERTA,
    family_c.XLM_ROBERTA,
    family_c.DEBERTA,
    family_c.MODERNBERT,
    *mixtures.CONFIG_BY_NAME.values(),
]
CONFIG_BY_MODEL_TYPE = {config["model_type"]: config for config in reversed(CONFIGS)}

CASES = [
    (model_type, *choices)
    for model_type in CONFIG_BY_MODEL_TYPE
    for choices in product(("sdpa", "eager"), ("fp32", "bf16", "bf16-mixed"), ("none", "full"), (1, 2))
    if choices[0] == "eager" or model_type not in EAGER_ONLY
]
"""Model type, attention, precision, checkpointing, accumulation."""

KV_CACHE = "Gemma 3's text model fills a key-value cache until the loss"
DIFFERENT_PEAKS = {
    ("falcon", "sdpa", "bf16-mixed", "full", 2): (0.011, "what the written-out kernel holds in a layer computed again"),
    ("gpt_oss", "eager", "bf16", "none", 1): (0.007, "the embedding, held until the last layer returns"),
    ("phi", "eager", "bf16-mixed", "full", 2): (0.009, "what eager attention holds in a layer computed again"),
    **{
        ("gemma3", attention, "bf16-mixed", "none", k): (0.05, KV_CACHE)
        for attention in ("eager", "sdpa")
        for k in (1, 2)
    },
}
"""Where the formula's peak is lower by more: at most by this share of the trace's, and for want of this tensor."""


def kernel_to_force(config: dict[str, Any]) -> str | None:
    """CUDA has no fused kernel for grouped heads in fp32; the formula's is fused all the same (see `unmodelled`)."""
    text = config.get("text_config", config)
    grouped = text.get("num_key_value_heads", 0) not in {0, text.get("num_attention_heads")}
    return "flash" if grouped and not family_a.takes_a_mask(text) else None


def test_every_family_is_here() -> None:
    assert set(CONFIG_BY_MODEL_TYPE) == set(READER_BY_MODEL_TYPE) - NOT_IN_TRANSFORMERS


@pytest.mark.parametrize(("model_type", "attention", "precision", "checkpointing", "accumulation"), CASES, ids=str)
def test_the_formula_is_the_trace(
    model_type: str, attention: str, precision: str, checkpointing: str, accumulation: int
) -> None:
    config = CONFIG_BY_MODEL_TYPE[model_type]
    setup = Setup(
        micro_batch_size=MICRO_BATCH_SIZE,
        seq_len=SEQ_LEN,
        attention=attention,
        precision=precision,
        activation_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
    )
    sizes = Sizes(bind(MICRO_BATCH_SIZE, SEQ_LEN))
    formula = Recordings(read_architecture(config, "config")).program(setup).peaks(sizes, accumulation)
    kernel = kernel_to_force(config) if (attention, precision) == ("sdpa", "fp32") else None
    trace = trace_training(config, setup, sdpa_kernel=kernel)
    assert formula.kept_activation_bytes == trace.kept_activation_bytes
    assert formula.kept_activation_bytes_per_layer == trace.kept_activation_bytes_per_layer
    missing = 1 - formula.peak / trace.peak_allocated_bytes
    most, reason = DIFFERENT_PEAKS.get((model_type, attention, precision, checkpointing, accumulation), (0.0, ""))
    if PEAK_TOLERANCE < missing < most:
        pytest.xfail(f"{missing:.1%} of the peak: {reason}")
    assert not reason, "mended: take it out of DIFFERENT_PEAKS, or worse than that says"
    assert formula.peak == pytest.approx(trace.peak_allocated_bytes, rel=PEAK_TOLERANCE)


@pytest.mark.parametrize(
    ("model", "setup"),
    [
        ("llama-3-8b", Setup(micro_batch_size=1, seq_len=4096)),
        ("llama-3-8b", Setup(micro_batch_size=2, seq_len=8192, activation_checkpointing="full")),
        ("mistral-7b", Setup(micro_batch_size=3, seq_len=2048, attention="flash", optimizer="adamw-fused")),
        (
            "qwen2.5-1.5b",
            Setup(micro_batch_size=4, seq_len=2048, precision="bf16-mixed", gradient_accumulation_steps=2),
        ),
        ("gemma-2-9b", Setup(micro_batch_size=1, seq_len=4096, attention="eager", activation_checkpointing="full")),
        ("gpt2", Setup(micro_batch_size=8, seq_len=1024, precision="fp32", attention="eager")),
        ("mixtral-8x7b", Setup(micro_batch_size=1, seq_len=4096)),
        (
            "olmoe-1b-7b",
            Setup(micro_batch_size=4, seq_len=2048, precision="bf16-mixed", gradient_accumulation_steps=2),
        ),
        ("qwen1.5-moe-a2.7b", Setup(micro_batch_size=2, seq_len=2048)),
        ("qwen3-30b-a3b", Setup(micro_batch_size=2, seq_len=4096, activation_checkpointing="full")),
        ("deepseek-v2-lite", Setup(micro_batch_size=2, seq_len=4096, attention="flash", optimizer="adamw-fused")),
        ("deepseek-v3", Setup(micro_batch_size=1, seq_len=4096, activation_checkpointing="full", optimizer="sgd")),
        ("gpt-oss-120b", Setup(micro_batch_size=4, seq_len=1024, attention="eager", optimizer="sgd")),
        ("bert-large", Setup(micro_batch_size=16, seq_len=512, precision="bf16-mixed", optimizer="sgd")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_real_models_at_real_sizes(model: str, setup: Setup) -> None:
    config, name = read_config(model)
    sizes = Sizes(bind(setup.micro_batch_size, setup.seq_len))
    formula = Recordings(read_architecture(config, name)).program(setup).peaks(sizes, setup.gradient_accumulation_steps)
    trace = trace_training(config, setup)
    assert formula.kept_activation_bytes == trace.kept_activation_bytes
    assert formula.kept_activation_bytes_per_layer == trace.kept_activation_bytes_per_layer
    assert formula.peak == pytest.approx(trace.peak_allocated_bytes, rel=PEAK_TOLERANCE)
