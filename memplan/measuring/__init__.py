"""Probes and what they teach, asked for with plain values: what the library offers and what the command line calls.

    memplan.probe("qwen2.5-1.5b", limit="24GB", seq_len=2048)
    memplan.validate()
    memplan.calibrate()

The questions of `memplan.api` are answered by arithmetic; these by real training steps on a device.
"""

from memplan.measuring.calibrating import calibrate
from memplan.measuring.probing import (
    DEFAULT_TIME_LIMIT_S,
    Decision,
    Outcome,
    Probe,
    assumed_context_bytes,
    default_records,
    probe,
    torchrun_ranks,
    trials_document,
)
from memplan.measuring.same_update import SameUpdate, same_update
from memplan.measuring.trials import (
    estimator_of,
    gpu_of,
    largest_predicted,
    make_trial,
    next_larger,
    plan_of,
    predict,
    prediction_for,
)
from memplan.measuring.validating import Validation, accuracy_document, validate

__all__ = [
    "DEFAULT_TIME_LIMIT_S",
    "Decision",
    "Outcome",
    "Probe",
    "SameUpdate",
    "Validation",
    "accuracy_document",
    "assumed_context_bytes",
    "calibrate",
    "default_records",
    "estimator_of",
    "gpu_of",
    "largest_predicted",
    "make_trial",
    "next_larger",
    "plan_of",
    "predict",
    "prediction_for",
    "probe",
    "same_update",
    "torchrun_ranks",
    "trials_document",
    "validate",
]
