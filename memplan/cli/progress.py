"""What is being done, for somebody who waits at a terminal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from memplan.cli.output import write_stderr

if TYPE_CHECKING:
    from collections.abc import Callable


class Progress:
    """A line on the terminal that says what is being done, and goes when it is done; nothing anywhere else."""

    def __init__(self, *, shown: bool) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.say: Callable[[str], None] | None = self._say if shown and terminal else None

    def _say(self, text: str) -> None:
        write_stderr(f"\r\x1b[K{text[:78]}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.say is not None:
            write_stderr("\r\x1b[K")
