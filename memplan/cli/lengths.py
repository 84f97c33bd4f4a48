"""`memplan lengths`: how long the data is, and what each maximum length would cost."""

from __future__ import annotations

from typing import Any

import click

from memplan.cli.axes import read_axis
from memplan.cli.options import SetupCommand, rows_as_options
from memplan.cli.output import say, write_answer
from memplan.cli.progress import Progress
from memplan.cli.strategies import packing_row
from memplan.cli.values import OUTPUT_ROWS, Row, one_of, read_count, read_text
from memplan.sequences.truncation import SIDES

DATA, CHOSEN = "The data", "What is worked out"


ROWS = (
    Row(("--tokenizer",), DATA, "tokenizer.json, or the folder of a model, for records of text.", read_text, "PATH"),
    Row(("--field",), DATA, "The field with the text, the chat or the completion (found).", read_text, "NAME"),
    Row(("--prompt-field",), DATA, "The field with the prompt, which has no label.", read_text, "NAME"),
    Row(("--sample",), DATA, "Count so many records alone, drawn at random.", read_count, "N"),
    Row(("--max-len",), CHOSEN, "Candidates (powers of two from the median on).", read_axis, "RANGE"),
    Row(("--truncation",), CHOSEN, "Where longer ones are cut (right).", one_of(SIDES), "|".join(SIDES), SIDES),
    Row(("--micro-batch",), CHOSEN, "Rows of a micro-batch (1).", read_count, "N"),
    Row(("--target-batch",), CHOSEN, "Rows of an optimizer step, to count the steps of an epoch.", read_count, "N"),
    packing_row(CHOSEN),
    *OUTPUT_ROWS,
)


@click.command(cls=SetupCommand, short_help="how long the data is, and what each maximum length would cost")
@click.argument("data", metavar="DATA")
@rows_as_options(ROWS)
def lengths(
    data: str,
    format: str,  # noqa: A002 -- the option's name
    output: str | None,
    quiet: bool,
    traceback: bool,
    **given: Any,
) -> int:
    """Show how long the records of DATA are, and for each maximum length what is cut off, padded and packed.

    DATA is a file, a folder, a pattern, or - for stdin: JSON lines, JSON, CSV, Parquet or plain text, a record a line.
    Records hold text, a chat (messages), a prompt and a completion, or token counts (num_tokens, and where it is known
    num_supervised_tokens). Counts are remembered by content.
    """
    from memplan.report.lengths import lengths_document, render_lengths
    from memplan.surveying import lengths as survey

    with Progress(shown=not quiet) as progress:
        found = survey(data, notify=progress.say, **{name: value for name, value in given.items() if value is not None})
    document = lengths_document(found)
    if found.is_sample:
        say(f"a sample of {found.summary.num_samples:,} records: counts of rows and steps are of it alone", quiet=quiet)
    write_answer(
        document,
        format=format,
        output=output,
        quiet=quiet,
        lines=lambda: render_lengths(document, quiet=quiet),
        records=found.records,
    )
    return 0
