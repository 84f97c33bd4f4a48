"""The command line that asks for what some options say, to be copied from a page."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from memplan.cli.data_rows import SUGGEST_ROWS
from memplan.cli.values import OUTPUT

if TYPE_CHECKING:
    from memplan.cli.values import Options


def command_line(command: str, options: Options) -> str:
    """``memplan suggest llama-3-8b --gpu 24GB``: all that was asked, without what says how it is written."""
    words = ["memplan", command]
    if options.model is not None:
        words.append(options.model)
    for row in SUGGEST_ROWS:
        value = None if row.hidden or row.section == OUTPUT else getattr(options, row.field)
        if value is True:
            words.append(row.flag)
        elif value is not None and value is not False:
            words += [row.flag, _text(value)]
    return shlex.join(words)


def _text(value: Any) -> str:
    """As it is read: names and numbers with commas, pairs as ``name=number``."""
    if isinstance(value, tuple):
        return ",".join(f"{one[0]}={one[1]}" if isinstance(one, tuple) else str(one) for one in value)
    return str(value)
