"""Programs that were fitted to traces before, remembered from run to run in the user's cache.

A key holds the digest of a trace at the smallest size: a module that was changed has another one, and is never answered
from old traces.  One file a program; a file that cannot be read or written, or holds something else, is no fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from hashlib import sha256
from typing import TYPE_CHECKING

from memplan.catalog.answers import code_stamp
from memplan.catalog.models import cache_dir
from memplan.estimation.traced import TracedProgram, as_values, from_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FOLDER = "programs"
FORMAT = "memplan programs 3"

MOST_FILE_BYTES = 64 << 20
"""Larger ones are neither written nor read."""

MOST_BYTES = 256 << 20
"""Of all files together; the oldest go first."""


class RememberedPrograms(MutableMapping[str, TracedProgram]):
    """Programs by key, in files of a folder of the cache."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._folder = os.path.join(cache_dir(environment), FOLDER)
        self._head = f"{FORMAT} {code_stamp()}"
        self._known: dict[str, TracedProgram] = {}

    def __getitem__(self, key: str) -> TracedProgram:
        """From this run, else from its file."""
        if key not in self._known:
            self._known[key] = self._read(key)
        return self._known[key]

    def __setitem__(self, key: str, program: TracedProgram) -> None:
        """Remember, here and on disk; the file is written under another name and renamed."""
        self._known[key] = program
        content = json.dumps({"format": self._head, "key": key, "program": as_values(program)}, separators=(",", ":"))
        if len(content) > MOST_FILE_BYTES:
            return
        path = self._path(key)
        temporary = f"{path}.{os.getpid()}"
        try:
            os.makedirs(self._folder, exist_ok=True)
            with open(temporary, "w", encoding="ascii") as file:
                file.write(content)
            os.replace(temporary, path)
            self._make_room()
        except OSError:
            return

    def __delitem__(self, key: str) -> None:
        """Forget, here and on disk."""
        self[key]
        del self._known[key]
        try:
            os.unlink(self._path(key))
        except OSError:
            return

    def __iter__(self) -> Iterator[str]:
        """The keys of this run."""
        return iter(self._known)

    def __len__(self) -> int:
        """Their number."""
        return len(self._known)

    def _path(self, key: str) -> str:
        return os.path.join(self._folder, f"{sha256(f'{self._head} {key}'.encode()).hexdigest()[:32]}.json")

    def _read(self, key: str) -> TracedProgram:
        path = self._path(key)
        try:
            if os.path.getsize(path) > MOST_FILE_BYTES:
                raise KeyError(key)
            with open(path, encoding="ascii") as file:
                values = json.load(file)
            if values["format"] != self._head or values["key"] != key:
                raise KeyError(key)
            return from_values(values["program"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise KeyError(key) from None

    def _make_room(self) -> None:
        """Remove the oldest files while all together are too large."""
        with os.scandir(self._folder) as entries:
            files = sorted((e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in entries if e.is_file())
        total = sum(size for _, size, _ in files)
        for _, size, path in files[:-1]:
            if total <= MOST_BYTES:
                return
            os.unlink(path)
            total -= size
