"""`memplan report`: a plan as one page that needs no network and no JavaScript to be read."""

from __future__ import annotations

import os
import webbrowser
from typing import TYPE_CHECKING, Any

import click

from memplan import studies
from memplan.cli.command_line import command_line
from memplan.cli.options import SetupCommand, options_of
from memplan.cli.output import DOES_NOT_FIT, say, write_file
from memplan.cli.progress import Progress
from memplan.cli.suggest import cards_of, check_plannable
from memplan.cli.values import OUTPUT, SETUP_ROWS, Options, Row, one_of
from memplan.report.beside import CHART_NAMES
from memplan.report.document import plan_document
from memplan.report.study import study_document

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULT_PAGE = "memplan-report.html"
OF_ANSWERS = ("--json", "--format")
"""Options of commands that print; a report is a page."""

REPORT_ROWS = (
    *(row for row in SETUP_ROWS if row.flag not in OF_ANSWERS),
    Row(("--open",), OUTPUT, "Show the page in a browser."),
    Row(
        ("--chart",),
        OUTPUT,
        f"One chart instead, as the .png or .svg file --output: {', '.join(CHART_NAMES)}.",
        one_of(CHART_NAMES),
        "NAME",
        CHART_NAMES,
    ),
)


@click.command(cls=SetupCommand, short_help="a plan as one page, with charts")
@options_of(REPORT_ROWS)
def report(**given: Any) -> int:
    """Plan as `memplan suggest` does, and write the answer as one HTML page: charts, tables, prices, assumptions.

    The page needs no network, no JavaScript and no other file. It goes to --output, or memplan-report.html. With
    --chart one of its charts goes to a file of its own.
    """
    shown, chart = given.pop("open"), given.pop("chart")
    return answer(Options(**given), shown=bool(shown), chart=chart)


def answer(options: Options, *, shown: bool, chart: str | None = None) -> int:
    """Write the page, or the chart of this name; the exit status."""
    gpu = check_plannable(options)
    path = options.output or (DEFAULT_PAGE if chart is None else f"memplan-{chart}.svg")
    draw = _page if chart is None else _drawing(chart, path)
    with Progress(shown=not options.quiet) as progress:
        found = studies.study(options.model, gpu=gpu, notify=progress.say, **options.choices())
        if progress.say is not None:
            progress.say("drawing")
        plan = plan_document(found.plan, origin=found.origin, cards=cards_of(found.plan))
        document = study_document(found, plan, command_line("suggest", options))
        write_file(path, draw(document), flag="--output")
    say(f"{'page' if chart is None else 'chart'} written to {path}", quiet=options.quiet)
    if shown:
        webbrowser.open(f"file://{os.path.abspath(path)}")
    return DOES_NOT_FIT if found.plan.best is None else 0


def _page(document: Mapping[str, Any]) -> str:
    from memplan.report.pages.plan import render_plan_page

    return render_plan_page(document)


def _drawing(name: str, path: str) -> Callable[[Mapping[str, Any]], str | bytes]:
    """What draws the chart of a document for a file.

    Raises:
        UsageError: the suffix is that of no picture.
    """
    from memplan.report.charts.drawing import check_kind, picture_of
    from memplan.report.charts.named import chart_of

    kind = check_kind(os.path.splitext(path)[1].lstrip(".").lower())
    return lambda document: picture_of(chart_of(document, name), kind)
