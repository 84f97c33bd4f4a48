"""Probes, asked for with plain values: what the library offers and what the command line calls.

    memplan.probe("llama-3.2-1b", limit="24GB", seq_len=2048)

The questions of `memplan.api` are answered by arithmetic; these by real training steps on a device.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memplan import api
from memplan.architectures.registry import read_architecture
from memplan.calibration.prediction import Prediction, prediction_of
from memplan.catalog.gpus import parse_gpu, read_gpus
from memplan.catalog.measurements import append_measurement, file_of, read_measurements, records_path
from memplan.catalog.models import find_default_model, read_config
from memplan.errors import MemplanError, UsageError
from memplan.estimation.estimate import Estimator, context_bytes
from memplan.planner.goal import divisors
from memplan.probes.launch import Launcher, Place
from memplan.probes.session import Budget, Largest, Session
from memplan.report.document import envelope
from memplan.report.probe import trial_row
from memplan.specs.adapter import Lora
from memplan.specs.gpu import GpuSpec
from memplan.specs.measurement import Card, Measurement, Trial, describe
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from memplan.catalog.matrix import MatrixEntry
    from memplan.estimation.estimate import Estimate
    from memplan.specs.training import Setup

    Notify = Callable[[str], None]

DEFAULT_TIME_LIMIT_S = 600.0
"""Seconds after which a trial is given up."""

SETUP_ARGUMENTS = {
    "micro_batch": "micro_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "seq_len": "seq_len",
    "precision": "precision",
    "optimizer": "optimizer",
    "checkpointing": "activation_checkpointing",
    "attention": "attention",
    "loss": "loss",
    "dropout": "dropout",
    "padding": "padding",
}
"""What the functions here call a field of a setup."""

LORA_ARGUMENTS = ("lora_rank", "lora_targets", "lora_dropout")


class Decision(NamedTuple):
    """A plan put to the test: it should fit, and the next larger micro-batch tells how much was left."""

    target_batch: int
    plan: Measurement | None
    """None: there was no time, or nothing fits."""
    larger: Measurement | None
    """The next larger micro-batch with the same checkpointing; None: there is none, or no time."""


class Outcome(NamedTuple):
    """What came of an entry of a matrix."""

    trial: Trial
    found: Largest | Decision | Measurement | None
    """None: there was no time."""


def make_trial(
    model: str | os.PathLike[str] | None = None,
    *,
    limit: str | None = None,
    lora_rank: int | None = None,
    lora_targets: str | Sequence[str] | None = None,
    lora_dropout: float | None = None,
    data_parallel_size: int = 1,
    **choices: Any,
) -> Trial:
    """What is to be measured; everything is named as for `memplan.estimate`.

    Args beside those:
        limit: Size of a card (``24GB``) or its name: what the process may take; None: all there is.
        lora_rank: Rank of adapters that peft adds; None: all weights are trained.
        lora_targets: Names of the layers they are added to, as a list or with commas; all linear ones if None.
        lora_dropout: Probability of dropout before them (0).

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: the model cannot be found.
    """
    unknown = sorted(set(choices) - set(SETUP_ARGUMENTS))
    if unknown:
        raise UsageError(f"A trial has no {unknown[0]}.", f"It has {', '.join(SETUP_ARGUMENTS)}.")
    asked = find_default_model()[0] if model is None else os.fspath(model)
    if api.names_factory(asked):
        raise UsageError(
            f"{asked} is a module of your own: a probe builds models from a config.json.",
            "Name a config.json, or ask memplan trace.",
        )
    values, name = read_config(asked)
    given = {SETUP_ARGUMENTS[argument]: value for argument, value in choices.items()}
    setup = api.make_setup(_defaults_of(values, name), data_parallel_size, given)
    if lora_rank is None and (lora_targets is not None or lora_dropout is not None):
        raise UsageError("There are settings of LoRA and no rank.", "Say --lora-rank 16, or leave them out.")
    lora = None if lora_rank is None else _lora(lora_rank, lora_targets, lora_dropout)
    size, label = (None, "") if limit is None else _limit(limit)
    return Trial(model=name, config=values, setup=replace(setup, lora=lora), limit_bytes=size, limit=label)


def _defaults_of(values: dict[str, Any], name: str) -> api.Model | api.UserModule:
    """Whose default length and attention a setup takes."""
    try:
        return api.Model(read_architecture(values, name), name, values, "")
    except MemplanError:
        return api.UserModule(name)


def _lora(rank: int, targets: str | Sequence[str] | None, dropout: float | None) -> Lora:
    names = targets.split(",") if isinstance(targets, str) else targets or ("all-linear",)
    return Lora(rank=rank, targets=tuple(name.strip() for name in names), dropout=dropout or 0.0)


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
    known = [gpu for gpu in read_gpus().values() if _is_called(gpu, card.name)]
    near = [gpu for gpu in known if gpu.torch_bytes and abs(gpu.torch_bytes / card.total_bytes - 1) < 0.04]
    size = card.total_bytes if limit_bytes is None else limit_bytes
    name = limit or card.name
    if near:
        return replace(near[0], torch_bytes=size, name=near[0].name if limit_bytes is None else name)
    return GpuSpec(name=name, label=card.name, torch_bytes=size, compute_capability=card.compute_capability or None)


def _is_called(gpu: GpuSpec, name: str) -> bool:
    wanted = _plain(name)
    return any(_plain(one) == wanted for one in (gpu.name, gpu.label, *gpu.aliases))


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().replace("nvidia", "").replace("geforce", "") if c.isalnum())


def predict(trial: Trial, gpu: GpuSpec | None) -> Estimate:
    """What the formula says of a trial.

    Raises:
        MemplanError: it has no answer.
    """
    return estimator_of(trial, gpu).estimate(trial.setup)


def estimator_of(trial: Trial, gpu: GpuSpec | None) -> Estimator:
    """The formula of a trial's model on a card."""
    architecture = read_architecture(dict(trial.config), trial.model, dropout=trial.setup.dropout)
    return Estimator(architecture, trial.model, gpu, gpu)


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
        return estimator.replayed_memory(setup, gpu.usable_bytes).peak_process_bytes <= gpu.usable_bytes

    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    while low > 1 and not survives(low):
        low -= 1
    return low


