"""`memplan report`: a plan as one page that needs no network and no JavaScript."""

from __future__ import annotations

import os
import shlex
import webbrowser
from typing import TYPE_CHECKING, Any

import click

from memplan import api
from memplan.cli.options import SetupCommand, options_of
from memplan.cli.output import DOES_NOT_FIT, say, write_file
from memplan.cli.suggest import cards_of
from memplan.cli.values import OUTPUT, SETUP_ROWS, Options, Row
from memplan.errors import UsageError
from memplan.report.document import plan_document, report_document
from memplan.specs.choices import dropout_of

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_PAGE = "memplan-report.html"
OF_ANSWERS = ("--json", "--format")
"""Options of commands that print; a report is a page."""

REPORT_ROWS = (
    *(row for row in SETUP_ROWS if row.flag not in OF_ANSWERS),
    Row(("--open",), OUTPUT, "Show the page in a browser."),
)


@click.command(cls=SetupCommand, short_help="a plan as one page, with charts")
@options_of(REPORT_ROWS)
@click.pass_context
def report(ctx: click.Context, **given: Any) -> int:
    """Plan as `memplan suggest` does, and write the answer as one HTML page: charts, tables, prices, assumptions.

    The page needs no network, no JavaScript and no other file. It goes to --output, or memplan-report.html.
    """
    shown = given.pop("open")
    return answer(Options(**given), shown=bool(shown), command=_command(ctx.obj or ()))


def _command(args: Sequence[str]) -> str:
    """The command line that answers the same on a screen."""
    kept = [one for one in args[1:] if one != "--open"]
    return shlex.join(["memplan", "suggest", *kept])


def answer(options: Options, *, shown: bool, command: str) -> int:
    """Write the page; the exit status."""
    if options.gpu is None:
        raise UsageError("A report needs a GPU: --gpu is missing.", "Say --gpu rtx4090, --gpu 24GB or --gpu auto.")
    objective = options.objective or "lm"
    model = api.find_model(options.model, dropout=dropout_of(options.choices()), objective=objective)
    plan = api.suggest(model, gpu=options.gpu, **options.choices())
    document = report_document(
        plan_document(plan, origin=model.origin, cards=cards_of(plan)),
        plan.estimate,
        command,
        api.profile_of(model, plan),
    )
    from memplan.report.plan_page import render_plan_page

    page = options.output or DEFAULT_PAGE
    write_file(page, render_plan_page(document), flag="--output")
    say(f"page written to {page}", quiet=options.quiet)
    if shown:
        webbrowser.open(f"file://{os.path.abspath(page)}")
    return DOES_NOT_FIT if plan.best is None else 0
