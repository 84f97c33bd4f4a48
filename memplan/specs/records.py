"""A measurement as one JSON object, and back.

Keys are the fields of `memplan.specs.measurement`; what a reader does not know it leaves alone, what it needs and does
not find makes the record foreign.  A number is what was read, never rounded.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.specs.adapter import Lora, lora_record
from memplan.specs.evaluation import evaluation_record, parse_evaluation
from memplan.specs.measurement import OUTCOMES, Card, Measurement, PhaseBytes, StepRecord, Trial
from memplan.specs.training import Setup

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA_VERSION = 1
KIND = "measurement"

PLAIN = (
    "outcome",
    "message",
    "phase",
    "rank",
    "measured_at",
    "num_parameters",
    "num_trainable_parameters",
    "parameter_bytes",
    "gradient_bytes",
    "optimizer_state_bytes",
    "kept_activation_bytes",
    "context_bytes",
    "workspace_bytes",
    "process_basis",
    "wall_s",
)
"""Fields of a measurement that JSON has by itself."""

OPTIONAL = ("limit_bytes", "limit", "target_batch", "role", "alloc_conf")
"""Fields of a trial that a record may lack."""

SETUP_FIELDS = (
    "micro_batch_size",
    "gradient_accumulation_steps",
    "data_parallel_size",
    "seq_len",
    "precision",
    "optimizer",
    "activation_checkpointing",
    "attention",
    "loss",
    "objective",
    "label_smoothing",
    "dropout",
    "padding",
    "batching",
    "packed_sequences",
)


DEVICES = ("cuda", "cpu", "")
"""Of a card; empty where the process ended before it could be looked at."""


class RecordError(ValueError):
    """A JSON object that is no measurement; the message says what is wrong with it."""


def setup_record(setup: Setup) -> dict[str, Any]:
    """A setup as JSON."""
    record = {name: getattr(setup, name) for name in SETUP_FIELDS}
    return {
        **record,
        "lora": None if setup.lora is None else lora_record(setup.lora),
        "freeze": list(setup.freeze),
        "teacher": setup.teacher,
        "teacher_dtype": setup.teacher_dtype,
        "quantize": setup.quantize,
        "offload": setup.offload,
        "reentrant": setup.reentrant,
        "upcast": setup.upcast,
        "compile": setup.compile,
        "evaluation": None if setup.evaluation is None else evaluation_record(setup.evaluation),
    }


def trial_record(trial: Trial) -> dict[str, Any]:
    """A trial as JSON."""
    return {
        "model": trial.model,
        "config": dict(trial.config),
        "setup": setup_record(trial.setup),
        "limit_bytes": trial.limit_bytes,
        "limit": trial.limit,
        "target_batch": trial.target_batch,
        "role": trial.role,
        "alloc_conf": trial.alloc_conf,
    }


def measurement_record(measurement: Measurement) -> dict[str, Any]:
    """A measurement as JSON."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        **{name: getattr(measurement, name) for name in PLAIN},
        "trial": trial_record(measurement.trial),
        "card": {**measurement.card._asdict(), "clocks": dict(measurement.card.clocks)},
        "versions": dict(measurement.versions),
        "steps": [step_record(step) for step in measurement.steps],
        "step_times_s": list(measurement.step_times_s),
    }


def step_record(step: StepRecord) -> dict[str, Any]:
    """A step as JSON."""
    return {**step._asdict(), "phases": [phase._asdict() for phase in step.phases]}


# -- and back ----------------------------------------------------------------------------------------------------------


def parse_setup(record: Mapping[str, Any]) -> Setup:
    """The setup of a JSON object."""
    given = {name: record[name] for name in SETUP_FIELDS if name in _checked(record)}
    lora = record.get("lora")
    if lora is not None:
        _checked(lora)
        lora = Lora(
            rank=lora["rank"],
            targets=tuple(lora["targets"]),
            dropout=lora["dropout"],
            dtype=lora.get("dtype", "fp32"),
            dora=lora.get("dora", False),
            modules_to_save=tuple(lora.get("modules_to_save", ())),
            layers=tuple(lora.get("layers", ())),
            ranks=tuple(lora.get("ranks", {}).items()),
        )
    return Setup(
        **given,
        lora=lora,
        freeze=tuple(record.get("freeze", ())),
        teacher=record.get("teacher"),
        teacher_dtype=record.get("teacher_dtype"),
        quantize=record.get("quantize"),
        offload=record.get("offload"),
        reentrant=record.get("reentrant", False),
        upcast=record.get("upcast", False),
        compile=record.get("compile", False),
        evaluation=None if record.get("evaluation") is None else parse_evaluation(_checked(record["evaluation"])),
    )


def parse_trial(record: Mapping[str, Any]) -> Trial:
    """The trial of a JSON object."""
    _checked(record)
    optional = {name: record[name] for name in OPTIONAL if name in record}
    return Trial(
        model=_text(record["model"]), config=dict(record["config"]), setup=parse_setup(record["setup"]), **optional
    )


