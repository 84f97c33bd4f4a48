"""The lists of models and GPUs as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.ansi import Line
from memplan.report.layout import clip, wrap
from memplan.report.text import gib, table
from memplan.units import format_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Document = dict[str, Any]

TYPE_WIDTH = 18
MARK_BY_ANSWER = {"formula": "", "trace": " -", "one trace": " --"}
LABEL_WIDTH = 28

MODELS_NOTE = (
    "-: answered by a trace, which takes PyTorch and transformers or diffusers. --: by memplan trace alone, "
    "one size at a time. Any other model: a config.json or a hub id."
)
GPUS_NOTE = (
    "usable: what torch sees of the card; with * what nvidia-smi shows, where that is not known. "
    "TFLOP/s: dense bf16. context: MiB of a CUDA context, where measured. Sources: --json. "
    "Any other card: a size such as 24GB."
)


def render_models(models: Sequence[Document]) -> list[Line]:
    """One line a model, under the shortest name it has, spelt with its hyphens: ``llama-3-8b``, not ``llama3-8b``."""
    return [*table(model_rows(models), left=(0, 2, 3), shrink=3), *_note(MODELS_NOTE)]


def model_rows(models: Sequence[Document]) -> list[tuple[str, ...]]:
    """The names of the columns, and a row for each model."""
    return [
        ("name", "parameters", "type", "full name"),
        *(
            (
                _shortest([*model["aliases"], model["id"]]),
                format_count(model["num_parameters"]),
                clip(model["model_type"], TYPE_WIDTH) + MARK_BY_ANSWER[model["answered_by"]],
                model["id"],
            )
            for model in models
        ),
    ]


def _shortest(names: Sequence[str]) -> str:
    spelt = {name.replace("-", ""): name for name in sorted(names, key=len)}  # of two spellings the longer
    return min(spelt.values(), key=len)


def render_gpus(gpus: Sequence[Document]) -> list[Line]:
    """One line a card; what is not known is a dash."""
    return [*table(gpu_rows(gpus), left=(0, 1), shrink=1), *_note(GPUS_NOTE)]


def gpu_rows(gpus: Sequence[Document]) -> list[tuple[str, ...]]:
    """The names of the columns, and a row for each card."""
    return [
        ("name", "card", "usable GiB", "TFLOP/s", "GB/s", "context"),
        *(
            (
                gpu["name"],
                clip(gpu["label"].removeprefix("NVIDIA "), LABEL_WIDTH),
                ("* " if gpu["is_from_nvidia_smi"] else "") + gib(gpu["usable_bytes"]),
                _scaled(gpu["flops_per_s"].get("bf16"), 1e12),
                _scaled(gpu["memory_bandwidth_bytes_per_s"], 1e9),
                _scaled(gpu["context_bytes"], 2**20),
            )
            for gpu in gpus
        ),
    ]


def _note(text: str) -> Iterator[Line]:
    yield Line("")
    for line in wrap(text, first="  "):
        yield Line(line, "faint")


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"
