"""What a user can say about a setup, by the names that the library, the command line and matrices of trials share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypedDict

from memplan.errors import UsageError, did_you_mean
from memplan.specs.adapter import Lora
from memplan.specs.evaluation import Evaluation
from memplan.specs.ranks import as_layers, as_ranks
from memplan.specs.training import LOSSES_BY_OBJECTIVE, TRAINER_BY_OBJECTIVE, check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Names = str | Sequence[str]


class Choices(TypedDict, total=False):
    """How a model is trained; None is as good as left out."""

    micro_batch: int | None
    """Sequences per forward pass on one GPU (1)."""
    accumulation: int | None
    """Micro-batches per optimizer step (1)."""
    seq_len: int | None
    """Tokens per sequence (2048, less where the model has fewer positions)."""
    precision: str | None
    """Key of `memplan.specs.training.PRECISIONS` (bf16)."""
    optimizer: str | None
    """Key of `memplan.specs.training.OPTIMIZERS` (adamw)."""
    checkpointing: str | None
    """none, selective, save-attention, full or every-N (none)."""
    attention: str | None
    """eager, sdpa or flash (sdpa)."""
    loss: str | None
    """Key of `memplan.specs.training.LOSSES` (full, or the first that the objective has)."""
    objective: str | None
    """Key of `memplan.specs.training.OBJECTIVES` (lm)."""
    label_smoothing: float | None
    """Share of the probability that is spread over all words (0)."""
    teacher: str | os.PathLike[str] | None
    """Model that is distilled, named like the one that is trained."""
    teacher_dtype: str | None
    """dtype of its parameters: fp32, bf16 or fp16 (that of the trained model)."""
    supervised: float | None
    """Share of the tokens that have a label (1)."""
    dropout: float | None
    """Overrides every dropout probability of the config."""
    padding: bool | None
    """Micro-batches hold padding, so that an attention mask is passed."""
    batching: str | None
    """Key of `memplan.specs.training.BATCHINGS` (rows)."""
    packed_sequences: int | None
    """Sequences in a packed row, on average (2)."""
    lora_rank: int | None
    """Rank of adapters that are trained in place of the weights."""
    lora_targets: Names | None
    """Linear layers and embeddings that get one, as a list or with commas (all linear ones but the head)."""
    lora_dropout: float | None
    """Probability of dropout before them (0)."""
    lora_dtype: str | None
    """fp32, as peft keeps adapters, or base: the dtype of the weights (fp32)."""
    dora: bool | None
    """Adapters of magnitude and direction."""
    modules_to_save: Names | None
    """Modules of which a full copy is trained beside the adapters."""
    lora_layers: str | int | Sequence[int] | None
    """Numbers of the layers that get adapters, as a list or as in 0,16-31 (all)."""
    lora_ranks: str | Mapping[str, int] | None
    """Ranks of what has another one, by the end of its path (a regular expression), as a mapping or as in
    down_proj=8,layers.0.*=64; the first that fits counts (none)."""
    freeze: Names | None
    """Patterns of parameters or modules that are not trained."""
    quantize: str | None
    """How the frozen weights of linear layers are stored: nf4, nf4-double or int8 (as loaded)."""
    offload: str | None
    """activations: what checkpointing keeps waits in the host's memory (nothing is offloaded)."""
    reentrant: bool | None
    """Checkpointing by use_reentrant=True, the default of transformers 4."""
    upcast: bool | None
    """What is not quantised is cast to fp32 (peft's prepare_model_for_kbit_training)."""
    compile: bool | None
    """torch.compile of the model, with inductor."""
    eval_batch: int | None
    """Sequences per forward pass of an evaluation, which is then counted (8)."""
    eval_samples: int | None
    """Sequences whose logits an evaluation keeps for its metrics (none)."""
    eval_accumulation: int | None
    """Batches after which they move to the host (at the end)."""
    eval_generate: int | None
    """Tokens that an evaluation generates behind each sequence (none)."""


FIELD_BY_ARGUMENT = {
    "micro_batch": "micro_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "seq_len": "seq_len",
    "precision": "precision",
    "optimizer": "optimizer",
    "checkpointing": "activation_checkpointing",
    "attention": "attention",
    "loss": "loss",
    "objective": "objective",
    "label_smoothing": "label_smoothing",
    "teacher": "teacher",
    "teacher_dtype": "teacher_dtype",
    "supervised": "supervised",
    "dropout": "dropout",
    "padding": "padding",
    "batching": "batching",
    "packed_sequences": "packed_sequences",
    "freeze": "freeze",
    "quantize": "quantize",
    "offload": "offload",
    "reentrant": "reentrant",
    "upcast": "upcast",
    "compile": "compile",
}
"""Argument -> the field of `memplan.specs.training.Setup`."""

LORA_FIELD_BY_ARGUMENT = {
    "lora_rank": "rank",
    "lora_targets": "targets",
    "lora_dropout": "dropout",
    "lora_dtype": "dtype",
    "dora": "dora",
    "modules_to_save": "modules_to_save",
    "lora_layers": "layers",
    "lora_ranks": "ranks",
}
"""Argument -> the field of `memplan.specs.adapter.Lora`."""

