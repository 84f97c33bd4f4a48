"""`memplan probe`: real training steps on a device of this machine, against what the formula says."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import click

from memplan import measuring
from memplan.catalog.matrix import MatrixEntry, named_matrices, read_matrix
from memplan.catalog.measurements import NotWrittenError
from memplan.cli.options import Option, SetupCommand, Value, output_options
from memplan.cli.output import DOES_NOT_FIT, say, write_answer
from memplan.cli.progress import Progress
from memplan.cli.values import BATCH, MODEL, SETUP_ROWS, TRAINED, TRAINING, Row, one_of, read_text
from memplan.errors import MemplanError, UsageError
from memplan.report.probe import probe_document, render_probe, render_trials
from memplan.specs.measurement import DONE, OUT_OF_MEMORY
from memplan.specs.values import NamedTuple
from memplan.units import format_bytes, parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from memplan.measuring import Probe
    from memplan.report.ansi import Line
    from memplan.specs.measurement import Measurement, Trial

PROBE = "The probe"
DEVICES = ("cuda", "cpu")


def _read_duration(text: str, flag: str) -> float:
    try:
        return parse_duration(text)
    except UsageError as fault:
        raise UsageError(f"{flag}: {fault.cause}", fault.cure) from None


OWN_ROWS = (
    Row(("--limit",), PROBE, "What the process may take: a size (24GB) or a card (rtx4090).", read_text, "GPU"),
    Row(("--find-max",), PROBE, "Bisect to the largest micro-batch that survives."),
    Row(("--matrix",), PROBE, f"A grid of trials in TOML: FILE, or {', '.join(named_matrices())}.", read_text, "FILE"),
    Row(("--time-budget",), PROBE, "Stop after this time, such as 8m (when all is done).", _read_duration, "TIME"),
    Row(("--time-limit",), PROBE, "Give a trial up after this time (10m).", _read_duration, "TIME"),
    Row(("--again",), PROBE, "Measure what is known already, too."),
    Row(("--records",), PROBE, "Folder that measurements are appended to; - is none, as for cpu.", read_text, "FOLDER"),
    Row(("--snapshot",), PROBE, "Write the allocator's history, for pytorch.org/memory_viz.", read_text, "FILE"),
    Row(("--device",), PROBE, "cpu counts the bytes of tensors, without a GPU (cuda).", one_of(DEVICES), "cuda|cpu"),
)
SETUP = [
    row
    for row in SETUP_ROWS
    if row.section in {BATCH, TRAINING, TRAINED} and not row.hidden and row.flag != "--target-tokens"
]


class Asked(NamedTuple):
    """What the user gave beside model and setup."""

    model: str | None
    limit: str | None
    find_max: bool
    matrix: str | None
    time_budget: float | None
    time_limit: float | None
    again: bool
    records: str | None
    snapshot: str | None
    device: str | None
    target_batch: int | None
    format: str
    output: str | None
    quiet: bool
    traceback: bool


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = output_options(command)
    for row in reversed([*OWN_ROWS, *SETUP]):
        settings: dict[str, Any] = {"is_flag": True}
        if row.read is not None:
            settings = {"type": Value(row), "metavar": row.metavar}
        command = click.option(*row.names, cls=Option, section=row.section, help=row.help, **settings)(command)
    return click.argument(MODEL.field, required=False, type=Value(MODEL), metavar=MODEL.metavar)(command)


@click.command(cls=SetupCommand, short_help="the same bytes and the step time, measured on a GPU")
@_options
def probe(**given: Any) -> int:
    """Measure one configuration, or a grid of them, with real training steps on random tokens.

    Each trial runs in a process of its own, and running out of memory is one of its outcomes. With --limit a large
    card stands in for a smaller one; with --target-batch and --limit the plan for that batch is put to the test: does
    it fit, and does the next larger micro-batch fail?

    MODEL is a name that `memplan models` lists, a config.json, a folder holding one, or a hub id. For several ranks:
    torchrun --nproc-per-node 2 -m memplan probe MODEL
    """
    asked = Asked(**{name: given.pop(name) for name in Asked._fields})
    choices = {name: value for name, value in given.items() if value is not None and value is not False}
    return answer(asked, choices)


def answer(asked: Asked, choices: dict[str, Any]) -> int:
    """Measure, print what was found; the exit status."""
    ranks = measuring.torchrun_ranks(os.environ)
    _check_device(asked)
    entries = _entries(asked, choices, ranks[1])
    trial = None
    if asked.matrix is None:
        trial = measuring.make_trial(asked.model, limit=asked.limit, data_parallel_size=ranks[1], **choices)
    quiet = asked.quiet or ranks[0] > 0
    records = _records(asked)
    with _ending_on_sigterm(), Progress(shown=not quiet) as progress:
        probing = measuring.Probe(
            device=asked.device or "cuda",
            records=records,
            time_limit_s=asked.time_limit or measuring.DEFAULT_TIME_LIMIT_S,
            time_budget_s=asked.time_budget,
            again=asked.again or entries is None,
            notify=progress.say or _line_by_line(entries, quiet=quiet),
            ranks=ranks,
        )
        with probing:
            _say_bad_lines(probing, quiet=quiet)
            _say_others(probing, quiet=quiet)
            if entries is None:
                assert trial is not None
                return _run_one(trial, probing, asked, ranks[0])
            try:
                outcomes = probing.run_all(entries)
            except KeyboardInterrupt:
                _say_kept(probing, quiet=quiet)
                raise
            document = measuring.trials_document(probing, outcomes)
    return _write_several(document, asked)


def _line_by_line(entries: tuple[MatrixEntry, ...] | None, *, quiet: bool) -> Callable[[str], None] | None:
    """Where nobody sits at a terminal, a line of the log for each of many trials."""
    if quiet or entries is None:
        return None
    return lambda text: say(text, quiet=False)


def _entries(asked: Asked, choices: dict[str, Any], world_size: int) -> tuple[MatrixEntry, ...] | None:
    """What is to be measured, None for a single trial.

    Raises:
        UsageError: two ways of saying it contradict each other.
    """
    several = [flag for flag, on in (("--matrix", asked.matrix), ("--find-max", asked.find_max)) if on]
    several += ["--target-batch"] if asked.target_batch is not None else []
    if len(several) > 1:
        raise UsageError(f"{' and '.join(several)} contradict each other.", "Leave one of them out.")
    if several and world_size > 1:
        raise UsageError(f"{several[0]} is for one rank.", "Under torchrun, measure one configuration at a time.")
    if several and asked.snapshot is not None:
        raise UsageError(f"--snapshot is of one trial, and {several[0]} runs several.", "Leave one of them out.")
    if asked.matrix is not None:
        given = [*(["MODEL"] if asked.model else []), *(["--limit"] if asked.limit else []), *choices]
        if given:
            name = given[0] if given[0][:1] in "M-" else f"--{given[0].replace('_', '-')}"
            raise UsageError(f"{name} and --matrix contradict each other.", "The file says what is measured.")
        return read_matrix(asked.matrix)
    if not several:
        return None
    if asked.target_batch is not None and asked.limit is None:
        raise UsageError("--target-batch has no --limit to plan for.", "Say for example --limit 24GB.")
    limit = {} if asked.limit is None else {"limit": asked.limit}
    fixed = {"micro_batch", "accumulation"} & set(choices) if asked.target_batch is not None else set()
    if fixed:
        name = sorted(fixed)[0].replace("_", "-")
        raise UsageError(f"--{name} and --target-batch contradict each other.", "The plan chooses it.")
    return (MatrixEntry({"model": asked.model, **choices, **limit}, asked.find_max, asked.target_batch),)


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let a polite request to end clean up as an interrupt does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    polite = [one for one in known if signal.getsignal(one) not in {signal.SIG_IGN, None}]  # nohup ignores one
    try:
        before = {one: signal.signal(one, interrupt) for one in polite}
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _run_one(trial: Trial, probing: Probe, asked: Asked, rank: int) -> int:
    """Measure one trial and show it, also where its record cannot be written."""
    try:
        found = probing.run(trial, snapshot=asked.snapshot)
    except NotWrittenError:
        _write_one(probing.session.measured[-1], probing, asked, rank)
        raise
    if found is None:
        raise MemplanError("The time was over before the trial was done.", "Give it a longer --time-budget.")
    return _write_one(found, probing, asked, rank)


def _say_kept(probing: Probe, *, quiet: bool) -> None:
    num = len(probing.session.measured)
    if probing.path is not None:
        say(f"{num} measured and kept in {probing.path}; the same command goes on from there", quiet=quiet)


def _check_device(asked: Asked) -> None:
    """Raise `UsageError` for what a CPU has not, and for a snapshot that could not be written."""
    if asked.device == "cpu":
        wants = (("--limit", asked.limit), ("--snapshot", asked.snapshot), ("--target-batch", asked.target_batch))
        flag = next((flag for flag, value in (*wants, ("--find-max", asked.find_max)) if value), None)
        if flag is not None:
            raise UsageError(f"{flag} is for a GPU, and --device is cpu.", "Leave one of them out.")
    if asked.snapshot is not None:
        if asked.records not in {None, "-"}:
            raise UsageError("Steps with --snapshot are slower and are not recorded.", "Leave --records out.")
        if measuring.torchrun_ranks(os.environ)[1] > 1:
            raise UsageError("--snapshot is of one rank.", "Leave it out under torchrun.")
        folder = os.path.dirname(os.path.abspath(asked.snapshot))
        if asked.snapshot == "-":
            raise UsageError("--snapshot writes a pickle, which is not for the screen.", "Name a file.")
        if os.path.isdir(asked.snapshot) or not os.access(folder, os.W_OK):
            raise UsageError(f"No snapshot could be written to {asked.snapshot}.", "Name a file in a folder of yours.")


def _records(asked: Asked) -> str | None:
    """Where measurements are appended to.

    Those of a CPU, which say nothing about a card, only where asked for; steps whose history is recorded take longer
    and are no measurement.
    """
    if asked.snapshot is not None:
        return None
    if asked.records is not None:
        return None if asked.records == "-" else asked.records
    return None if asked.device == "cpu" else measuring.default_records()


def _say_bad_lines(probing: Probe, *, quiet: bool) -> None:
    for line in probing.bad_lines:
        say(f"{line.path}, line {line.number} is passed over: {line.reason}", quiet=quiet)


def _say_others(probing: Probe, *, quiet: bool) -> None:
    card = probing.place.card
    if card.device == "cuda" and not card.driver:
        unknown = "process bytes, clocks and who else is on the card are not known"
        say(f"NVIDIA's management library does not answer (pip install nvidia-ml-py): {unknown}", quiet=quiet)
    if card.num_other_processes:
        taken = "" if card.other_bytes is None else f", which take {format_bytes(card.other_bytes)}"
        others = "another process is" if card.num_other_processes == 1 else f"{card.num_other_processes} others are"
        say(f"{others} on {card.name}{taken}: times are not its own, and less of it can be filled", quiet=quiet)


def _write_one(found: Measurement, probing: Probe, asked: Asked, rank: int) -> int:
    gpu = probing.gpu(found.trial)
    document = probe_document(
        found,
        measuring.prediction_for(found),
        gpu,
        context_bytes=measuring.assumed_context_bytes(gpu),
        records=probing.path,
    )
    if rank == 0:

        def lines() -> Sequence[Line]:
            return render_probe(document, quiet=asked.quiet)

        rows = [{"name": one["name"], "allocated_bytes": one["allocated_bytes"]} for one in document["instants"]]
        write_answer(
            document,
            format=asked.format,
            output=asked.output,
            quiet=asked.quiet,
            lines=lines,
            records=lambda: rows,
        )
    if found.outcome == OUT_OF_MEMORY:
        return DOES_NOT_FIT
    if found.outcome != DONE:
        raise MemplanError(f"The trial has no answer ({found.outcome}): {found.message}", _cure(found))
    return 0


def _cure(found: Measurement) -> str:
    if found.outcome == "timed-out":
        return "Give it more time with --time-limit, or measure something smaller."
    return "See the answer for what was read before."


def _write_several(document: dict[str, Any], asked: Asked) -> int:
    write_answer(
        document,
        format=asked.format,
        output=asked.output,
        quiet=asked.quiet,
        lines=lambda: render_trials(document, quiet=asked.quiet),
        records=lambda: [{**row.pop("setup"), **row} for row in (dict(one) for one in document["trials"])],
    )
    answered = len(document["trials"]) - document["num_failed"]
    if not answered and (document["failed"] or document["not_asked"]):
        return MemplanError.exit_status
    if asked.matrix is not None or document["num_left"]:
        return 0
    largest, decisions = document["largest"], document["decisions"]
    failed = any(one["complete"] and one["micro_batch_size"] is None for one in largest)
    failed = failed or any(one["plan"] is None or one["plan"]["outcome"] == OUT_OF_MEMORY for one in decisions)
    if failed:
        return DOES_NOT_FIT
    return MemplanError.exit_status if document["failed"] else 0
