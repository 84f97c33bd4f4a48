"""`memplan same-update`: is micro-batch x accumulation x ranks the same update as the whole batch?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memplan.cli.data_rows import SIDES
from memplan.cli.options import SetupCommand, options_of
from memplan.cli.output import write_answer
from memplan.cli.progress import Progress
from memplan.cli.strategies import packing_row
from memplan.cli.values import BATCH, OUTPUT_ROWS, SETUP_ROWS, Row, one_of, quoted, read_count, read_text
from memplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.measuring.same_update import SameUpdate
    from memplan.sequences.lengths import Lengths

NOT_THE_SAME = 3
"""The exit status where it is another update."""

COMPARED, DATA, CHANGE = "What is compared", "The data", "When the batch changes"


def read_rate(text: str, flag: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if 0 < number < float("inf"):
        return number
    raise UsageError(f"{flag} is {quoted(text)}.", "It has to be a number above 0, such as 2e-5.")


def read_step(text: str, flag: str) -> str:
    """``package.module:function``."""
    module, _, name = read_text(text, flag).partition(":")
    if all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        return text
    raise UsageError(f"{flag} is {quoted(text)}.", "Write package.module:function, such as train:step.")


HELP_BY_FLAG = {
    "--target-batch": "Sequences per optimizer step, over all GPUs.",
    "--micro-batch": "Sequences in one forward pass on one GPU (2).",
    "--accumulation": "Micro-batches per optimizer step (4).",
    "--gpus": "GPUs with different data (1).",
    "--seq-len": "Tokens per sequence (32); data is cut to it where it is given.",
}
_ROW_BY_FLAG = {row.flag: row for row in SETUP_ROWS}
ROWS = (
    *(_ROW_BY_FLAG[flag]._replace(section=BATCH, help=words) for flag, words in HELP_BY_FLAG.items()),
    Row(("--step",), COMPARED, "Your own step: package.module:function.", read_step, "NAME"),
    Row(("--trainer",), COMPARED, "List what trainers do by default; nothing is measured."),
    Row(("--data",), DATA, "A file, folder or pattern of records, or - for stdin.", read_text, "DATA"),
    Row(("--tokenizer",), DATA, "A tokenizer.json, or a folder with one, for records of text.", read_text, "PATH"),
    Row(("--field",), DATA, "The field with the text.", read_text, "NAME"),
    Row(("--prompt-field",), DATA, "The field with the prompt, which has no label.", read_text, "NAME"),
    Row(("--truncation",), DATA, "Where longer ones are cut (right).", one_of(SIDES), "|".join(SIDES), SIDES),
    packing_row(DATA),
    Row(("--previous-batch",), CHANGE, "Sequences per step before.", read_count, "N"),
    _ROW_BY_FLAG["--optimizer"]._replace(section=CHANGE),
    Row(("--lr",), CHANGE, "Learning rate before.", read_rate, "RATE"),
    Row(("--warmup-steps",), CHANGE, "Of the warm-up before.", read_count, "N"),
    Row(("--total-steps",), CHANGE, "Of the run before.", read_count, "N"),
    *OUTPUT_ROWS,
)


@click.command(
    cls=SetupCommand,
    name="same-update",
    short_help="whether accumulating is the same update as the whole batch",
    epilog="Exit status: 0 it is the same update; 3 it is not; 1 a fault; 2 usage.",
)
@options_of(ROWS)
def same_update(trainer: bool, **given: Any) -> int:
    """Compare the gradient of accumulated micro-batches with that of the whole batch, and say why they differ.

    MODEL stands for its family: a small model of it is made, with random weights, and run on the CPU in fp32; with
    --gpus above 1 by torchrun. Or it is package.module:factory, as for `memplan trace`. NAME is a function that is
    called with the module and a list of the micro-batches of one step on one rank; it runs the backward passes and
    leaves the gradient in the parameters, without a step of the optimizer.
    """
    from memplan.measuring.update_document import update_document

    found = None if trainer else _compared(given)
    document = update_document(found)

    def lines() -> Any:
        from memplan.report.same_update import render_trainers, render_update

        return render_trainers(document) if trainer else render_update(document, quiet=given["quiet"])

    write_answer(
        document,
        format=given["format"],
        output=given["output"],
        quiet=given["quiet"],
        lines=lines,
        records=lambda: document["trainers"] if trainer else _records(document),
    )
    return 0 if found is None or found.is_same else NOT_THE_SAME


def _compared(given: dict[str, Any]) -> SameUpdate:
    from memplan.measuring.same_update import OPTIMIZER, same_update

    if given["previous_batch"] is None and any(given[name] for name in ("lr", "warmup_steps", "total_steps")):
        raise UsageError("--lr, --warmup-steps and --total-steps are those of a batch.", "Say --previous-batch N, too.")
    for row in ROWS:
        if row.section == DATA and given["data"] is None and given[row.field] is not None:
            raise UsageError(f"{row.flag} is about data, and none is named.", "Say --data PATH, or leave it out.")
    plain = ("model", "target_batch", "micro_batch", "accumulation", "gpus", "seq_len", "step")
    chosen = {name: given[name] for name in ("packing", "truncation") if given[name] is not None}
    with Progress(shown=not given["quiet"]) as progress:
        return same_update(
            **{name: given[name] for name in plain},
            lengths=None if given["data"] is None else _lengths(given, progress.say),
            **chosen,
            optimizer=given["optimizer"] or OPTIMIZER,
            previous_batch=given["previous_batch"],
            learning_rate=given["lr"],
            warmup_steps=given["warmup_steps"],
            total_steps=given["total_steps"],
            notify=progress.say,
        )


def _lengths(given: dict[str, Any], notify: Callable[[str], None] | None) -> Lengths:
    from memplan.surveying import lengths

    named = {name: given[name] for name in ("tokenizer", "field", "prompt_field")}
    return lengths(given["data"], max_len=(), packing=(), notify=notify, **named).lengths


def _records(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a window of each step."""
    return [
        {
            "step": step["name"],
            "window": at,
            **window,
            "is_same": step["is_same"],
            "causes": ", ".join(cause["kind"] for cause in step["causes"]),
        }
        for step in document["steps"]
        for at, window in enumerate(step["windows"], 1)
    ]
