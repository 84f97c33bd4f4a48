"""Lengths that were counted before, remembered by the content of the data and of the tokenizer."""

from __future__ import annotations

import os
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from memplan.datasets.records import STDIN
from memplan.sequences.lengths import Lengths, Spans

if TYPE_CHECKING:
    from collections.abc import Iterable

FOLDER = "lengths"
FORMAT = "memplan lengths 2"
MOST_BYTES = 512 << 20
"""Of all files together; the oldest go first."""
COLUMNS = ("tokens", "sample", "start", "stop")
ALL = "num_records"


class RememberedLengths:
    """Lengths by key, a file each; one that cannot be read or written is no fault."""

    def __init__(self, folder: str) -> None:
        """`folder`: the cache of memplan."""
        self._folder = os.path.join(folder, FOLDER)

    def get(self, key: str) -> tuple[Lengths, int] | None:
        """What was counted, and of how many records; None where nothing was."""
        try:
            with np.load(self._path(key), allow_pickle=False) as file:
                columns = {name: file[name].astype(np.int64) for name in COLUMNS if name in file}
                num_records = int(file[ALL])
        except (OSError, TypeError, ValueError, KeyError, EOFError):
            return None
        spans = Spans(columns["sample"], columns["start"], columns["stop"]) if len(columns) == len(COLUMNS) else None
        return Lengths(columns["tokens"], spans), num_records

    def put(self, key: str, lengths: Lengths, num_records: int) -> None:
        """Remember; the file is written under another name and renamed."""
        columns: dict[str, np.ndarray] = {"tokens": lengths.tokens}
        if lengths.spans is not None:
            columns = {**columns, **lengths.spans._asdict()}
        temporary = f"{self._path(key)}.{os.getpid()}.npz"
        try:
            os.makedirs(self._folder, exist_ok=True)
            short: dict[str, Any] = {name: values.astype(np.int32) for name, values in columns.items()}
            short[ALL] = np.int64(num_records)
            np.savez_compressed(temporary, **short)
            os.replace(temporary, self._path(key))
            self._make_room()
        except OSError:
            return

    def _path(self, key: str) -> str:
        return os.path.join(self._folder, f"{key}.npz")

    def _make_room(self) -> None:
        with os.scandir(self._folder) as entries:
            files = sorted(
                ((entry.stat().st_mtime, entry.path, entry.stat().st_size) for entry in entries), reverse=True
            )
        total = 0
        for _, path, size in files:
            total += size
            if total > MOST_BYTES:
                os.unlink(path)


def key_of(paths: Iterable[str], options: str) -> str | None:
    """Changes with the content of any of the files and with the options; None for what is piped in.

    Raises:
        OSError: a file cannot be read.
    """
    digest = sha256(f"{FORMAT} {options}".encode())
    for path in paths:
        if path == STDIN:
            return None
        digest.update(b"\0")
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:32]
