"""How wrong are the predictions?

    error = (predicted - measured) / measured

signed: below 0 too little was predicted, which is what ends in an out-of-memory error.  Of n errors the q-th percentile
is the smallest that at least q percent of them do not exceed, so that nothing is interpolated between few records.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from memplan.calibration.prediction import QUANTITIES, measured
from memplan.specs.measurement import DONE, OUT_OF_MEMORY, describe
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from memplan.calibration.prediction import Prediction
    from memplan.specs.measurement import Measurement

    Predict = Callable[[Measurement], Prediction]

GROUPS = ("all", "model_type", "gpu", "precision", "checkpointing", "lora")


class Point(NamedTuple):
    """One quantity of one record."""

    id: str
    device: str
    quantity: str
    measured: float
    predicted: float
    model: str
    words: str
    """What was measured, in a few words."""
    groups: tuple[str, ...]
    """Which group of each of `GROUPS` it belongs to."""

    @property
    def error(self) -> float:
        """Signed, as a fraction of what was measured."""
        return (self.predicted - self.measured) / self.measured


class LeftOut(NamedTuple):
    """A record that is not compared."""

    id: str
    reason: str


class Errors(NamedTuple):
    """The errors of one quantity in one group."""

    device: str
    quantity: str
    group: str
    """One of `GROUPS`."""
    value: str
    num: int
    median: float
    p90: float
    p99: float
    abs_p90: float
    """Without its sign, an error is at most this in 90 % of the records."""
    abs_p99: float
    worst_over: Point | None
    """Predicted too much by the most; None where nothing was."""
    worst_under: Point | None
    """Predicted too little by the most; None where nothing was."""


class Accuracy(NamedTuple):
    """Everything that records say about predictions."""

    points: tuple[Point, ...]
    left_out: tuple[LeftOut, ...]

    def errors(self) -> tuple[Errors, ...]:
        """By device and quantity, for all and for each value of each group."""
        found: dict[tuple[str, str, str, str], list[Point]] = defaultdict(list)
        for point in self.points:
            for group, value in zip(GROUPS, point.groups, strict=True):
                found[point.device, point.quantity, group, value].append(point)

        def order(key: tuple[str, str, str, str]) -> tuple[bool, int, int, str]:
            device, quantity, group, value = key
            return device != "cuda", QUANTITIES.index(quantity), GROUPS.index(group), value

        return tuple(errors_of(*key, found[key]) for key in sorted(found, key=order))


def compare(records: Iterable[Measurement], predict: Predict) -> Accuracy:
    """What was predicted of each record against what was measured."""
    points: list[Point] = []
    left_out: list[LeftOut] = []
    for record in records:
        reason = why_not(record)
        if record.outcome == OUT_OF_MEMORY:
            reason = _why_it_failed(record, predict(record))
        prediction = None if reason else predict(record)
        if prediction is not None and prediction.reason:
            reason = prediction.reason
        if prediction is None or reason:
            left_out.append(LeftOut(record.id, reason))
            continue
        for quantity in QUANTITIES:
            seen, said = measured(record, quantity), prediction.of(quantity)
            if seen and said is not None:
                points.append(_point(record, quantity, seen, said))
    return Accuracy(tuple(points), tuple(left_out))


def _why_it_failed(record: Measurement, prediction: Prediction) -> str:
    """Of a run that ran out of memory: was it foreseen?"""
    if prediction.process is None:
        return "it ran out of memory, and there is no prediction"
    if prediction.process <= room(record):
        return "it ran out of memory where the prediction, without headroom, says that it fits"
    return "it ran out of memory, as predicted: it counts for the decisions"


def room(record: Measurement) -> int:
    """Bytes that the process had: its limit, or the card."""
    return record.trial.limit_bytes or record.card.total_bytes


def distinct(records: Iterable[Measurement]) -> list[Measurement]:
    """Each run once: a record that answered another question, too, was saved with that question.

    Of the copies the one that was part of a plan; they differ in what they were asked for and in nothing else.
    """
    by_run: dict[str, Measurement] = {}
    for record in records:
        known = by_run.get(record.id)
        if known is None or record.trial.role:
            by_run[record.id] = record
    return list(by_run.values())


def why_not(record: Measurement) -> str:
    """Why a record says nothing about a peak; empty where it does."""
    if record.outcome == OUT_OF_MEMORY:
        return "it ran out of memory: it counts for the decisions"
    if record.outcome != DONE:
        return f"it {record.outcome}"
    if not record.steady:
        return "it has no second step"
    if record.card.device == "cpu" and _has_dropout(record):
        return "dropout keeps other masks on a CPU than on a card"
    return ""


def _has_dropout(record: Measurement) -> bool:
    lora, given = record.trial.setup.lora, record.trial.setup.dropout
    if lora is not None and lora.dropout > 0:
        return True
    if given is not None:
        return given > 0
    config = record.trial.config
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in config.items())


def _point(record: Measurement, quantity: str, seen: float, said: float) -> Point:
    trial = record.trial
    lora = "none" if trial.setup.lora is None else "LoRA"
    groups = (
        "all",
        str(trial.config.get("model_type", "unknown")),
        record.card.name,
        trial.setup.precision,
        trial.setup.activation_checkpointing,
        lora,
    )
    return Point(record.id, record.card.device, quantity, seen, said, trial.model, describe(trial), groups)


def errors_of(device: str, quantity: str, group: str, value: str, points: Sequence[Point]) -> Errors:
    """The errors of some points, at least one."""
    ordered = sorted(points, key=lambda point: point.error)
    values = [point.error for point in ordered]
    sizes = sorted(abs(value) for value in values)
    return Errors(
        device=device,
        quantity=quantity,
        group=group,
        value=value,
        num=len(values),
        median=median(values),
        p90=percentile(values, 0.90),
        p99=percentile(values, 0.99),
        abs_p90=percentile(sizes, 0.90),
        abs_p99=percentile(sizes, 0.99),
        worst_over=ordered[-1] if values[-1] > 0 else None,
        worst_under=ordered[0] if values[0] < 0 else None,
    )


def median(ordered: Sequence[float]) -> float:
    """The middle of ascending values, or the mean of the two in the middle."""
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of ascending values that a share of them does not exceed."""
    return ordered[max(math.ceil(round(share * len(ordered), 9)), 1) - 1]
