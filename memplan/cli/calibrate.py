"""`memplan calibrate`: measurements to coefficients and error bounds for a card."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from memplan import measuring
from memplan.catalog.calibrations import calibration_record, writable_folder, write_calibration
from memplan.cli.options import Option, SetupCommand, output_options
from memplan.cli.output import say, write_answer
from memplan.cli.progress import Progress
from memplan.errors import UsageError
from memplan.report.calibration import calibrations_document, render_calibrations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.report.ansi import Line

SECTION = "What is learnt"


@click.command(cls=SetupCommand, short_help="measurements to coefficients and error bounds")
@click.option("--gpu", cls=Option, section=SECTION, metavar="NAME", help="Of this card alone, such as h200.")
@click.option("--records", cls=Option, section=SECTION, metavar="PATH", help="A folder or file of measurements.")
@click.option("--folder", cls=Option, section=SECTION, metavar="FOLDER", help="Where calibrations are written to.")
@click.option("--dry-run", cls=Option, section=SECTION, is_flag=True, help="Write nothing.")
@output_options
def calibrate(
    gpu: str | None,
    records: str | None,
    folder: str | None,
    dry_run: bool,
    format: str,  # noqa: A002 -- the option's name
    output: str | None,
    quiet: bool,
    traceback: bool,
) -> int:
    """Learn from the measurements of a card: context, workspaces, real speed, and how wrong memplan was.

    With a calibration `--confidence 0.99` means that 99 % of comparable runs stay under the upper bound. Half of the
    records, chosen by a hash, give the coefficients, and the errors on the other half the bound (split-conformal).
    """
    if folder is not None and not folder.strip():
        raise UsageError("--folder is empty.", "Name a folder, or leave it out.")
    if records is not None and not os.path.exists(records):
        raise UsageError(f"There is nothing at {records}.", "Name a folder or a file of measurements.")
    with Progress(shown=not quiet) as progress:
        learnt = measuring.calibrate(records, gpu=gpu, notify=progress.say)
    place = folder or writable_folder(os.environ)
    paths = [None if dry_run else write_calibration(place, one) for one in learnt]
    document = calibrations_document([calibration_record(one) for one in learnt], paths)

    def lines() -> Sequence[Line]:
        return render_calibrations(document, quiet=quiet)

    rows = [
        {name: value for name, value in one.items() if not isinstance(value, (list, dict))}
        for one in document["calibrations"]
    ]
    write_answer(document, format=format, output=output, quiet=quiet, lines=lines, records=lambda: rows)
    if dry_run:
        say("nothing was written", quiet=quiet)
    return 0
