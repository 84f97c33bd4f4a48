"""Trials on a device of this machine: one, a search for the largest micro-batch, a plan put to the test, a matrix."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memplan.catalog.measurements import (
    NotWrittenError,
    append_measurement,
    check_appendable,
    file_of,
    read_measurements,
    records_path,
)
from memplan.errors import MemplanError, UsageError
from memplan.estimation.estimate import context_bytes
from memplan.measuring.trials import gpu_of, largest_predicted, make_trial, next_larger, plan_of, prediction_for
from memplan.probes.launch import Launcher, Place
from memplan.probes.session import Budget, Largest, Session
from memplan.report.document import envelope
from memplan.report.probe import trial_row
from memplan.specs.measurement import Measurement, Trial, describe
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from memplan.catalog.matrix import MatrixEntry
    from memplan.specs.gpu import GpuSpec

    Notify = Callable[[str], None]

DEFAULT_TIME_LIMIT_S = 600.0
"""Seconds after which a trial is given up."""


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
    """None: there was no time, or it cannot be asked."""
    reason: str = ""
    """Why it cannot be asked."""


def torchrun_ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, number of ranks) of this process: torchrun says it in the environment.

    Raises:
        UsageError: what it says makes no sense.
    """
    texts = environment.get("RANK"), environment.get("WORLD_SIZE")
    if None in texts:
        return 0, 1
    rank, size = (int(text) if text and text.isdigit() else -1 for text in texts)
    hosted = all(environment.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not 0 <= rank < size or (size > 1 and not hosted):
        raise UsageError(
            f"RANK={texts[0]} and WORLD_SIZE={texts[1]} make no sense here.",
            "Start ranks with torchrun, or unset both.",
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
            if self.path is not None:
                check_appendable(self.path)
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
        best = plan_of(trial, gpu, target_batch, checkpointing=checkpointing)
        if best is None:
            return Decision(target_batch, None, None)
        conf = best.memory.alloc_conf
        plan = replace(trial, setup=best.setup, target_batch=target_batch, role="plan", alloc_conf=conf)
        larger = next_larger(best.setup, target_batch)
        return Decision(
            target_batch,
            self.session.run(plan),
            None if larger is None else self.session.run(replace(plan, setup=larger, role="larger")),
        )

    def run_all(self, entries: Sequence[MatrixEntry]) -> list[Outcome]:
        """All entries of a matrix, in their order; of several one that cannot be asked has its reason as its outcome.

        Raises:
            MemplanError: an entry makes no sense, before anything is measured; the only one cannot be asked; a record
                cannot be written.
        """
        trials = [_named(entry, number, len(entries)) for number, entry in enumerate(entries, 1)]
        outcomes = []
        for number, (entry, trial) in enumerate(zip(entries, trials, strict=True), 1):
            self.session.position = f"{number}/{len(entries)}" if len(entries) > 1 else ""
            try:
                outcomes.append(self._run_entry(entry, trial))
            except NotWrittenError:
                raise
            except MemplanError as fault:
                if len(entries) == 1:
                    raise
                outcomes.append(Outcome(trial, None, f"{fault.cause} {fault.cure}".strip()))
        return outcomes

    def _run_entry(self, entry: MatrixEntry, trial: Trial) -> Outcome:
        if entry.find_max:
            return Outcome(trial, self.find_max(trial))
        if entry.target_batch is not None:
            checkpointing = entry.choices.get("checkpointing")
            return Outcome(trial, self.decide(trial, entry.target_batch, checkpointing=checkpointing))
        return Outcome(trial, self.run(trial))


def _named(entry: MatrixEntry, number: int, num: int) -> Trial:
    """The trial of an entry; a fault says which of several it is."""
    try:
        return make_trial(**entry.choices)
    except MemplanError as fault:
        if num == 1:
            raise
        named = f"Trial {number} of {num}, {entry.choices.get('model')}: {fault.cause}"
        raise type(fault)(named, fault.cure) from fault


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
        "failed": [{"trial": describe(one.trial), "reason": f"{one.outcome}: {one.message}"} for one in failed],
        "not_asked": [{"trial": describe(one.trial), "reason": one.reason} for one in outcomes if one.reason],
        "largest": [_largest(probing, trial, found) for trial, found, _ in outcomes if isinstance(found, Largest)],
        "decisions": [_decision(trial, found) for trial, found, _ in outcomes if isinstance(found, Decision)],
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
