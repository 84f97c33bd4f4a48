"""What do the records of a card teach?"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from memplan.calibration.fit import TooFewRecordsError, fit
from memplan.calibration.prediction import Prediction, prediction_of
from memplan.catalog.calibrations import STACK, apply
from memplan.catalog.gpus import read_gpu
from memplan.catalog.measurements import file_of, read_all_measurements, read_measurements
from memplan.errors import MemplanError
from memplan.estimation.estimate import speed_of
from memplan.measuring.trials import card_id, estimator_of, gpu_of, predict

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.specs.calibration import Calibration
    from memplan.specs.measurement import Measurement
    from memplan.steptime.roofline import Term

CURE = "Make some: memplan probe --matrix core."


def calibrate(
    records: str | None = None, *, gpu: str | None = None, notify: Callable[[str], None] | None = None
) -> tuple[Calibration, ...]:
    """What the records of each card and stack teach; of one card if `gpu` names it.

    `notify` is told of which card.

    Raises:
        MemplanError: there are no records that something could be learnt from.
    """
    found = read_all_measurements(os.environ) if records is None else read_measurements(records)
    stacks: dict[tuple[str, ...], list[Measurement]] = {}
    for record in found.measurements:
        if record.card.device == "cuda":
            versions = (record.versions.get(name, "") for name in STACK if name != "driver")
            stacks.setdefault((card_id(record.card), record.card.driver, *versions), []).append(record)
    asked = None if gpu is None else _called(gpu)
    wanted = {key: group for key, group in stacks.items() if asked in {None, key[0]}}
    if not wanted:
        of = "" if gpu is None else f" of {gpu}"
        raise MemplanError(f"There are no measurements on a GPU{of} to learn from.", CURE)
    learnt: list[Calibration] = []
    reasons: list[str] = []
    for number, (key, group) in enumerate(wanted.items(), 1):
        if notify is not None:
            notify(f"{number}/{len(wanted)} learning from {len(group):,} measurements on {key[0]}")
        try:
            learnt.append(fit(group, key[0], _predict_with, _terms_of))
        except TooFewRecordsError as fault:
            reasons.append(f"{key[0]}: {fault}")
    if not learnt:
        raise MemplanError(f"Too little was measured ({'; '.join(reasons)}).", CURE)
    return tuple(learnt)


def _called(gpu: str) -> str:
    """The id of a card that was named in any of its ways; a card that the catalogue has not by its name."""
    try:
        return read_gpu(gpu).name
    except MemplanError:
        return file_of(gpu).partition(".")[0]


def _predict_with(record: Measurement, calibration: Calibration) -> Prediction:
    trial = record.trial
    gpu = gpu_of(record.card, trial.limit_bytes, trial.limit)
    assert gpu is not None
    try:
        return prediction_of(predict(trial, apply(gpu, calibration)))
    except MemplanError as fault:
        return Prediction(reason=fault.cause)


def _terms_of(record: Measurement) -> tuple[Term, ...] | None:
    gpu = gpu_of(record.card, record.trial.limit_bytes, record.trial.limit)
    if speed_of(gpu) is None:
        return None
    try:
        estimator = estimator_of(record.trial, gpu)
        estimator.check(record.trial.setup)
    except MemplanError:
        return None
    return estimator.time_terms(record.trial.setup)
