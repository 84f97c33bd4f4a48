"""Which trial is meant, on which card, and what does memplan say of it?"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memplan import api
from memplan.architectures.registry import read_architecture
from memplan.calibration.fit import gives_coefficients
from memplan.calibration.prediction import Prediction, prediction_of
from memplan.catalog.calibrations import apply, read_calibration
from memplan.catalog.gpus import find_card, parse_gpu
from memplan.catalog.measurements import file_of
from memplan.catalog.models import find_default_model, read_config
from memplan.errors import MemplanError, UsageError
from memplan.estimation.estimate import Estimator
from memplan.safety import DEFAULT_HEADROOM_PERCENT
from memplan.specs.gpu import GpuSpec
from memplan.specs.measurement import Card, Measurement, Trial
from memplan.specs.training import divisors
from memplan.specs.values import replace

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from memplan.estimation.estimate import Estimate
    from memplan.planner.plan import Candidate
    from memplan.specs.choices import Choices
    from memplan.specs.training import Setup


def make_trial(
    model: str | os.PathLike[str] | None = None,
    *,
    limit: str | None = None,
    data_parallel_size: int = 1,
    **choices: Unpack[Choices],
) -> Trial:
    """What is to be measured; everything is named as for `memplan.estimate`.

    Args beside those:
        limit: Size of a card (``24GB``) or its name: what the process may take; None: all there is.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: the model cannot be found.
    """
    asked = find_default_model()[0] if model is None else os.fspath(model)
    if api.names_factory(asked):
        raise UsageError(
            f"{asked} is a module of your own: a probe builds models from a config.json.",
            "Name a config.json, or ask memplan trace.",
        )
    values, name = read_config(asked)
    setup = api.make_setup(_defaults_of(values, name), data_parallel_size, choices)
    if setup.evaluation is not None:
        raise UsageError("A probe measures training steps, not an evaluation.", "Leave --eval-... out.")
    if setup.compile:
        raise UsageError("A probe runs the model as it is, not under torch.compile.", "Leave --compile out.")
    size, label = (None, "") if limit is None else _limit(limit)
    return Trial(model=name, config=values, setup=setup, limit_bytes=size, limit=label)


def _defaults_of(values: dict[str, Any], name: str) -> api.Model | api.UserModule:
    """Whose default length and attention a setup takes."""
    try:
        return api.Model(read_architecture(values, name), name, values, "")
    except MemplanError:
        return api.UserModule(name)


def _limit(text: str) -> tuple[int, str]:
    num, card = parse_gpu(text)
    if num != 1:
        raise UsageError(f"--limit {text} names {num} GPUs.", "A limit is of one.")
    return card.usable_bytes, card.name


def gpu_of(card: Card, limit_bytes: int | None = None, limit: str = "") -> GpuSpec | None:
    """The card that was measured on as the catalogue has it, else what is known of it; capped where it was.

    None for a CPU.
    """
    if card.device != "cuda":
        return None
    known = find_card(card.name, card.total_bytes)
    size = card.total_bytes if limit_bytes is None else limit_bytes
    name = limit or card.name
    if known is not None:
        return replace(known, torch_bytes=size, name=known.name if limit_bytes is None else name)
    return GpuSpec(name=name, label=card.name, torch_bytes=size, compute_capability=card.compute_capability or None)


def predict(trial: Trial, gpu: GpuSpec | None) -> Estimate:
    """What the formula says of a trial.

    Raises:
        MemplanError: it has no answer.
    """
    return estimator_of(trial, gpu).estimate(trial.setup, alloc_conf=trial.alloc_conf)


def estimator_of(trial: Trial, gpu: GpuSpec | None, speed: GpuSpec | None = None) -> Estimator:
    """The formula of a trial's model on a card; `speed`: whose rates time the steps, else the same."""
    architecture = read_architecture(dict(trial.config), trial.model, dropout=trial.setup.dropout)
    return Estimator(architecture, trial.model, gpu, speed)


def largest_predicted(trial: Trial, gpu: GpuSpec) -> int:
    """The largest micro-batch that the formula says survives on the card, without any headroom; at least 1.

    Where the formula has no answer, the micro-batch of the trial.
    """
    try:
        estimator = estimator_of(trial, gpu)
        estimator.check(trial.setup)
    except MemplanError:
        return trial.setup.micro_batch_size

    def fits(micro_batch_size: int) -> bool:
        setup = replace(trial.setup, micro_batch_size=micro_batch_size)
        return estimator.memory(setup).peak_process_bytes <= gpu.usable_bytes

    def survives(micro_batch_size: int) -> bool:
        setup = replace(trial.setup, micro_batch_size=micro_batch_size)
        return (
            estimator.replayed_memory(setup, gpu.usable_bytes, trial.alloc_conf).peak_process_bytes <= gpu.usable_bytes
        )

    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    while low > 1 and not survives(low):
        low -= 1
    return low


def card_id(card: Card) -> str:
    """What a card is called: its catalogue id, else the name of its file of records."""
    known = gpu_of(card)
    assert known is not None
    return known.name if known.name != card.name else file_of(card.name).partition(".")[0]


def prediction_for(found: Measurement, *, trace: bool = False, calibrated: bool = False) -> Prediction:
    """What the formula (or a trace of the real module) says of a measured trial.

    With a calibration only of records that have no part in it.
    """
    trial = found.trial
    gpu = gpu_of(found.card, trial.limit_bytes, trial.limit)
    if gpu is not None and calibrated:
        if gives_coefficients(found):
            return Prediction(reason="a calibration takes its coefficients from this half of the records")
        learnt = read_calibration(card_id(found.card), os.environ)
        gpu = gpu if learnt is None else apply(gpu, learnt)
    try:
        estimate = _traced(trial, gpu) if trace else predict(trial, gpu)
    except MemplanError as fault:
        return Prediction(reason=fault.cause)
    return prediction_of(estimate, found.card.device)


def _traced(trial: Trial, gpu: GpuSpec | None) -> Estimate:
    from memplan.probes.answers import estimate_of, trace_setup
    from memplan.probes.models import transformers_model

    model = transformers_model(trial.config, trial.model)
    return estimate_of(trace_setup(model, trial.setup, gpu=gpu), gpu=gpu, alloc_conf=trial.alloc_conf)


def plan_of(trial: Trial, gpu: GpuSpec, target_batch: int, *, checkpointing: str | None) -> Candidate | None:
    """What the planner recommends on a card for a batch; None where nothing fits.

    Raises:
        MemplanError: there is no plan for this model.
    """
    from memplan.planner.goal import Goal, Target
    from memplan.planner.search import search

    goal = Goal(
        setup=trial.setup,
        target=Target(target_batch),
        usable_bytes=gpu.usable_bytes,
        headroom_percent=DEFAULT_HEADROOM_PERCENT,
        activation_checkpointing=checkpointing,
    )
    speed = api.find_speed(gpu)
    return search(estimator_of(trial, gpu, speed), goal, gpu, speed.label).best


def next_larger(setup: Setup, target_batch: int) -> Setup | None:
    """The next micro-batch above that reaches the same batch; None where there is none."""
    each = target_batch // setup.data_parallel_size
    above = [micro for micro in divisors(each) if micro > setup.micro_batch_size]
    if not above:
        return None
    return replace(setup, micro_batch_size=above[0], gradient_accumulation_steps=each // above[0])
