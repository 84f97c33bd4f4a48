"""`memplan`: reads the command line, answers, and turns faults into two lines and an exit status.

0 done, or it fits · 1 a fault · 2 usage · 3 it does not fit (the answer is printed all the same) · 130 interrupted

A command's module is imported when it is called, and click when a command line is not a plain one.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

from memplan.cli.output import on_screen, write_stderr
from memplan.cli.plain import read_plain
from memplan.errors import MemplanError

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    if args is not None:
        return _main(list(args))
    gc.disable()  # the program ends when it has answered, and leaves hardly any cycles behind
    status = _main(sys.argv[1:])
    gc.freeze()  # nor has the interpreter to look for them at its end
    return status


def _main(given: list[str]) -> int:
    try:
        return _run(given)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as fault:  # noqa: BLE001 -- the last resort: every fault ends in two lines and a status
        if "--traceback" in given:
            _print_traceback()
        return _report(fault)


def _run(given: Sequence[str]) -> int:
    plain = read_plain(given, os.environ)
    if plain is None:
        from memplan.cli.commands import run

        return run(given)
    command, options = plain
    if command == "suggest":
        from memplan.cli.suggest import answer
    else:
        from memplan.cli.estimate import answer
    return answer(options)


def _report(fault: Exception) -> int:
    """Cause and cure on stderr; the exit status."""
    if isinstance(fault, MemplanError):
        _say(fault.cause, fault.cure)
        return fault.exit_status
    text = " ".join(str(fault).split())
    _say(
        f"an unexpected {type(fault).__name__}{f': {text}' if text else ''}.",
        "This is a bug in memplan: run again with --traceback and report what it prints.",
    )
    return 1


def _say(cause: str, cure: str = "") -> None:
    for line in (f"memplan: {cause}", cure):
        if line:
            write_stderr(f"{on_screen(line)}\n")


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()
