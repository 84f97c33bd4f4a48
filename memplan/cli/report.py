"""`memplan report`: a plan as one page that needs no network and no JavaScript to be read."""

from __future__ import annotations

import os
import webbrowser
from typing import Any

import click

from memplan import studies
from memplan.cli.command_line import command_line
from memplan.cli.options import SetupCommand, options_of
from memplan.cli.output import DOES_NOT_FIT, say, write_file
from memplan.cli.progress import Progress
from memplan.cli.suggest import cards_of, check_plannable
from memplan.cli.values import OUTPUT, SETUP_ROWS, Options, Row
from memplan.report.document import plan_document
from memplan.report.study import study_document

DEFAULT_PAGE = "memplan-report.html"
OF_ANSWERS = ("--json", "--format")
"""Options of commands that print; a report is a page."""

REPORT_ROWS = (
    *(row for row in SETUP_ROWS if row.flag not in OF_ANSWERS),
    Row(("--open",), OUTPUT, "Show the page in a browser."),
)


@click.command(cls=SetupCommand, short_help="a plan as one page, with charts")
@options_of(REPORT_ROWS)
def report(**given: Any) -> int:
    """Plan as `memplan suggest` does, and write the answer as one HTML page: charts, tables, prices, assumptions.

    The page needs no network, no JavaScript and no other file. It goes to --output, or memplan-report.html.
    """
    shown = given.pop("open")
    return answer(Options(**given), shown=bool(shown))


def answer(options: Options, *, shown: bool) -> int:
    """Write the page; the exit status."""
    gpu = check_plannable(options)
    with Progress(shown=not options.quiet) as progress:
        found = studies.study(options.model, gpu=gpu, notify=progress.say, **options.choices())
        if progress.say is not None:
            progress.say("drawing the page")
        document = study_document(
            plan_document(found.plan, origin=found.origin, cards=cards_of(found.plan)),
            found.plan.estimate,
            command_line("suggest", options),
            found.profile,
        )
        from memplan.report.pages.plan import render_plan_page

        page = options.output or DEFAULT_PAGE
        write_file(page, render_plan_page(document), flag="--output")
    say(f"page written to {page}", quiet=options.quiet)
    if shown:
        webbrowser.open(f"file://{os.path.abspath(page)}")
    return DOES_NOT_FIT if found.plan.best is None else 0
