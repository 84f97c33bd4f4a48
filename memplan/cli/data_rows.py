"""The options of a plan for data, beside those of a setup; without what reads data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.cli.values import OUTPUT, SETUP_ROWS, Row, below, one_of, read_count, read_text
from memplan.errors import UsageError

if TYPE_CHECKING:
    from memplan.cli.values import Options

DATA = "The data"
SIDES = ("right", "left", "middle", "drop")

DATA_ROWS = (
    Row(
        ("--data",),
        DATA,
        "Plan for the records of a file, folder or pattern, or - (memplan lengths).",
        read_text,
        "PATH",
    ),
    Row(("--tokenizer",), DATA, "tokenizer.json, or the folder of a model, for records of text.", read_text, "PATH"),
    Row(("--field",), DATA, "The field with the text, the chat or the completion (found).", read_text, "NAME"),
    Row(("--prompt-field",), DATA, "The field with the prompt, which has no label.", read_text, "NAME"),
    Row(("--truncation",), DATA, "Where longer records are cut (right).", one_of(SIDES), "|".join(SIDES), SIDES),
    Row(
        ("--max-loss",),
        DATA,
        "Share of the labels that a maximum length may cost, without --seq-len (0.1).",
        below(100),
        "PERCENT",
    ),
    Row(("--sample",), DATA, "Count so many records alone, drawn at random.", read_count, "N"),
)
COUNTED = ("tokenizer", "field", "prompt_field", "truncation", "sample")
"""What is said of data before a plan is made for it: arguments of `memplan.surveying.lengths`."""

SUGGEST_ROWS = (
    *(row for row in SETUP_ROWS if row.section != OUTPUT),
    *DATA_ROWS,
    *(row for row in SETUP_ROWS if row.section == OUTPUT),
)


def counted_of(options: Options) -> dict[str, Any]:
    """Those of them that were given."""
    return {name: value for name in COUNTED if (value := getattr(options, name)) is not None}


def check_data(options: Options) -> None:
    """Raise `UsageError` where something is said about data, and none is named."""
    if options.data is not None:
        return
    for row in DATA_ROWS:
        if getattr(options, row.field) is not None:
            raise UsageError(f"{row.flag} is about data, and none is named.", "Say --data PATH, or leave it out.")
