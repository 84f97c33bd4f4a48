"""How much of a card stays free: what others need, a headroom, or a bound that measurements vouch for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memplan.architectures.config import shown
from memplan.errors import UsageError
from memplan.specs.margin import Margin
from memplan.specs.values import NamedTuple, replace
from memplan.units import MAX_SIZE_BYTES, is_nothing, parse_size

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimate
    from memplan.specs.calibration import Calibration
    from memplan.specs.gpu import GpuSpec

DEFAULT_HEADROOM_PERCENT = 5.0
"""Share of the usable bytes that stays free: no measurement on a GPU bounds what is not modelled yet."""


def as_bytes(reserve: Any) -> int:
    """Bytes kept for others: a size such as ``1GiB``, a number of bytes, nothing where None or zero."""
    if reserve is None:
        return 0
    if isinstance(reserve, str):
        return 0 if is_nothing(reserve) else parse_size(reserve)
    if isinstance(reserve, bool) or not hasattr(reserve, "__index__") or not 0 <= reserve.__index__() <= MAX_SIZE_BYTES:
        raise UsageError(f"reserve is {shown(reserve)}.", "Give a size such as '1GiB', or a whole number of bytes.")
    return int(reserve.__index__())


class Safety(NamedTuple):
    """What stands between a prediction and the card's last byte."""

    headroom_percent: float
    ratio: float = 0.0
    """How far a calibrated bound lies above the prediction, as a share of it."""
    said: str = ""
    """What there is to say about a confidence that was asked for; empty where it is attained."""


def find_safety(gpu: GpuSpec | None, headroom: float | None, confidence: float | None) -> Safety:
    """Headroom, and the bound for a confidence where measurements vouch for one.

    Where they do not, the headroom stays and what is known of other cards is added to it.
    """
    percent = DEFAULT_HEADROOM_PERCENT if headroom is None else _percent(headroom)
    if confidence is None or gpu is None:
        return Safety(percent)
    asked: object = confidence
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 < asked < 1:
        raise UsageError(f"confidence is {shown(confidence)}.", "Give a probability between 0 and 1, such as 0.99.")
    from memplan.calibration.bounds import bound, least_scores

    scores = () if gpu.calibration is None else gpu.calibration.all_scores
    if gpu.calibration is None or not gpu.calibration.scores:
        return _from_other_cards(gpu, percent, confidence)
    found = bound(scores, confidence)
    if found.is_attained:
        return Safety(0.0 if headroom is None else percent, found.ratio)
    said = (
        f"{len(scores)} measurements of this card vouch for {int(1000 * found.confidence) / 1000:g} at most"
        f"{_exceeded(gpu.calibration)}; {confidence:g} takes {least_scores(confidence)} at least: the bound is the "
        f"largest error seen, and the headroom of {percent:g} % is added"
    )
    return Safety(percent, found.ratio, said)


def _exceeded(calibration: Calibration) -> str:
    num = calibration.num_exceeded
    return f", as {num} ran out of memory against the prediction" if num else ""


def _from_other_cards(gpu: GpuSpec, percent: float, confidence: float) -> Safety:
    """For a card that nobody has measured: the widest bound of those that were, and the headroom."""
    from memplan.calibration.bounds import bound
    from memplan.catalog.calibrations import read_calibrations

    ratios = [bound(one.all_scores, confidence).ratio for one in read_calibrations(os.environ) if one.scores]
    if not ratios:
        said = "nothing is calibrated yet; the bound is the headroom, not a statistical one"
        return Safety(percent, 0.0, said)
    said = (
        f"{gpu.label} is not calibrated: the bound is the widest of those of other cards ({len(ratios)}) and the "
        f"headroom of {percent:g} %, and no confidence is vouched for"
    )
    return Safety(percent, max(ratios), said)


def vouched(estimate: Estimate, reserve_bytes: int) -> Estimate:
    """The estimate with the confidence that the measurements of its card vouch for."""
    calibration = None if estimate.gpu is None else estimate.gpu.calibration
    if calibration is None or not calibration.scores:
        return estimate
    from memplan.calibration.bounds import confidence_of

    process = estimate.memory.peak_process_bytes
    ratio = (estimate.upper_bound_bytes - reserve_bytes - process) / process
    return replace(estimate, confidence=confidence_of(calibration.all_scores, ratio))


def margin_of(gpu: GpuSpec | None, reserve: str | int | None, safety: Safety) -> Margin:
    """What is added to the process bytes: what was reserved for others, and of a card headroom or bound."""
    reserved = as_bytes(reserve)
    if gpu is None:
        return Margin(reserved)
    return Margin(reserved + int(gpu.usable_bytes * safety.headroom_percent / 100), safety.ratio)


def _percent(headroom: float) -> float:
    try:
        percent = float(headroom)
    except (TypeError, ValueError, OverflowError):
        percent = float("nan")
    if not 0 <= percent < 100:
        raise UsageError(f"headroom is {shown(headroom)}.", "Give a percentage from 0 up to, not including, 100.")
    return percent
