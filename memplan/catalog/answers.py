"""Numbers that were worked out before, remembered from run to run in the user's cache.

A replay of a run through the caching allocator takes some hundredths of a second, the peak and the time of a step some
thousandths, and a plan asks for dozens of them: they always come to the same for the same model, setup and version.
One small file a model; a file that cannot be read or written is no fault.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from zlib import crc32

from memplan.catalog.models import cache_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

Numbers = tuple[float, ...]
"""Integers stay integers."""

FOLDER = "answers"
FORMAT = "memplan answers 1"
"""First line of a file; another one is ignored."""

MOST_BYTES = 1 << 20
"""A larger file is begun anew."""


CODE_FOLDERS = (
    "allocator",
    "architectures",
    "architectures/families",
    "estimation",
    "memory",
    "operators",
    "specs",
    "steptime",
)
"""What the numbers are computed by, below the package."""


def code_stamp() -> str:
    """Changes whenever the code changes that numbers are computed by: names, sizes and times of its files."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    stamp = 0
    for folder in CODE_FOLDERS:
        with os.scandir(os.path.join(package, folder)) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    status = entry.stat()
                    stamp ^= crc32(f"{folder}/{entry.name} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{stamp:08x}"


class RememberedAnswers(dict[str, Numbers]):
    """Numbers by question, of one model under one version; what is added is appended to the file.

    A line holds the numbers, joined by commas, a space, and the question.
    """

    def __init__(self, fingerprint: str, environment: Mapping[str, str]) -> None:
        """`fingerprint`: everything that the numbers depend on beside the question, on one line."""
        super().__init__()
        name = f"{crc32(fingerprint.encode()):08x}.txt"
        self._path = os.path.join(cache_dir(environment), FOLDER, name)
        self._head = f"{FORMAT} {fingerprint}"
        self._goes_on = False
        """Whether the file can be appended to."""
        try:
            with open(self._path, encoding="utf-8") as file:
                lines = file.read(MOST_BYTES + 1).split("\n")
        except (OSError, UnicodeDecodeError):
            return
        self._goes_on = lines[0] == self._head and not lines[-1]  # one without an end was cut off in its middle
        if self._goes_on:
            for line in lines[1:-1]:
                numbers, _, question = line.partition(" ")
                try:
                    super().__setitem__(question, tuple(map(_number, numbers.split(","))))
                except ValueError:
                    continue

    def __setitem__(self, question: str, numbers: Numbers) -> None:
        """Remember, here and on disk."""
        super().__setitem__(question, numbers)
        line = f"{','.join(map(repr, numbers))} {question}\n"
        try:
            if self._goes_on:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(line)
            else:
                self._begin(line)
        except OSError:
            return

    def _begin(self, line: str) -> None:
        """A file of its own, written under another name and renamed."""
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        temporary = f"{self._path}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(f"{self._head}\n{line}")
        os.replace(temporary, self._path)
        self._goes_on = True


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)
