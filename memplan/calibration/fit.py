"""What does a card's own record teach?  Coefficients from one half of the records, scores from the other.

    context     median of process - reserved bytes in steady state: CUDA context, kernels, libraries
    workspaces  the most that cuBLAS was seen to hold in the allocator
    times       max(FLOPs / (f x peak), bytes / (g x bandwidth), launch) summed over the operators of a step; f, g and
                launch minimise the mean square of log(predicted / measured)
    scores      (measured - predicted) / predicted process bytes, predicted with these coefficients

A record belongs to the half that a hash of what was measured says, so that the halves do not depend on the order of the
records and measuring something again does not move it.  Only runs that are predicted to fit are scored, survivors and
failures alike: that is known before a run, and it is whom the bound is for.

Left out: contention, other processes, clocks that differ; that trials of a search lie near the limit, where a user's
run need not.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING
from zlib import crc32

from memplan.calibration.accuracy import distinct, median, room, why_not
from memplan.specs.calibration import Calibration, Regime
from memplan.specs.measurement import identity
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memplan.calibration.prediction import Prediction
    from memplan.specs.measurement import Measurement
    from memplan.steptime.roofline import Term

    PredictWith = Callable[[Measurement, Calibration], Prediction]
    """Predicts a record with the coefficients of a calibration."""
    TermsOf = Callable[[Measurement], Sequence[Term] | None]
    """The operators of a record's step, timed at the rates of the datasheet; None where there is no formula."""

TIGHT = 0.9
"""Share of the limit from which on memory is scarce."""


class Rates(NamedTuple):
    """How fast a card is, beside its datasheet."""

    flops_fraction: float = 1.0
    bandwidth_fraction: float = 1.0
    launch_s: float = 0.0


class TooFewRecordsError(ValueError):
    """There is nothing to learn from; the message says what is missing."""


def fit(records: Sequence[Measurement], gpu: str, predict: PredictWith, terms_of: TermsOf) -> Calibration:
    """The calibration of one card and stack.

    Args:
        records: Its measurements.
        gpu: What the card is called.
        predict: Predicts a record with the coefficients of a calibration.
        terms_of: The operators of a record's step.

    Raises:
        TooFewRecordsError: fewer than two records are complete.
    """
    known = _one_a_run(records)
    usable = [record for record in known if not why_not(record)]
    fitted, scored = halves(usable)
    if not fitted or not scored:
        raise TooFewRecordsError(
            f"complete measurements: {len(usable)}; one to fit and one to score are the least, as a hash parts them"
        )
    rates = fit_rates([record for record in fitted if not record.card.num_other_processes], terms_of)
    found = Calibration(
        gpu=gpu,
        card_name=usable[0].card.name,
        versions={**usable[0].versions, **({"driver": usable[0].card.driver} if usable[0].card.driver else {})},
        first=min(record.measured_at for record in usable),
        last=max(record.measured_at for record in usable),
        num_fitted=len(fitted),
        context_bytes=_context(fitted),
        workspace_bytes=max((r.workspace_bytes for r in fitted if r.workspace_bytes is not None), default=None),
        flops_fraction=None if rates is None else rates.flops_fraction,
        bandwidth_fraction=None if rates is None else rates.bandwidth_fraction,
        launch_s=None if rates is None else rates.launch_s,
    )
    failed = halves([record for record in known if record.survived is False])[1]
    predicted = [(record, predict(record, found)) for record in (*scored, *failed)]
    fitting = [(record, p) for record, p in predicted if p.process is not None and p.process <= room(record)]
    return replace(
        found,
        scores=_scores([(record, p) for record, p in fitting if record.survived]),
        num_exceeded=sum(not record.survived for record, _ in fitting),
        regimes=_regimes(usable, predict, found),
    )


def _one_a_run(records: Sequence[Measurement]) -> list[Measurement]:
    """One record for all that measured the same: of repetitions and of ranks the one that took most."""
    by_identity: dict[str, Measurement] = {}
    for record in distinct(records):
        key = identity(record)
        known = by_identity.get(key)
        if known is None or _severity(record) > _severity(known):
            by_identity[key] = record
    return list(by_identity.values())


def _severity(record: Measurement) -> tuple[bool, bool, int]:
    """A failure weighs more than any answer, and an answer more than none."""
    return record.survived is False, record.survived is not None, record.peak_process_bytes or 0


def halves(records: Sequence[Measurement]) -> tuple[list[Measurement], list[Measurement]]:
    """(those to fit, those to score), by a hash of what was measured."""
    fitted: list[Measurement] = []
    scored: list[Measurement] = []
    for record in records:
        (fitted if gives_coefficients(record) else scored).append(record)
    return fitted, scored


