"""Selective checkpointing against the reference trace: attention alone is computed again in the backward pass.

transformers has no switch for it: the reference runs the attention function that a model looks up under
torch.utils.checkpoint (see memplan.probes.checkpointing).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.published.test_reference_families_a import BASE, SEQ_LEN
from tests.published.test_reference_families_b import CONFIG_BY_NAME as FAMILIES_B
from tests.support.compare import differences, run_both

pytestmark = pytest.mark.slow

PEAK_TOLERANCE = 0.001
"""Relative."""

SHORT_OF_QUERIES = {"llama": 1, "llama, heads of 50": 2, "mistral, heads of 50 under a window": 1}
"""In eager bf16 the description of these lacks so many tensors as large as the queries at the softmax's backward."""

LLAMA = BASE | {"model_type": "llama"}
CONFIG_BY_NAME: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, heads of 50": LLAMA | {"head_dim": 50, "num_key_value_heads": 4},
    "mistral, heads of 50 under a window": BASE | {"model_type": "mistral", "head_dim": 50, "sliding_window": 64},
    "gpt2": next(config for config in FAMILIES_B.values() if config["model_type"] == "gpt2"),
}


@pytest.mark.parametrize("name", CONFIG_BY_NAME)
@pytest.mark.parametrize(
    ("attention", "precision", "padding"),
    [
        ("sdpa", "bf16", False),
        ("sdpa", "bf16", True),
        ("sdpa", "bf16-mixed", False),
        ("eager", "bf16", False),
        ("eager", "fp16-mixed", True),
        ("flash", "bf16", False),
    ],
)
def test_attention_alone_is_computed_again(name: str, attention: str, precision: str, padding: bool) -> None:
    """What is kept is exactly what the reference keeps: queries, keys, values and mask instead of what lies between."""
    pair = run_both(
        CONFIG_BY_NAME[name],
        micro_batch_size=2,
        seq_len=SEQ_LEN,
        attention=attention,
        precision=precision,
        padding=padding,
        activation_checkpointing="selective",
    )
    assert pair.formula.kept_activation_bytes == pair.reference.kept_allocated_bytes, differences(pair)
    formula, reference = pair.formula.peak, pair.reference.peak_allocated_bytes
    if (attention, precision) == ("eager", "bf16") and name in SHORT_OF_QUERIES:
        config = CONFIG_BY_NAME[name]
        width = config["num_attention_heads"] * config.get(
            "head_dim", config["hidden_size"] // config["num_attention_heads"]
        )
        missing = SHORT_OF_QUERIES[name] * 2 * SEQ_LEN * width * 2
        assert formula + missing == pytest.approx(reference, rel=PEAK_TOLERANCE)
        pytest.xfail(f"queries are missing {SHORT_OF_QUERIES[name]} times: {missing / reference:.1%} of the peak")
    assert formula == pytest.approx(reference, rel=PEAK_TOLERANCE)
