"""`memplan sweep`: a table over micro-batches and lengths, and which of them fit."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

import click

from memplan import api
from memplan.cli.axes import read_axis
from memplan.cli.options import SetupCommand, options_of
from memplan.cli.output import DOES_NOT_FIT, say, say_bound, say_every, write_answer, write_file
from memplan.cli.progress import Progress
from memplan.cli.values import BATCH, FORMATS, OUTPUT, SETUP_ROWS, Options, Row, one_of
from memplan.errors import MemplanError, UsageError
from memplan.specs.choices import dropout_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.estimation.sweep import Sweep

SWEEP_FORMATS = (*FORMATS, "parquet")


def _refuse_target(text: str, flag: str) -> NoReturn:
    raise UsageError(
        f"{flag} says how large a step is, and a sweep goes over micro-batches.",
        "Say --accumulation N, or ask memplan suggest for the plan that reaches a target.",
    )


OWN_ROWS = (
    Row(("--target-batch",), BATCH, "", _refuse_target, "N", hidden=True),
    Row(("--target-tokens",), BATCH, "", _refuse_target, "N", hidden=True),
    Row(("--micro-batch",), BATCH, "Sequences in one forward pass on one GPU (1..64x2).", read_axis, "RANGE"),
    Row(("--seq-len",), BATCH, "Tokens per sequence (512..8192x2, or what the model has).", read_axis, "RANGE"),
    Row(
        ("--format",),
        OUTPUT,
        "text is for people; parquet needs pyarrow and --output FILE.",
        one_of(SWEEP_FORMATS),
        "|".join(SWEEP_FORMATS),
        SWEEP_FORMATS,
    ),
)
"""Those that are not as for `estimate`."""

_OWN_ROW_BY_FLAG = {row.flag: row for row in OWN_ROWS}
SWEEP_ROWS = tuple(_OWN_ROW_BY_FLAG.get(row.flag, row) for row in SETUP_ROWS)


@click.command(cls=SetupCommand, short_help="a table over micro-batches and lengths, and which of them fit")
@options_of(SWEEP_ROWS)
def sweep(micro_batch: Sequence[int] | None, seq_len: Sequence[int] | None, **given: Any) -> int:
    """Show the bytes of every pair of a micro-batch and a length, and with --gpu which fit, and the largest that do.

    RANGE is a number, a list (1,2,4), a range (1..64), a range that doubles (1..64x2) or one in steps
    (512..4096+512), or several with commas between them. All points are written by --format csv, markdown and parquet
    and by --json; on the screen are up to 16 micro-batches and 8 lengths of them.

    The bytes of the table are the least that the caching allocator can hold. Runs at the boundary are replayed through
    it, at 8 lengths or 9: a point is tight (~) where the least fits, and the run as replayed does not or was not.

    MODEL is a name that `memplan models` lists, a config.json, a folder holding one, or a hub id.
    """
    return answer(Options(**given), micro_batch, seq_len)


def answer(options: Options, micro_batches: Sequence[int] | None, seq_lens: Sequence[int] | None) -> int:
    """Print the table; the exit status."""
    _check_output(options)
    say_bound(options)
    for name in ("headroom", "reserve"):
        if getattr(options, name) is not None and options.gpu is None:
            say(f"--{name} has no effect without --gpu", quiet=options.quiet)
    dropout, objective = dropout_of(options.choices()), options.objective or "lm"
    model = api.find_model(options.model, dropout=dropout, objective=objective)
    if isinstance(model, api.Model):
        say_every(options.checkpointing, len(model.architecture.layers), quiet=options.quiet)
    with Progress(shown=not options.quiet) as progress:
        found = api.sweep(
            model,
            micro_batches=micro_batches,
            seq_lens=seq_lens,
            gpu=options.gpu,
            notify=progress.say,
            **options.choices(),
        )
    _write(found, options, model.origin)
    skipped = sum(not one.is_replayed for one in found.largest)
    if skipped and options.format not in {"text", "html"}:
        replayed = len(found.largest) - skipped
        say(
            f"{replayed} of {len(found.largest)} lengths were replayed: at the others tight is also what fits at the "
            "least and more than fits at the next longer one of them",
            quiet=options.quiet,
        )
    return DOES_NOT_FIT if found.fits is False else 0


def _check_output(options: Options) -> None:
    """Raise before anything is worked out that could not be written."""
    if options.format != "parquet":
        return
    if options.output in {None, "-"}:
        raise UsageError("--format parquet is not for the screen.", "Name a file, with --output FILE.")
    if find_spec("pyarrow") is None:
        raise MemplanError(
            "--format parquet needs pyarrow, which is not installed.",
            "Install it with pip install 'memplan[parquet]', or say --format csv.",
        )


def _write(found: Sweep, options: Options, origin: str) -> None:
    if options.format == "parquet":
        from memplan.report.tables import render_parquet

        assert options.output is not None
        write_file(options.output, render_parquet(found.to_pandas()))
        say(f"written to {options.output}", quiet=options.quiet)
        return
    from memplan.report.sweep import render_sweep, sweep_document

    document = sweep_document(found, origin=origin)
    write_answer(
        document,
        format=options.format,
        output=options.output,
        quiet=options.quiet,
        lines=lambda: render_sweep(document, quiet=options.quiet),
        records=found.records,
    )
