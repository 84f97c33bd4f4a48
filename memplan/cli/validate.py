"""`memplan validate`: predicted against measured, over all records and all published measurements."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from memplan import measuring
from memplan.catalog.profiles import PACKAGE_FOLDER
from memplan.cli.options import Option, SetupCommand, output_options
from memplan.cli.output import say, write_answer, write_file
from memplan.cli.progress import Progress
from memplan.errors import UsageError
from memplan.report.accuracy import accuracy_markdown, render_accuracy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.report.ansi import Line

SECTION = "What is compared"


@click.command(cls=SetupCommand, short_help="predicted against measured")
@click.option("--records", cls=Option, section=SECTION, metavar="PATH", help="A folder or file of measurements.")
@click.option("--trace", cls=Option, section=SECTION, is_flag=True, help="Predict by running the real modules.")
@click.option(
    "--calibrated",
    cls=Option,
    section=SECTION,
    is_flag=True,
    help="Use the calibration of each card, on records that have no part in it.",
)
@click.option(
    "--device",
    cls=Option,
    section=SECTION,
    type=click.Choice(["cuda", "cpu"]),
    help="Only what was measured on cards, or on CPUs.",
)
@click.option(
    "--html",
    cls=Option,
    section=SECTION,
    metavar="FILE",
    help="Where the page with the scatter is written to; in a checkout reports/accuracy.html, - is nowhere.",
)
@output_options
def validate(
    records: str | None,
    trace: bool,
    calibrated: bool,
    device: str | None,
    html: str | None,
    format: str,  # noqa: A002 -- the option's name
    output: str | None,
    quiet: bool,
    traceback: bool,
) -> int:
    """Compare what memplan predicts with every measurement there is: signed errors, and whether the plans were right.

    Measurements are those of `memplan probe`, and peaks that others published. Errors are (predicted - measured) /
    measured: below zero too little was predicted.
    """
    if records is not None and not os.path.exists(records):
        raise UsageError(f"There is nothing at {records}.", "Name a folder or a file of measurements.")
    with Progress(shown=not quiet) as progress:
        found = measuring.validate(records, trace=trace, calibrated=calibrated, device=device, notify=progress.say)
    document = measuring.accuracy_document(found)
    for line in document["bad_lines"]:
        say(f"{line['path']}, line {line['number']} is passed over: {line['reason']}", quiet=quiet)
    plain = records is None and device is None and not (trace or calibrated)
    page = _default_page() if html is None and plain else html
    if page not in {None, "-"}:
        from memplan.report.pages.accuracy import render_accuracy_page

        write_file(str(page), render_accuracy_page(document), flag="--html")
        say(f"page written to {page}", quiet=quiet)

    def lines() -> Sequence[Line]:
        return render_accuracy(document, quiet=quiet)

    _write(document, lines, format=format, output=output, quiet=quiet)
    return 0


def _default_page() -> str | None:
    """The page of a checkout in which the program is run; None elsewhere."""
    page = os.path.join("reports", "accuracy.html")
    same = os.path.abspath(os.curdir) == os.path.dirname(PACKAGE_FOLDER)
    return page if same and os.path.isdir("reports") else None


def _write(document: dict[str, Any], lines: Any, *, format: str, output: str | None, quiet: bool) -> None:  # noqa: A002
    if format == "markdown":
        from memplan.report.ansi import Line

        text = accuracy_markdown(document)
        write_answer(
            document,
            format="text",
            output=output,
            quiet=quiet,
            lines=lambda: [Line(line) for line in text.rstrip("\n").split("\n")],
            records=list,
        )
        return
    write_answer(document, format=format, output=output, quiet=quiet, lines=lines, records=lambda: document["points"])
