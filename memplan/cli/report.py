"""`memplan report`: a plan, an answer from a file, or several plans side by side, as one page."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memplan import studies
from memplan.cli.command_line import command_line
from memplan.cli.data_rows import SUGGEST_ROWS, check_data, counted_of
from memplan.cli.options import SetupCommand, options_of
from memplan.cli.output import DOES_NOT_FIT, say, write_file, write_page
from memplan.cli.progress import Progress
from memplan.cli.suggest import check_plannable
from memplan.cli.values import OUTPUT, Options, Row, one_of
from memplan.errors import MemplanError, UsageError
from memplan.report.beside import CHART_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memplan.sequences.survey import Survey

    Document = dict[str, Any]

DEFAULT_PAGE = "memplan-report.html"
OF_ANSWERS = ("--json", "--format")
"""Options of commands that print; a report is a page."""
MOST_SIDES = 8
STDOUT = "-"

REPORT_ROWS = (
    *(
        row._replace(help="A card, a size or auto; several with commas between them.") if row.flag == "--gpu" else row
        for row in SUGGEST_ROWS
        if row.flag not in OF_ANSWERS
    ),
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


@click.command(cls=SetupCommand, short_help="a plan as one page, with charts, or several side by side")
@options_of(REPORT_ROWS, several="[MODEL|FILE]...")
def report(**given: Any) -> int:
    """Plan as `memplan suggest` does, and write the answer as one HTML page: charts, tables, prices, assumptions.

    The page needs no network, no JavaScript and no other file. It goes to --output, or memplan-report.html. With
    --chart one of its charts goes to a file of its own.

    FILE is an answer that was written by --json: of `memplan suggest` its plan with all that shows why, of any other
    command its own page.

    Several models, files or GPUs (--gpu rtx4090,h100), up to 8 plans, are put side by side; the exit status is then 3
    where none of them fits. With --data all are planned for the same token counts.
    """
    shown, models, chart = given.pop("open"), given.pop("model"), given.pop("chart")
    options = Options(**given)
    check_data(options)
    return answer(options, models, shown=bool(shown), chart=chart)


def answer(options: Options, models: Sequence[str] = (), *, shown: bool, chart: str | None = None) -> int:
    """Write the page, or the chart of this name; the exit status."""
    from memplan.cli.saved import read_saved

    files = {model: saved for model in models if (saved := read_saved(model)) is not None}
    _check_files(options, models, files)
    gpus = [None] if options.gpu is None else [gpu.strip() for gpu in options.gpu.split(",")]
    path = options.output or (DEFAULT_PAGE if chart is None else f"memplan-{chart}.svg")
    if chart is not None:
        _drawing(chart, path)  # a name that is no picture's is a fault before anything is worked out
    with Progress(shown=not options.quiet) as progress:
        if len(models) <= 1 and len(gpus) == 1:
            model = models[0] if models else None
            one = options._replace(model=model)
            text, status = _of_one(one, files.get(str(model)), progress.say, _drawing(chart, path))
        elif chart is not None:
            raise UsageError("--chart draws one plan, and several are named.", "Name one model and one GPU.")
        else:
            text, status = _of_several(options, models or [None], gpus, files, progress.say)
    if path == STDOUT:
        write_page(text)
        return status
    write_file(path, text, flag="--output")
    say(f"{'page' if chart is None else 'chart'} written to {path}", quiet=options.quiet)
    if shown:
        _show(path, quiet=options.quiet)
    return status


def _show(path: str, *, quiet: bool) -> None:
    if not webbrowser.open(Path(path).resolve().as_uri()):
        say(f"no browser could be opened: look at {path}", quiet=quiet)


def _check_files(options: Options, models: Sequence[str], files: Document) -> None:
    """Raise `UsageError` where all is said by files and an option says more."""
    if not files or len(files) < len(set(models)):
        return
    row = next(
        (
            row
            for row in SUGGEST_ROWS
            if row.section != OUTPUT and not row.hidden and getattr(options, row.field) not in (None, False)
        ),
        None,
    )
    if row is not None:
        raise UsageError(
            f"{row.flag} and {next(iter(files))} contradict each other: the file says what was planned.",
            "Leave one of them out.",
        )


def _of_one(
    options: Options,
    saved: Document | None,
    notify: Callable[[str], None] | None,
    draw: Callable[[Document], bytes] | None,
) -> tuple[str | bytes, int]:
    """The page of a plan or a file, or a chart of it, and the exit status."""
    from memplan.report.pages.answers import page_of, page_of_foreign

    if saved is None:
        document = _planned(options, _counted([options], notify), notify)
        return (page_of if draw is None else draw)(document), _status(document)
    path = str(options.model)
    if saved["kind"] in {"plan", "report"}:
        document = _read(saved, path, options, notify)
        return page_of_foreign(document, path) if draw is None else draw(document), _status(document)
    if draw is not None:
        raise MemplanError(f"{path} holds no plan, of which a chart could be drawn.", "Name a plan, or a model.")
    text = page_of_foreign(saved, path)
    fits = [side["plan"]["fits"] for side in saved["sides"]] if saved["kind"] == "comparison" else [saved.get("fits")]
    return text, DOES_NOT_FIT if all(one is False for one in fits) else 0


def _of_several(
    options: Options,
    models: Sequence[str | None],
    gpus: Sequence[str | None],
    files: Document,
    notify: Callable[[str], None] | None,
) -> tuple[str, int]:
    """The page of a comparison, and the exit status."""
    from memplan.report.comparison import comparison_document
    from memplan.report.pages.answers import page_of, page_of_foreign

    asked = [(model, gpu) for model in models for gpu in ([None] if model in files else gpus)]
    if not 2 <= len(asked) <= MOST_SIDES:
        raise UsageError(
            f"{len(asked)} plans are too {'few' if len(asked) < MOST_SIDES else 'many'} to be put side by side.",
            f"Name 2 to {MOST_SIDES} models, files and GPUs.",
        )
    sides = [options._replace(model=model, gpu=gpu) for model, gpu in asked]
    survey = _counted([one for one in sides if one.model not in files], notify)
    reports, names = [], []
    for one in sides:
        saved = files.get(str(one.model))
        document = _planned(one, survey, notify) if saved is None else _read(saved, str(one.model), one, notify)
        reports.append(document)
        names.append(_name(document) if saved is None else str(one.model))
    document = comparison_document(reports, names)
    text = page_of_foreign(document, " or ".join(files)) if files else page_of(document)
    return text, min(map(_status, reports))


def _counted(sides: Sequence[Options], notify: Callable[[str], None] | None) -> Survey | None:
    """The lengths of the data, once for all that are planned for it, after a look at each; None without data."""
    data = sides[0].data if sides else None
    if data is None:
        return None
    from memplan.feeding import checked
    from memplan.surveying import lengths

    for one in sides:
        checked(one.model, gpu=check_plannable(one), max_loss=one.max_loss, **one.choices())
    return lengths(data, max_len=(), packing=(), notify=notify, **counted_of(sides[0]))


def _planned(options: Options, survey: Survey | None, notify: Callable[[str], None] | None) -> Document:
    from memplan.cli.pages import report_of

    gpu, choices, command = check_plannable(options), options.choices(), command_line("suggest", options)
    if survey is None:
        return report_of(studies.study(options.model, gpu=gpu, notify=notify, **choices), command)
    from memplan import api
    from memplan.feeding import plan_for

    model = api.find_trained(options.model, choices)
    plan = plan_for(survey, model, gpu=gpu, max_loss=options.max_loss, notify=notify, **choices)
    return report_of(studies.study_of(plan, model, notify=notify), command)


def _read(saved: Document, path: str, options: Options, notify: Callable[[str], None] | None) -> Document:
    """The report of a file that holds a plan, or one."""
    from memplan.cli.saved import report_of_saved
    from memplan.report.pages.answers import page_of_foreign

    if saved["kind"] == "report":
        page_of_foreign(saved, path)  # raises where it is not complete
        return saved
    if saved["kind"] != "plan":
        raise MemplanError(
            f"{path} holds no plan but an answer of the kind {saved['kind']}, which is not compared.",
            "Write a plan, with memplan suggest ... --json --output FILE.",
        )
    document = report_of_saved(saved, path, notify)
    for note in document["notes"]:
        say(f"{path}: {note}", quiet=options.quiet)
    return document


def _drawing(name: str | None, path: str) -> Callable[[Document], bytes] | None:
    """What draws the chart of a document for a file; None for the page.

    Raises:
        UsageError: the suffix is that of no picture.
    """
    if name is None:
        return None
    from memplan.report.charts.drawing import SCREEN, check_kind, picture_of
    from memplan.report.charts.legend import titled
    from memplan.report.charts.named import chart_of

    kind = check_kind(os.path.splitext(path)[1].lstrip(".").lower())
    return lambda document: picture_of(titled(chart_of(document, name), _name(document), SCREEN), kind)


def _name(document: Document) -> str:
    plan = document["plan"]
    return f"{plan['model']['name'].rpartition('/')[2]} on {plan['gpu']['name']}"


def _status(report: Document) -> int:
    return 0 if report["plan"]["best"] is not None else DOES_NOT_FIT