EVALUATION_FIELD_BY_ARGUMENT = {
    "eval_batch": "batch",
    "eval_samples": "samples",
    "eval_accumulation": "accumulation",
    "eval_generate": "generate",
}
"""Argument -> the field of `memplan.specs.evaluation.Evaluation`."""

ARGUMENTS = (*FIELD_BY_ARGUMENT, *LORA_FIELD_BY_ARGUMENT, *EVALUATION_FIELD_BY_ARGUMENT)

COUNTS = ("micro_batch", "accumulation", "seq_len", "packed_sequences", "lora_rank", *EVALUATION_FIELD_BY_ARGUMENT)
LISTS = ("lora_targets", "modules_to_save", "freeze")
READER_BY_ARGUMENT: dict[str, Callable[[str, Any], Any]] = {"lora_layers": as_layers, "lora_ranks": as_ranks}


def setup_fields(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a setup that `choices` give.

    Raises:
        TypeError: there is no such argument.
        UsageError: a value has no meaning, or settings of adapters come without their rank.
    """
    for name in choices:
        if name not in ARGUMENTS:
            near = did_you_mean(name, ARGUMENTS, otherwise=f"Known: {', '.join(ARGUMENTS)}.")
            raise TypeError(f"a setup has no {name!r}. {near}")
    given = {name: _read(name, value) for name, value in choices.items() if value is not None}
    fields = {FIELD_BY_ARGUMENT[name]: value for name, value in given.items() if name in FIELD_BY_ARGUMENT}
    lora = {LORA_FIELD_BY_ARGUMENT[name]: value for name, value in given.items() if name in LORA_FIELD_BY_ARGUMENT}
    for name, default in _defaults_of(fields.get("objective")).items():
        fields.setdefault(name, default)
    settings = [name for name, value in given.items() if name in LORA_FIELD_BY_ARGUMENT and value is not False]
    if "rank" in lora:
        fields["lora"] = Lora(**lora)
    elif settings:
        raise UsageError(
            f"{_flag(settings[0])} is about adapters, and there is no rank of any.", "Say for example --lora-rank 16."
        )
    evaluated = {
        EVALUATION_FIELD_BY_ARGUMENT[name]: value
        for name, value in given.items()
        if name in EVALUATION_FIELD_BY_ARGUMENT
    }
    if evaluated:
        fields["evaluation"] = Evaluation(**evaluated)
    return fields


def choices_of(setup: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that ask for a setup again, from its JSON (`memplan.report.document.setup_document`).

    What is nothing, such as no adapters, is left out.

    Raises:
        KeyError: a field is missing.
    """
    found = {name: setup[field] for name, field in FIELD_BY_ARGUMENT.items()}
    lora, evaluation = setup["lora"], setup["evaluation"]
    if lora is not None:
        found |= {name: lora[field] for name, field in LORA_FIELD_BY_ARGUMENT.items()}
    if evaluation is not None:
        found |= {name: evaluation[field] for name, field in EVALUATION_FIELD_BY_ARGUMENT.items()}
    return {name: value for name, value in found.items() if not (value is None or value is False or value in ([], {}))}


def _defaults_of(objective: object) -> dict[str, Any]:
    """Fields for which an objective has defaults of its own; none for what is no objective."""
    if objective in TRAINER_BY_OBJECTIVE:
        return {"loss": LOSSES_BY_OBJECTIVE[objective][0], "dropout": dropout_of({"objective": objective})}
    return {}


def dropout_of(choices: Mapping[str, Any]) -> float | None:
    """What takes the place of all dropout of a model's config, None where it is kept.

    TRL's trainers switch dropout off unless they are told otherwise (`TRAINER_BY_OBJECTIVE`).
    """
    given: float | None = choices.get("dropout")
    return 0.0 if given is None and choices.get("objective") in TRAINER_BY_OBJECTIVE else given


def _flag(argument: str) -> str:
    return f"--{argument.lstrip('-').replace('_', '-')}"


def _read(name: str, value: Any) -> Any:
    if name in COUNTS:
        return as_count(name, value)
    if name in LISTS:
        return as_names(name, value)
    if name in READER_BY_ARGUMENT:
        return READER_BY_ARGUMENT[name](name, value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_count(name: str, value: Any) -> int:
    """A whole number from 1 to 10**9, NumPy's among them; else a `UsageError` that names the argument."""
    number = value if isinstance(value, bool) or not hasattr(value, "__index__") else value.__index__()
    check_count(name, number)
    return int(number)


def as_names(name: str, value: Any) -> tuple[str, ...]:
    """Names with commas between them, or a list of them.

    Raises:
        UsageError: it is neither, or empty.
    """
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
        raise UsageError(f"{name} is {value!r}, not names.", f"Give names with commas, as in {_flag(name)} a,b.")
    stripped = tuple(one.strip() for one in names)
    if not stripped or not all(stripped):
        raise UsageError(f"{name} has an empty name.", f"Give names with commas, as in {_flag(name)} a,b.")
    return stripped
