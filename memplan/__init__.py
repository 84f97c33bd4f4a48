"""memplan: says before a training run starts whether it fits on the GPU, and plans the fastest way that does.

import memplan

plan = memplan.suggest("llama-3.2-3b", gpu="24GB", target_batch=32)
plan.best, plan.to_pandas()
memplan.estimate("gpt2", micro_batch=8, seq_len=1024, precision="fp32").memory.peak_allocated_bytes
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = [
    "GradientNoise",
    "MemplanError",
    "UsageError",
    "__version__",
    "accumulate",
    "calibrate",
    "causal_lm_loss",
    "count_labels",
    "count_next_tokens",
    "estimate",
    "estimate_grid",
    "lengths",
    "mean_loss",
    "probe",
    "same_update",
    "suggest",
    "suggest_for_data",
    "trace",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import memplan` alone costs nothing."""
    if name in {"estimate", "estimate_grid", "suggest", "trace"}:
        from memplan import api

        return getattr(api, name)
    if name in {"probe", "validate", "calibrate", "same_update"}:
        from memplan import measuring

        return getattr(measuring, name)
    if name == "accumulate":
        from memplan.accumulation.step import accumulate

        return accumulate
    if name in {"causal_lm_loss", "mean_loss", "count_labels", "count_next_tokens"}:
        from memplan.accumulation import losses

        return getattr(losses, name)
    if name == "GradientNoise":
        from memplan.accumulation.noise import GradientNoise

        return GradientNoise
    if name == "lengths":
        from memplan.surveying import lengths

        return lengths
    if name == "suggest_for_data":
        from memplan.feeding import suggest_for_data

        return suggest_for_data
    if name in {"MemplanError", "UsageError"}:
        from memplan import errors

        return getattr(errors, name)
    raise AttributeError(f"module 'memplan' has no attribute {name!r}")
