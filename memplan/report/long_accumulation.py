"""A word on a plan that accumulates for longer than usual: why, and what would shorten it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.planner.long_accumulation import USUAL_STEPS
from memplan.report.document import candidate_document
from memplan.units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.planner.long_accumulation import LongAccumulation

    Document = dict[str, Any]


def long_accumulation_document(found: LongAccumulation) -> Document:
    """As plain data."""
    return {
        "gradient_accumulation_steps": found.steps,
        "usual_steps": USUAL_STEPS,
        "gradient_dtype": found.dtype,
        "largest_rounding": found.rounding,
        "ways": [
            {"options": way.options, "same_update": True, **candidate_document(way.candidate)} for way in found.ways
        ],
    }


def why_words(plan: Mapping[str, Any]) -> str:
    """Why there is a word on it; empty where the accumulation is not unusual."""
    found = plan.get("long_accumulation")
    if not found:
        return ""
    steps, dtype, share = found["gradient_accumulation_steps"], found["gradient_dtype"], found["largest_rounding"]
    said = (
        f"{steps:,} accumulation steps are beyond the usual 1 to {found['usual_steps']}: each launches its kernels and "
        "fetches its data anew, which the time leaves out"
    )
    if dtype == "fp32":
        return f"{said}."
    most = "by any amount" if share is None else f"by up to {100 * share:.2g} % of their sizes"
    return f"{said}, and sums of so many gradients in {dtype} can be off {most}."


def shorter_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What makes fewer steps of it, and how many with what price; the last one is another update."""
    num_gpus = plan["best"]["setup"]["data_parallel_size"]
    found = [_way(way, num_gpus) for way in plan["long_accumulation"]["ways"]]
    return [*found, ("a smaller --target-batch", "another update")]


def _way(way: Document, num_gpus: int) -> tuple[str, str]:
    setup = way["setup"]
    steps, gpus = setup["gradient_accumulation_steps"], setup["data_parallel_size"]
    change = way["options"] if gpus == num_gpus else f"{gpus:,} GPUs"  # however the card was named
    return change, f"{steps:,}, at least {format_seconds(way['step_time_s'])} a step"