def parse_step(record: Mapping[str, Any]) -> StepRecord:
    """The step of a JSON object."""
    phases = tuple(PhaseBytes(**_known(phase, PhaseBytes)) for phase in record["phases"])
    return StepRecord(**{**_known(record, StepRecord), "phases": phases})


def parse_card(record: Mapping[str, Any]) -> Card:
    """The card of a JSON object."""
    return Card(**_known(record, Card))


def parse_measurement(record: Any) -> Measurement:
    """The measurement of a JSON object.

    Raises:
        RecordError: it is none, or was written by a later version.
    """
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise RecordError("it is no measurement of memplan")
    version = record.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise RecordError(f"its schema_version is {version!r}; this version of memplan reads {SCHEMA_VERSION}")
    try:
        found = Measurement(
            **{name: record[name] for name in PLAIN if name in _checked(record)},
            trial=parse_trial(record["trial"]),
            card=parse_card(record["card"]),
            versions={str(name): _text(value) for name, value in record["versions"].items()},
            steps=tuple(parse_step(step) for step in record["steps"]),
            step_times_s=tuple(float(value) for value in record["step_times_s"]),
        )
    except KeyError as error:
        raise RecordError(f"it has no {error.args[0]}") from error
    except RecordError:
        raise
    except MemplanError as error:
        raise RecordError(error.cause) from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RecordError(f"its fields are not those of a measurement ({error})") from error
    _check(found)
    return found


LARGEST = 2**63
"""No bytes, counts or seconds beyond this are taken seriously."""

TEXT, COUNT, NUMBER = (str,), (int,), (int, float)
FIELD_KINDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "outcome": (TEXT, False),
    "message": (TEXT, False),
    "phase": (TEXT, False),
    "rank": (COUNT, False),
    "measured_at": (TEXT, False),
    "num_parameters": (COUNT, True),
    "num_trainable_parameters": (COUNT, True),
    "parameter_bytes": (COUNT, True),
    "gradient_bytes": (COUNT, True),
    "optimizer_state_bytes": (COUNT, True),
    "kept_activation_bytes": (COUNT, True),
    "context_bytes": (COUNT, True),
    "workspace_bytes": (COUNT, True),
    "process_basis": (TEXT, False),
    "wall_s": (NUMBER, True),
    # of a trial
    "model": (TEXT, False),
    "config": ((dict,), False),
    "limit_bytes": (COUNT, True),
    "limit": (TEXT, False),
    "target_batch": (COUNT, True),
    "role": (TEXT, False),
    "alloc_conf": (TEXT, False),
    "padding": ((bool,), False),
    "batching": (TEXT, False),
    "packed_sequences": (COUNT, True),
    "targets": ((list,), False),
    # of a card
    "device": (TEXT, False),
    "name": (TEXT, False),
    "total_bytes": (COUNT, False),
    "compute_capability": (TEXT, False),
    "driver": (TEXT, False),
    "clocks": ((dict,), False),
    "num_other_processes": (COUNT, True),
    "other_bytes": (COUNT, True),
    # of a step and a phase
    "number": (COUNT, False),
    "num_alloc_retries": (COUNT, False),
    "num_ooms": (COUNT, False),
    "allocated_bytes": (COUNT, False),
    "peak_allocated_bytes": (COUNT, False),
    "reserved_bytes": (COUNT, True),
    "peak_reserved_bytes": (COUNT, True),
    "process_bytes": (COUNT, True),
}
"""Field -> types of its values, and whether it may be missing (null)."""


def _checked(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """`record`, whose fields have the types that they should; counts are not negative and numbers finite."""
    for name, value in record.items():
        kinds, may_be_null = FIELD_KINDS.get(name, ((), True))
        if not kinds or (value is None and may_be_null):
            continue
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong or (int in kinds and not 0 <= value < LARGEST):
            raise RecordError(f"its {name} is {value!r:.60}")
    return record


def _check(found: Measurement) -> None:
    if found.outcome not in OUTCOMES:
        raise RecordError(f"its outcome is {found.outcome!r}")
    if found.card.device not in DEVICES or (found.card.device == "cuda" and not found.card.total_bytes):
        raise RecordError(f"its device is {found.card.device!r} of {found.card.total_bytes} bytes")
    if found.trial.target_batch == 0:
        raise RecordError("its target_batch is 0")
    try:
        datetime.strptime(found.measured_at, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        raise RecordError(f"its measured_at is {found.measured_at!r}") from None
    if not all(0 < value < float("inf") for value in found.step_times_s):
        raise RecordError("a step took no time")


def _known(record: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    return {name: record[name] for name in kind._fields if name in _checked(record)}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RecordError(f"{value!r} stands where a text should")
    return value
