"""A measurement as one JSON object, and back.

Keys are the fields of `memplan.specs.measurement`; what a reader does not know it leaves alone, what it needs and does
not find makes the record foreign.  A number is what was read, never rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.specs.adapter import Lora
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
    "dropout",
    "padding",
)


class RecordError(ValueError):
    """A JSON object that is no measurement; the message says what is wrong with it."""


def setup_record(setup: Setup) -> dict[str, Any]:
    """A setup as JSON."""
    record = {name: getattr(setup, name) for name in SETUP_FIELDS}
    return {**record, "lora": None if setup.lora is None else lora_record(setup.lora)}


def lora_record(lora: Lora) -> dict[str, Any]:
    """Adapters as JSON."""
    return {"rank": lora.rank, "targets": list(lora.targets), "dropout": lora.dropout}


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
    given = {name: record[name] for name in SETUP_FIELDS if name in record}
    lora = record.get("lora")
    if lora is not None:
        lora = Lora(rank=lora["rank"], targets=tuple(lora["targets"]), dropout=lora["dropout"])
    return Setup(**given, lora=lora)


def parse_trial(record: Mapping[str, Any]) -> Trial:
    """The trial of a JSON object."""
    optional = {name: record[name] for name in ("limit_bytes", "limit", "target_batch", "role") if name in record}
    return Trial(
        model=_text(record["model"]), config=dict(record["config"]), setup=parse_setup(record["setup"]), **optional
    )


def parse_step(record: Mapping[str, Any]) -> StepRecord:
    """The step of a JSON object."""
    phases = tuple(PhaseBytes(**_known(phase, PhaseBytes)) for phase in record["phases"])
    for phase in phases:
        for name, value in phase._asdict().items():
            if name != "name" and value is not None:
                _count(name, value)
    numbers = {name: _count(name, record[name]) for name in ("number", "num_alloc_retries", "num_ooms")}
    return StepRecord(phases=phases, **numbers)


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
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise RecordError(f"its schema_version is {version!r}; this version of memplan reads {SCHEMA_VERSION}")
    try:
        found = Measurement(
            **{name: record[name] for name in PLAIN if name in record},
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
    except (TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"its fields are not those of a measurement ({error})") from error
    _check(found)
    return found


def _check(found: Measurement) -> None:
    if found.outcome not in OUTCOMES:
        raise RecordError(f"its outcome is {found.outcome!r}")
    _text(found.measured_at)
    for name in PLAIN:
        value = getattr(found, name)
        if name.endswith("_bytes") and value is not None:
            _count(name, value)
    if not all(0 < value < float("inf") for value in found.step_times_s):
        raise RecordError("a step took no time")


def _known(record: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    return {name: record[name] for name in kind._fields if name in record}


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RecordError(f"its {name} is {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RecordError(f"{value!r} stands where a text should")
    return value
