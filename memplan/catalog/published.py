"""Which measurements did others publish, and what is memplan asked about them?

    read_published()        every row of `profiles/published/measurements.csv`: one measured number with its source
    read_questions()        what `profiles/published/answers.toml` asks: a model, a setup, the bytes that were measured
    why_not_answered(row)   for a row without a question: what memplan would have to model first

Three quantities are called "memory": allocated (tensors, and the cuBLAS workspaces that PyTorch's allocator hands out),
reserved (what the allocator holds) and process (what nvidia-smi shows).  `comparable_bytes` is memplan's number for
each.

Left out: what a row says about its setup in words.  Somebody read the source and wrote the setup into `answers.toml`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from memplan.catalog.profiles import parse_toml, profile_path
from memplan.errors import MemplanError
from memplan.specs.adapter import Lora
from memplan.specs.training import Setup
from memplan.specs.values import NamedTuple
from memplan.units import MIB

if TYPE_CHECKING:
    from memplan.estimation.estimate import Memory

FOLDER = "published"
ROWS_FILE = "measurements.csv"
ANSWERS_FILE = "answers.toml"

QUANTITIES = ("allocated", "reserved", "process")
COMPARISONS = ("value", "floor", "ceiling")

NOBODY_LOOKED = "nobody has looked at it yet"
"""Of a row that no rule knows; a test holds that there is none."""


class PublishedRow(NamedTuple):
    """One published number; texts are as the source has them, empty where it says nothing."""

    id: str
    source: str
    source_ref: str
    """Repository, revision and file, or document."""
    date: str
    model: str
    gpu: str
    framework: str
    versions: str
    quantity_stated: str
    """What was measured, in the source's words."""
    value_bytes: int
    confidence: str
    """A: source and setup were both read; B: part of the setup was inferred, or the number was rounded."""
    notes: str
    ft_method: str
    """``full``, ``LoRA``, ...; ``n/a`` where nothing is trained."""
    quantization: str
    """Of the base model; empty: none."""
    parallelism: str
    offload: str
    other_measures: str
    """``name=value`` of the same run, separated by semicolons."""


COLUMNS = {"quantity_stated": "quantity"}
"""Field of a row -> column of the file, where they differ."""


class Question(NamedTuple):
    """One number of a run, and what memplan is asked about it."""

    row: PublishedRow
    model: str
    """Name in the catalogue; where `config` is given, what that config is called."""
    config: dict[str, Any] | None
    """The values of a config.json, None for a model of the catalogue."""
    gpu: str
    """Id of the card in the catalogue."""
    setup: Setup
    quantity: str
    """One of `QUANTITIES`."""
    comparison: str
    """``value``: an error means something; ``floor``, ``ceiling``: memplan can only give a lower, an upper bound."""
    measured_bytes: int
    unknown: tuple[str, ...]
    """What the source does not say, a short phrase each."""
    explanation: str
    """The tensors that explain a difference, "unexplained" where nobody can name them; empty: none is needed."""
    explained_bytes: int
    """Bytes of the tensors in `explanation` that the run holds at its peak and memplan's does not (or the reverse)."""


def comparable_bytes(memory: Memory, quantity: str) -> int:
    """The bytes of `memory` that a measured `quantity` counts: PyTorch's allocator holds the cuBLAS workspaces, too."""
    if quantity == "allocated":
        return memory.peak_allocated_bytes + memory.workspace_bytes
    if quantity == "reserved":
        return memory.peak_reserved_bytes + memory.workspace_bytes
    return memory.peak_process_bytes


# -- the rows ----------------------------------------------------------------------------------------------------------


