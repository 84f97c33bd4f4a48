"""A terminal for tests: a program runs in it, and what stays on its screen is known.

run = in_terminal(["memplan", "gpus"], columns=80)
run.shown, run.screen(), run.piped
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SEQUENCE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")
ONLY_ASKED = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONIOENCODING")


class Ran(NamedTuple):
    """What a program left."""

    status: int
    shown: str
    """All that it wrote to the terminal, with the sequences that move the cursor."""
    piped: str
    """What it wrote to the other stream, which is none."""

    def screen(self) -> list[str]:
        """The lines that are there at the end, as wide as they are."""
        lines, row, column, at = [""], 0, 0, 0
        while at < len(self.shown):
            sequence = SEQUENCE.match(self.shown, at)
            if sequence:
                at = sequence.end()
                row, column, lines = _moved(sequence[2], sequence[3], row, column, lines)
                continue
            letter = self.shown[at]
            at += 1
            if letter == "\r":
                column = 0
            elif letter == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            else:
                line = lines[row].ljust(column)
                lines[row] = line[:column] + letter + line[column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


def _moved(numbers: str, letter: str, row: int, column: int, lines: list[str]) -> tuple[int, int, list[str]]:
    """What a sequence does (ECMA-48, 8.3): up, erase a line; colours and the like move nothing."""
    if letter == "A":
        return max(row - int(numbers or 1), 0), column, lines
    if letter == "K":
        kept = "" if numbers == "2" else lines[row][:column]
        return row, column, [*lines[:row], kept, *lines[row + 1 :]]
    assert letter in "hlm", f"a sequence that this terminal does not know: {letter}"
    return row, column, lines


def in_terminal(
    command: Sequence[str],
    *,
    cwd: str | os.PathLike[str],
    columns: int = 80,
    stdout: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Ran:
    """Run a program whose stderr is a terminal, or with `stdout` that instead."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    given = {name: value for name, value in os.environ.items() if name not in ONLY_ASKED}
    with subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower if stdout else subprocess.PIPE,
        stderr=subprocess.PIPE if stdout else follower,
        cwd=cwd,
        env={**given, "TERM": "xterm-256color", **(environment or {})},
    ) as process:
        os.close(follower)
        shown = b""
        while chunk := _read(leader):
            shown += chunk
        os.close(leader)
        other = process.stderr if stdout else process.stdout
        assert other is not None
        piped = other.read()
    return Ran(process.returncode, shown.decode(), piped.decode())


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux says so where nobody holds the other end any more
        return b""