# -- trials ------------------------------------------------------------------------------------------------------------


def torchrun_ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, number of ranks) of this process: torchrun says it in the environment.

    Raises:
        UsageError: what it says makes no sense.
    """
    texts = environment.get("RANK"), environment.get("WORLD_SIZE")
    if None in texts:
        return 0, 1
    rank, size = (int(text) if text and text.isdigit() else -1 for text in texts)
    if not 0 <= rank < size:
        raise UsageError(
            f"RANK={texts[0]} and WORLD_SIZE={texts[1]} make no sense.", "Start ranks with torchrun, or unset both."
        )
    return rank, size


class Probe:
    """Trials on one device of this machine; use it as a context manager, so that nothing is left running.

    Raises:
        MemplanError: there is no such device, PyTorch is missing, or the records cannot be read.
    """

    def __init__(
        self,
        *,
        device: str = "cuda",
        records: str | None = None,
        time_limit_s: float = DEFAULT_TIME_LIMIT_S,
        time_budget_s: float | None = None,
        again: bool = False,
        notify: Notify | None = None,
        launcher: Launcher | None = None,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        """Find the device and what is known of it.

        Args:
            device: ``cuda`` or ``cpu``.
            records: Folder that measurements are appended to; None: nowhere.
            time_limit_s: Seconds of one trial.
            time_budget_s: Seconds of all of them.
            again: Measure what is known, too.
            notify: Is told what is being measured.
            launcher: In place of real processes.
            ranks: (rank, number of ranks), where torchrun has started several.
        """
        self.launcher = launcher or Launcher(device, time_limit_s=time_limit_s, ranks=ranks)
        self._budget = Budget(time_budget_s)
        self._time_limit_s = time_limit_s
        self._snapshot: str | None = None
        try:
            if notify is not None:
                notify("starting PyTorch")
            self.place: Place = self.launcher.describe()
            self.path = None if records is None else os.path.join(records, file_of(self.place.card.name))
            known = read_measurements(self.path) if self.path is not None else None
        except BaseException:
            self.launcher.close()
            raise
        self.bad_lines = () if known is None else known.bad_lines
        self.session = Session(
            self.place,
            self._measure,
            known=() if known is None else known.measurements,
            save=self._save if self.path is not None else None,
            budget=self._budget,
            again=again or ranks[1] > 1,
            notify=notify,
        )

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.launcher.close()

    def _measure(self, trial: Trial) -> Measurement:
        self.launcher.time_limit_s = min(self._time_limit_s, self._budget.left_s)
        return self.launcher.measure(trial, snapshot=self._snapshot)

    def _save(self, measurement: Measurement) -> None:
        assert self.path is not None
        append_measurement(self.path, measurement)

    # -- questions -----------------------------------------------------------------------------------------------------

    def gpu(self, trial: Trial) -> GpuSpec | None:
        """The card of a trial, capped where it is."""
        return gpu_of(self.place.card, trial.limit_bytes, trial.limit)

    def run(self, trial: Trial, *, snapshot: str | None = None) -> Measurement | None:
        """One trial; None where there was no time. `snapshot`: the file for the allocator's history."""
        self._snapshot = None if snapshot is None else os.path.abspath(snapshot)
        return self.session.run(trial)

    def find_max(self, trial: Trial) -> Largest:
        """The largest micro-batch that survives, beginning with what the formula says.

        Raises:
            UsageError: the device has no limit.
        """
        gpu = self.gpu(trial)
        if gpu is None:
            raise UsageError("On a CPU nothing runs out of memory in a way that says something.", "Use a CUDA device.")
        return self.session.find_max(trial, largest_predicted(trial, gpu))

    def decide(self, trial: Trial, target_batch: int, *, checkpointing: str | None = None) -> Decision:
        """Put the plan for a batch to the test: does it fit, and does the next larger micro-batch fail?

        Raises:
            UsageError: the device is no card.
            MemplanError: there is no plan for this model.
        """
        gpu = self.gpu(trial)
        if gpu is None:
            raise UsageError("A plan is for a card.", "Use a CUDA device.")
        setup = plan_of(trial, gpu, target_batch, checkpointing=checkpointing)
        if setup is None:
            return Decision(target_batch, None, None)
        plan = replace(trial, setup=setup, target_batch=target_batch, role="plan")
        larger = next_larger(setup, target_batch)
        return Decision(
            target_batch,
            self.session.run(plan),
            None if larger is None else self.session.run(replace(plan, setup=larger, role="larger")),
        )

    def run_entry(self, entry: MatrixEntry) -> Outcome:
        """One entry of a matrix."""
        trial = make_trial(**entry.choices)
        if entry.find_max:
            return Outcome(trial, self.find_max(trial))
        if entry.target_batch is not None:
            checkpointing = entry.choices.get("checkpointing")
            return Outcome(trial, self.decide(trial, entry.target_batch, checkpointing=checkpointing))
        return Outcome(trial, self.run(trial))


