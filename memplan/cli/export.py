"""`memplan export`: a plan as what carries it out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from memplan.cli.options import SetupCommand, rows_as_options
from memplan.cli.output import write_answer
from memplan.cli.saved import WRITE_AGAIN, read_saved
from memplan.cli.values import OUTPUT_ROWS, Row, one_of
from memplan.errors import MemplanError, UsageError
from memplan.export.torch_loop import torch_loop
from memplan.report.ansi import Line
from memplan.report.document import envelope

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Document = dict[str, Any]

WRITER_BY_TARGET: dict[str, Callable[[Mapping[str, Any]], str]] = {"torch": torch_loop}
TARGETS = tuple(WRITER_BY_TARGET)

ROWS = (
    Row(
        ("--to",),
        "What is written",
        "torch: a plain PyTorch loop around memplan.accumulate.",
        one_of(TARGETS),
        "|".join(TARGETS),
        TARGETS,
    ),
    *(row for row in OUTPUT_ROWS if row.flag != "--format"),
)


@click.command(cls=SetupCommand, short_help="a plan as what carries it out")
@click.argument("plan", metavar="PLAN")
@rows_as_options(ROWS)
def export(plan: str, to: str | None, json: bool, output: str | None, quiet: bool, traceback: bool) -> int:
    """Write what carries out PLAN, a file that `memplan suggest ... --json --output plan.json` wrote.

    --to torch is a program that loads the model, splits each batch into the planned micro-batches, accumulates them as
    one update (memplan.accumulate) and refuses data that would take more memory than was planned for.
    """
    if to is None:
        raise UsageError("What is to be written? --to is missing.", f"Say --to {TARGETS[0]}.")
    text = WRITER_BY_TARGET[to](_plan(plan))
    document = {**envelope("export"), "to": to, "text": text}
    write_answer(
        document,
        format="json" if json else "text",
        output=output,
        quiet=quiet,
        lines=lambda: [Line(line) for line in text.splitlines()],
        records=list,
    )
    return 0


def _plan(path: str) -> Document:
    """The plan in a file.

    Raises:
        MemplanError: there is none.
    """
    if not os.path.isfile(path):
        raise MemplanError(f"There is no file {path}.", WRITE_AGAIN)
    saved = read_saved(path)
    if saved is None:
        raise MemplanError(f"{path} holds no answer of memplan.", WRITE_AGAIN)
    if saved["kind"] not in {"plan", "report"}:
        raise MemplanError(f"{path} holds no plan but an answer of the kind {saved['kind']}.", WRITE_AGAIN)
    found: Document = saved["plan"] if saved["kind"] == "report" else saved
    return found
