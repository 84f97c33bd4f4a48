"""What is being done, for somebody who waits at a terminal.

    with Progress(shown=not quiet) as progress:
        long_work(notify=progress.say)  # "reading", or "3/12 llama-3-8b", the third of twelve

A line on stderr with the time it has taken, and a bar where it is known how many steps there are.  It goes when it is
done, and is nothing anywhere else: neither in a pipe nor with --quiet.  rich, which draws it, is imported when there is
something to say.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich import progress as drawing
    from rich.console import RenderableType

POSITION = re.compile(r"(\d+)/(\d+) ")
"""Begins what is said of one of several steps: which of how many."""
WITHOUT_CURSOR = frozenset({"dumb", "unknown"})
"""Kinds of terminals where nothing that is written goes away again."""
BAR_WIDTH = 24


class Progress:
    """A line on the terminal that says what is being done, and goes when it is done; nothing anywhere else."""

    def __init__(self, *, shown: bool) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in WITHOUT_CURSOR
        self.say: Callable[[str], None] | None = self._say if shown and terminal else None
        """Is told what is being done; None where nobody looks."""
        self._drawn: drawing.Progress | None = None

    def _say(self, text: str) -> None:
        position = POSITION.match(text)
        done, total = (int(position[1]) - 1, int(position[2])) if position else (0, None)
        printable = "".join(one if one.isprintable() else "?" for one in text)
        if self._drawn is None:
            self._drawn = _line()
            self._drawn.add_task(printable, completed=done, total=total)
            self._drawn.start()
            self._drawn.console.show_cursor(True)  # whoever is killed cannot bring it back
            return
        (task,) = self._drawn.tasks
        task.total = total  # update() takes None for no change
        self._drawn.update(task.id, description=printable, completed=done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            self._drawn.stop()


def _line() -> drawing.Progress:
    from rich import progress as drawing
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Column
    from rich.text import Text

    class Bar(drawing.ProgressColumn):
        """Nothing where the number of steps is not known."""

        def render(self, task: drawing.Task) -> RenderableType:
            return ProgressBar(task.total, task.completed, width=BAR_WIDTH) if task.total else Text()

    return drawing.Progress(
        drawing.SpinnerColumn("line"),  # in ASCII, as whatever has no fallback has to be
        drawing.TextColumn(
            "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="crop")
        ),
        Bar(),
        drawing.TimeElapsedColumn(),
        console=Console(stderr=True, force_terminal=True),
        transient=True,
        expand=True,
        redirect_stdout=False,
    )