def read_published() -> tuple[PublishedRow, ...]:
    """Every published number, in the order of the file.

    Raises:
        MemplanError: the file is missing or broken.
    """
    import csv

    path = profile_path(FOLDER, ROWS_FILE)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = tuple(_row(values, path) for values in csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise _broken(path, f"cannot be read: {fault}") from fault
    if len({row.id for row in rows}) < len(rows):
        raise _broken(path, "names a row twice")
    return rows


def _row(values: dict[str, str], path: str) -> PublishedRow:
    columns = {field: COLUMNS.get(field, field) for field in PublishedRow._fields}
    missing = [column for column in columns.values() if values.get(column) is None]
    if missing:
        raise _broken(path, f"has a row without {', '.join(missing)}")
    texts = {field: values[column] for field, column in columns.items()}
    number = texts.pop("value_bytes")
    if not (number.isascii() and number.isdigit()):
        raise _broken(path, f"has {number!r} as the bytes of {texts['id']}")
    return PublishedRow(value_bytes=int(number), **texts)


# -- the questions -----------------------------------------------------------------------------------------------------


def read_questions() -> tuple[Question, ...]:
    """What memplan is asked, in the order of `answers.toml`; a row may be asked about more than one quantity.

    Raises:
        MemplanError: a file is missing or broken, or asks about a row that there is not.
    """
    rows = {row.id: row for row in read_published()}
    path = profile_path(FOLDER, ANSWERS_FILE)
    content = _answers(path)
    try:
        return tuple(
            _question(rows[answer["id"]], answer, asked, content["config"])
            for answer in content["answer"]
            for asked in answer["asked"]
        )
    except KeyError as fault:
        raise _broken(path, f"lacks {fault}, or asks about a row of that name that {ROWS_FILE} has not") from fault
    except (MemplanError, AttributeError, TypeError, ValueError) as fault:
        raise _broken(path, f"asks what has no meaning: {fault}") from fault


def _question(
    row: PublishedRow, answer: dict[str, Any], asked: dict[str, Any], configs: dict[str, dict[str, Any]]
) -> Question:
    quantity, comparison = asked["quantity"], asked["comparison"]
    if quantity not in QUANTITIES or comparison not in COMPARISONS:
        raise ValueError(f"{quantity} as a {comparison} of {row.id}")
    return Question(
        row=row,
        model=answer["model"],
        config=configs.get(answer["model"]),
        gpu=answer["gpu"],
        setup=_setup(answer["setup"]),
        quantity=quantity,
        comparison=comparison,
        measured_bytes=_measured_bytes(row, asked.get("measure", "")),
        unknown=tuple(answer["unknown"]),
        explanation=asked.get("explanation", ""),
        explained_bytes=asked.get("explained_bytes", 0),
    )


def _setup(values: dict[str, Any]) -> Setup:
    """The fields of a setup as TOML has them: an adapter is a table, names are a list."""
    fields = _frozen(values)
    if "lora" in fields:
        fields["lora"] = Lora(**_frozen(fields["lora"]))
    return Setup(**fields)


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _measured_bytes(row: PublishedRow, measure: str) -> int:
    """Bytes of the row itself, or of one of its other measures, whose name ends with its unit."""
    if not measure:
        return row.value_bytes
    measures = dict(part.strip().split("=", 1) for part in row.other_measures.split(";") if "=" in part)
    number = float(measures[measure].split()[0])
    return int(number * (MIB if measure.endswith("_MiB") else 1))


@cache
def _answers(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return parse_toml(file.read())
    except (OSError, ValueError) as fault:
        raise _broken(path, f"cannot be read: {fault}") from fault


def _broken(path: str, cause: str) -> MemplanError:
    return MemplanError(f"The published measurements in {path} are broken: the file {cause}.", "Reinstall memplan.")


# -- why not -----------------------------------------------------------------------------------------------------------

SHARDINGS = {
    "tensor, pipeline, context or expert parallel": ("TP", "PP", "CP", "EP"),
    "FSDP": ("FSDP", "use-megatron-fsdp"),
    "ZeRO": ("zero", "ZeRO-"),
    "distributed optimizer": ("use-distributed-optimizer",),
}
"""What is split over GPUs, the most fundamental first -> the words for it in `parallelism`, without their degrees."""

METHODS = {
    "ia3": "(IA)3 is not modelled",
    "ln_tuning": "LayerNorm tuning of peft is not modelled: trained copies of the norms beside the frozen ones",
    "adapter": "LLaMA-Adapter is not modelled",
    "adapterv2": "LLaMA-Adapter is not modelled",
}
"""Reason by what is trained.  LoRA and QLoRA are not among them: they are modelled."""

OWN_CODE = {
    "litgpt": "litgpt's own model, adapters and chunked loss are other code",
    "torchtune": "torchtune's own model and adapters are other code",
    "Qwen README": "DeepSpeed's ZeRO-2 holds buckets of its own, and the source does not say which memory it means",
    "ms-swift": "Qwen's own model code under ms-swift's trainer: the peak is at their loss, which is other code",
}
"""Start of a source's name -> what trains adapters there, which is neither peft's code nor transformers'."""

QUANTISERS = {
    "GPTQ": "a GPTQ base is not modelled: its kernels and buffers are other code than bitsandbytes'",
    "torchao": "a torchao base is not modelled",
    "float8": "training in float8 is not modelled",
}
"""What quantised the base, as `quantization` names it -> the reason; bitsandbytes' nf4 and int8 are modelled."""


def why_not_answered(row: PublishedRow) -> str:
    """What keeps memplan from answering for a row without a question: the most fundamental reason, in some words.

    Raises:
        MemplanError: `answers.toml` is missing or broken.
    """
    known = _answers(profile_path(FOLDER, ANSWERS_FILE))
    kind = known.get("not_described", {}).get(row.model)
    reasons = (
        known.get("not_answered", {}).get(row.id),
        "one operator, no training step" if row.ft_method == "n/a" else None,
        "offloading is not modelled" if row.offload not in {"", "none"} else None,
        _sharded(row.parallelism),
        f"its architecture is not described ({kind})" if kind else None,
        _own_code(row),
        next((why for name, why in QUANTISERS.items() if name in row.quantization), None),
        METHODS.get(row.ft_method.lower()),
    )
    return next(filter(None, reasons), NOBODY_LOOKED)


def _sharded(parallelism: str) -> str | None:
    """The reason in ``FSDP2 x32, TP8`` or ``world=8; TP=2 PP=1``; a degree of 1 splits nothing."""
    words = parallelism.replace(",", " ").replace(";", " ").split()
    kinds = {word.rstrip("0123456789=") for word in words if not word.endswith("=1")}
    for what, names in SHARDINGS.items():
        if not kinds.isdisjoint(names):
            return f"sharded over GPUs ({what})"
    return None


def _own_code(row: PublishedRow) -> str | None:
    """The reason where adapters were trained by code that is not modelled."""
    if row.ft_method.lower().split(" ")[0] not in {"lora", "qlora"}:
        return None
    return next((why for name, why in OWN_CODE.items() if row.source.startswith(name)), None)
