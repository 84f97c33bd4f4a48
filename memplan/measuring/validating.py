"""How wrong is memplan?  Every record and every published measurement against what it predicts."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from memplan.calibration.accuracy import GROUPS, Accuracy, compare, distinct
from memplan.calibration.decisions import VERDICTS, Decision, Question, decide, questions
from memplan.catalog.measurements import Records, read_all_measurements, read_measurements
from memplan.catalog.published import read_published, why_not_answered
from memplan.errors import MemplanError
from memplan.measuring.published import Answer, answers
from memplan.measuring.trials import estimator_of, gpu_of, plan_of, prediction_for
from memplan.probes.faults import require
from memplan.report.document import envelope
from memplan.report.probe import stack_of
from memplan.safety import DEFAULT_HEADROOM_PERCENT
from memplan.specs.margin import Margin
from memplan.specs.measurement import describe
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memplan.calibration.accuracy import Errors, Point
    from memplan.calibration.prediction import Prediction
    from memplan.specs.measurement import Measurement


class Validation(NamedTuple):
    """Predicted against measured."""

    records: Records
    accuracy: Accuracy
    decisions: tuple[Decision, ...]
    published: tuple[Answer, ...]
    witness: str
    """``formula`` or ``trace``."""


def validate(
    records: str | None = None,
    *,
    trace: bool = False,
    calibrated: bool = False,
    device: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Validation:
    """Compare every record there is, and every published measurement, with what memplan predicts.

    Args:
        records: A folder or file of measurements; those that memplan comes with and the user's own if None.
        trace: Predict by running the real modules on the meta device instead of by the formula.
        calibrated: Use the calibration of each card; without, nothing that was measured has a part in the prediction.
        device: ``cuda`` or ``cpu``; both if None.
        notify: Is told what is being predicted.

    Raises:
        MemplanError: the records cannot be read, or tracing needs a library that is not installed.
    """
    found = read_all_measurements(os.environ) if records is None else read_measurements(records)
    chosen = [one for one in found.measurements if device in {None, one.card.device}]
    if trace:
        require("torch")
        require("transformers")

    tell = notify or (lambda _: None)
    several = distinct(chosen)
    place = {record.id: f"{number}/{len(several)}" for number, record in enumerate(several, 1)}

    def predict_one(record: Measurement) -> Prediction:
        tell(f"{place[record.id]} {describe(record.trial)}")
        return prediction_for(record, trace=trace, calibrated=calibrated)

    accuracy = compare(several, predict_one)
    tell("planning what was put to the test")
    return Validation(
        records=found,
        accuracy=accuracy,
        decisions=decisions_of(chosen),
        published=answers(notify),
        witness="trace" if trace else "formula",
    )


def decisions_of(records: Sequence[Measurement]) -> tuple[Decision, ...]:
    """What became of the recommendations; trials that memplan has no formula for were not recommended by it."""
    found = []
    for question in questions(records):
        try:
            found.append(decide(question, recommended(question)))
        except MemplanError:
            continue  # the accuracy says why
    return tuple(found)


def recommended(question: Question) -> int | None:
    """The micro-batch that memplan recommends where these trials were run; None where it says that nothing fits.

    Raises:
        MemplanError: there is no formula for these trials.
    """
    trial = question.example.trial
    gpu = gpu_of(question.example.card, trial.limit_bytes, trial.limit)
    assert gpu is not None
    if question.target_batch is not None:
        mode = trial.setup.activation_checkpointing
        plan = plan_of(trial, gpu, question.target_batch, checkpointing=mode)
        return None if plan is None else plan.setup.micro_batch_size
    estimator = estimator_of(trial, gpu)
    estimator.check(trial.setup)
    budget = Margin(int(gpu.usable_bytes * DEFAULT_HEADROOM_PERCENT / 100)).budget(gpu.usable_bytes)
    best = None
    for option in question.options():
        setup = replace(trial.setup, micro_batch_size=option)
        if estimator.replayed_memory(setup, budget, trial.alloc_conf).peak_process_bytes > budget:
            break
        best = option
    return best


# -- as plain data -----------------------------------------------------------------------------------------------------


def accuracy_document(found: Validation) -> dict[str, Any]:
    """Everything that a validation says, as plain data."""
    records = found.records.measurements
    times = sorted(record.measured_at for record in records)
    compared = {point.id for point in found.accuracy.points}
    return {
        **envelope("accuracy"),
        "witness": found.witness,
        "measured": {
            "num_records": len(records),
            "num_compared": len(compared),
            "num_on_gpus": sum(record.card.device == "cuda" for record in records),
            "first": times[0] if times else None,
            "last": times[-1] if times else None,
            "cards": sorted({record.card.name for record in records}),
            "stacks": sorted({stack_of(record.versions, record.card.driver) for record in records}),
        },
        "bad_lines": [line._asdict() for line in found.records.bad_lines],
        "errors": [_errors(one) for one in found.accuracy.errors()],
        "decisions": _decisions(found.decisions),
        "points": [_point(one) for one in found.accuracy.points],
        "left_out": _left_out(found),
        "published": _published(found),
    }


def _errors(one: Errors) -> dict[str, Any]:
    over, under = one.worst_over, one.worst_under
    return {
        **one._asdict(),
        "worst_over": None if over is None else over.error,
        "worst_over_id": None if over is None else over.id,
        "worst_under": None if under is None else under.error,
        "worst_under_id": None if under is None else under.id,
    }


def _decisions(decisions: Sequence[Decision]) -> dict[str, Any]:
    verdicts = Counter(one.verdict for one in decisions)
    return {
        "num": len(decisions),
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "cases": [
            {
                "trial": one.words,
                "recommended": one.recommended,
                "largest_survivor": max(one.question.survivors, default=None),
                "smallest_failure": min(one.question.failures, default=None),
                "verdict": one.verdict,
            }
            for one in decisions
        ],
    }


def _point(one: Point) -> dict[str, Any]:
    groups = dict(zip(GROUPS, one.groups, strict=True))
    return {
        "id": one.id,
        "device": one.device,
        "gpu": groups["gpu"],
        "model": one.model,
        "model_type": groups["model_type"],
        "words": one.words,
        "quantity": one.quantity,
        "measured": one.measured,
        "predicted": one.predicted,
        "error": one.error,
    }


def _left_out(found: Validation) -> list[dict[str, Any]]:
    by_reason: dict[str, list[str]] = {}
    for one in found.accuracy.left_out:
        by_reason.setdefault(one.reason, []).append(one.id)
    return [{"reason": reason, "num": len(ids), "ids": ids} for reason, ids in sorted(by_reason.items())]


def _published(found: Validation) -> dict[str, Any]:
    rows = read_published()
    asked = {answer.question.row.id for answer in found.published}
    reasons = Counter(why_not_answered(row) for row in rows if row.id not in asked)
    dates = sorted(answer.question.row.date for answer in found.published if answer.question.row.date)
    return {
        "num_rows": len(rows),
        "last": dates[-1] if dates else None,
        "compared": [
            {
                "id": one.question.row.id,
                "source": one.question.row.source,
                "source_ref": one.question.row.source_ref,
                "date": one.question.row.date,
                "model": one.trained,
                "gpu": one.question.row.gpu,
                "quantity": one.question.quantity,
                "comparison": one.question.comparison,
                "measured": one.question.measured_bytes,
                "predicted": one.predicted_bytes,
                "error": one.error,
                "explained_error": one.explained_error,
                "unknown": list(one.question.unknown),
                "explanation": one.question.explanation,
            }
            for one in found.published
        ],
        "not_answered": [{"reason": reason, "num": num} for reason, num in reasons.most_common()],
    }