def gives_coefficients(record: Measurement) -> bool:
    """Whether a record is of the half that the coefficients come from."""
    return not crc32(identity(record).encode()) & 1


def _says_what_it_takes(record: Measurement) -> bool:
    """Whether the driver said what this process took, and no other."""
    alone = not record.card.num_other_processes
    return record.process_basis == "nvml" or (record.process_basis == "device" and alone)


def _context(records: Sequence[Measurement]) -> int | None:
    beside = [
        record.peak_process_bytes - record.peak_reserved_bytes
        for record in records
        if _says_what_it_takes(record) and record.peak_process_bytes and record.peak_reserved_bytes
    ]
    return max(int(median(sorted(beside))), 0) if beside else None


def _scores(predicted: Sequence[tuple[Measurement, Prediction]]) -> tuple[float, ...]:
    """Ascending; of process bytes that the driver said."""
    scores = [
        (record.peak_process_bytes - prediction.process) / prediction.process
        for record, prediction in predicted
        if prediction.process and record.peak_process_bytes and _says_what_it_takes(record)
    ]
    return tuple(sorted(scores))


def _regimes(records: Sequence[Measurement], predict: PredictWith, found: Calibration) -> tuple[Regime, ...]:
    """How the reserved bytes lie to the allocated and to the predicted ones, where memory is scarce and where not."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        prediction = predict(record, found)
        reserved, allocated = record.peak_reserved_bytes, record.peak_allocated_bytes
        if reserved and allocated and prediction.reserved:
            limit = record.trial.limit_bytes or record.card.total_bytes
            name = "tight" if prediction.reserved > TIGHT * limit else "free"
            by_name.setdefault(name, []).append((reserved / allocated, reserved / prediction.reserved))
    return tuple(
        Regime(name, len(ratios), *(median(sorted(column)) for column in zip(*ratios, strict=True)))
        for name, ratios in sorted(by_name.items())
    )


# -- rates -------------------------------------------------------------------------------------------------------------

LEAST = Rates(0.01, 0.01, 1e-8)
MOST = Rates(1.0, 1.0, 1e-3)
"""Between these the rates are looked for."""

SWEEPS = 20
POINTS = 9
SHRINK = 0.65
"""Each sweep looks at a grid of 9 x 9 x 9 points around the best so far, narrower by this than the one before."""


def fit_rates(records: Sequence[Measurement], terms_of: TermsOf) -> Rates | None:
    """The rates that fit the measured steps best; None where there is no step to fit.

    A logarithmic grid over all three at once, since they stand in for each other, around the best point and finer with
    every sweep; deterministic.
    """
    timed = [(seconds, terms) for r in records if (seconds := r.step_time_s) and (terms := terms_of(r)) is not None]
    if not timed:
        return None
    loss = _Loss(timed)
    low, high = ([math.log(value) for value in rates] for rates in (LEAST, MOST))
    centre = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    widths = [(b - a) / 2 for a, b in zip(low, high, strict=True)]
    least = math.inf
    for _ in range(SWEEPS):
        axes = [
            [min(max(c + w * (2 * n / (POINTS - 1) - 1), a), b) for n in range(POINTS)]
            for c, w, a, b in zip(centre, widths, low, high, strict=True)
        ]
        for point in itertools.product(*axes):
            here = loss(Rates(*map(math.exp, point)))
            if here < least:
                centre, least = list(point), here
        widths = [SHRINK * width for width in widths]
    return Rates(*map(math.exp, centre))


class _Loss:
    """Mean square of log(predicted / measured) over some steps, as a function of the rates."""

    def __init__(self, timed: Sequence[tuple[float, Sequence[Term]]]) -> None:
        import numpy as np

        self._np = np
        rows = [(n, *term) for n, (_, terms) in enumerate(timed) for term in terms]
        columns = list(zip(*rows, strict=True))
        self._step = np.array(columns[0])
        self._computing, self._moving, self._num, self._launches = (np.array(c, dtype=float) for c in columns[1:])
        self._measured = np.array([seconds for seconds, _ in timed])

    def __call__(self, rates: Rates) -> float:
        np = self._np
        times = np.maximum(self._computing / rates.flops_fraction, self._moving / rates.bandwidth_fraction)
        times = self._num * np.maximum(times, self._launches * rates.launch_s)
        predicted = np.bincount(self._step, weights=times, minlength=len(self._measured))
        return float(np.mean(np.log(predicted / self._measured) ** 2))
