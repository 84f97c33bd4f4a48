"""Replays that were done before, remembered from run to run in the user's cache.

A replay of a run through the caching allocator takes some hundredths of a second and always comes to the same number
for the same model, setup and version.  One small file a model; a file that cannot be read or written is no fault.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from zlib import crc32

from memplan.catalog.models import cache_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = "replays"
FORMAT = "memplan replays 1"
"""First line of a file; another one is ignored."""

MOST_BYTES = 1 << 20
"""A larger file is begun anew."""


CODE_FOLDERS = ("allocator", "architectures", "architectures/families", "estimation", "memory", "operators")
"""What a replay is computed by, below the package."""


def code_stamp() -> str:
    """Changes whenever the code changes that replays are computed by: names, sizes and times of its files."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    stamp = 0
    for folder in CODE_FOLDERS:
        with os.scandir(os.path.join(package, folder)) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    status = entry.stat()
                    stamp ^= crc32(f"{folder}/{entry.name} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{stamp:08x}"


class RememberedReplays(dict[str, int]):
    """Reserved bytes by setup, of one model under one version; what is added is appended to the file."""

    def __init__(self, fingerprint: str, environment: Mapping[str, str]) -> None:
        """`fingerprint`: everything that the numbers depend on beside the setup, on one line."""
        super().__init__()
        name = f"{crc32(fingerprint.encode()):08x}.txt"
        self._path = os.path.join(cache_dir(environment), FOLDER, name)
        self._head = f"{FORMAT} {fingerprint}"
        try:
            with open(self._path, encoding="utf-8") as file:
                lines = file.read(MOST_BYTES).split("\n")
        except (OSError, UnicodeDecodeError):
            return
        if lines[0] == self._head:
            for line in lines[1:]:
                number, _, key = line.partition(" ")
                if key and number.isdigit():
                    super().__setitem__(key, int(number))

    def __setitem__(self, key: str, value: int) -> None:
        """Remember, here and on disk; the file is written under another name and renamed."""
        super().__setitem__(key, value)
        text = "\n".join((self._head, *(f"{number} {one}" for one, number in self.items()), ""))
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            temporary = f"{self._path}.{os.getpid()}"
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text[:MOST_BYTES])
            os.replace(temporary, self._path)
        except OSError:
            return
