"""An ordinary command line, read without click, whose import alone takes longer than a plan.

    ["suggest", "--gpu", "24GB", "--target-batch=32"]  ->  ("suggest", Options(gpu="24GB", target_batch=32))

Only what leaves nothing to say is read here: a command that answers about a setup, each option once and in full, its
value there, at most one MODEL.  Help, faults of spelling, abbreviations and completion are click's; so are repeated
options.  A law of the tests: wherever this module has an answer, click has the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.cli.values import MODEL, SETUP_ROWS, Options, Row, check_targets, choose_format

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

ANSWERS = ("estimate", "suggest")
"""The commands that take a setup; the module of each has a function `answer`."""

COMPLETION = "_MEMPLAN_COMPLETE"
"""With this in the environment click is asked for completions and no command is run."""

ROW_BY_NAME = {name: row for row in SETUP_ROWS if not row.hidden for name in row.names}


def read_plain(args: Sequence[str], environment: Mapping[str, str]) -> tuple[str, Options] | None:
    """The command and its options, None where click has to read `args`.

    Raises:
        MemplanError: a value that has no meaning or is not modelled; click's lane raises the same.
    """
    if not args or args[0] not in ANSWERS or environment.get(COMPLETION):
        return None
    given = _split(args[1:])
    return None if given is None else (args[0], _read(given))


def _split(args: Sequence[str]) -> list[tuple[Row, str]] | None:
    """Every option with the text of its value; None where that is not plain to see."""
    given: dict[str, tuple[Row, str]] = {}
    tokens = iter(args)
    for token in tokens:
        name, equals, text = token.partition("=") if token.startswith("--") else (token, "", "")
        row = ROW_BY_NAME.get(name, MODEL)
        if row is MODEL:
            text = token
        elif row.read is not None and not equals:
            text = next(tokens, "--")
        misplaced = equals and row.read is None
        if misplaced or row.field in given or text.startswith("-" if row is MODEL else "--"):
            return None
        given[row.field] = row, text
    model = given.pop(MODEL.field, None)
    return [*given.values(), *([model] if model else ())]


def _read(given: Sequence[tuple[Row, str]]) -> Options:
    """The values, read in click's order, so that of several faults the same is reported."""
    values: dict[str, Any] = {}
    for row, text in sorted(given, key=lambda pair: not pair[0].first):
        values[row.field] = row.read(text, row.flag) if row.read else True
        if row.field == "target_tokens":
            check_targets(values.get("target_batch"), values["target_tokens"])
        elif row.field == "format":
            choose_format("json" in values, values["format"])
    values["format"] = choose_format(values.pop("json", False), values.get("format"))
    return Options(**values)