def plan_of(trial: Trial, gpu: GpuSpec, target_batch: int, *, checkpointing: str | None) -> Setup | None:
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
        headroom_percent=api.DEFAULT_HEADROOM_PERCENT,
        activation_checkpointing=checkpointing,
    )
    speed = api.find_speed(gpu)
    architecture = read_architecture(dict(trial.config), trial.model, dropout=trial.setup.dropout)
    best = search(Estimator(architecture, trial.model, gpu, speed), goal, gpu, speed.label).best
    return None if best is None else best.setup


def next_larger(setup: Setup, target_batch: int) -> Setup | None:
    """The next micro-batch above that reaches the same batch; None where there is none."""
    each = target_batch // setup.data_parallel_size
    above = [micro for micro in divisors(each) if micro > setup.micro_batch_size]
    if not above:
        return None
    return replace(setup, micro_batch_size=above[0], gradient_accumulation_steps=each // above[0])


def probe(
    model: str | os.PathLike[str] | None = None,
    *,
    limit: str | None = None,
    device: str = "cuda",
    records: str | None = None,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    **choices: Any,
) -> Measurement:
    """Measure one configuration with real training steps, in a process of its own.

    Everything is named as for `make_trial`, `device`, `records` and `time_limit_s` as for `Probe`.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: there is no such device, or the model cannot be found.
    """
    trial = make_trial(model, limit=limit, **choices)
    with Probe(device=device, records=records, time_limit_s=time_limit_s, again=True) as probing:
        found = probing.run(trial)
    assert found is not None
    return found


def default_records() -> str:
    """The folder that measurements are kept in."""
    return records_path(os.environ)


# -- answers -----------------------------------------------------------------------------------------------------------


def prediction_for(found: Measurement) -> Prediction:
    """What the formula says of a measured trial."""
    trial = found.trial
    try:
        estimate = predict(trial, gpu_of(found.card, trial.limit_bytes, trial.limit))
    except MemplanError as fault:
        return Prediction(reason=fault.cause)
    return prediction_of(estimate, found.card.device)


def assumed_context_bytes(gpu: GpuSpec | None) -> int:
    """Bytes of a context where the driver says nothing."""
    return context_bytes(gpu)


def trials_document(probing: Probe, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What came of several trials and searches, as plain data."""
    session = probing.session
    failed = [one for one in session.measured if one.survived is None]
    return {
        **envelope("probes"),
        "card": {**probing.place.card._asdict(), "clocks": dict(probing.place.card.clocks)},
        "versions": dict(probing.place.versions),
        "records": probing.path,
        "num_measured": len(session.measured),
        "num_known": session.num_known,
        "num_left": session.num_left,
        "num_failed": len(failed),
        "largest": [_largest(probing, trial, found) for trial, found in outcomes if isinstance(found, Largest)],
        "decisions": [_decision(trial, found) for trial, found in outcomes if isinstance(found, Decision)],
        "trials": [trial_row(one, prediction_for(one)) for one in session.seen],
    }


def _largest(probing: Probe, trial: Trial, found: Largest) -> dict[str, Any]:
    gpu = probing.gpu(trial)
    assert gpu is not None
    words = describe(trial).split(", ", 2)
    return {
        "trial": f"{words[0]}, {trial.setup.seq_len:,} tokens, {words[2]}",
        "limit_bytes": trial.limit_bytes,
        "predicted": largest_predicted(trial, gpu),
        "micro_batch_size": found.micro_batch_size,
        "complete": found.complete,
        "tried": [list(one) for one in found.tried],
    }


def _decision(trial: Trial, found: Decision) -> dict[str, Any]:
    def row(one: Measurement | None) -> dict[str, Any] | None:
        if one is None:
            return None
        setup = one.trial.setup
        return {
            "micro_batch_size": setup.micro_batch_size,
            "gradient_accumulation_steps": setup.gradient_accumulation_steps,
            "activation_checkpointing": setup.activation_checkpointing,
            "outcome": one.outcome,
        }

    words = describe(trial).split(", ", 2)
    return {
        "trial": f"{words[0]}, batch {found.target_batch} of {trial.setup.seq_len:,}, {words[2]}",
        "target_batch": found.target_batch,
        "limit_bytes": trial.limit_bytes,
        "plan": row(found.plan),
        "larger": row(found.larger),
    }
