"""Measurements on disk: one JSON object a line, appended and never edited.

A folder of ``*.jsonl`` files, one a device: `profiles/measurements` in a checkout, else `measurements` in the user's
data folder (`MEMPLAN_DATA_DIR`, `XDG_DATA_HOME`).  A line that cannot be read is reported and passed over: what was
measured before and after it counts.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

from memplan.catalog.profiles import PACKAGE_FOLDER, profile_path
from memplan.errors import MemplanError
from memplan.specs.records import RecordError, measurement_record, parse_measurement
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.specs.measurement import Measurement

FOLDER = "measurements"
SUFFIX = ".jsonl"
LONGEST_LINE = 8 << 20
"""A longer line is no record; a config of the largest size that is read fits into one."""


class NotWrittenError(MemplanError):
    """A measurement could not be written; those before it are kept."""


class BadLine(NamedTuple):
    """A line that is no record."""

    path: str
    number: int
    """From 1."""
    reason: str


class Records(NamedTuple):
    """What a folder or file holds."""

    measurements: tuple[Measurement, ...]
    """In the order in which they were written, file by file."""
    bad_lines: tuple[BadLine, ...]


def records_path(environment: Mapping[str, str], *parts: str) -> str:
    """The folder for measurements (or a file in it): of the checkout, else of the user."""
    if os.path.isdir(os.path.join(os.path.dirname(PACKAGE_FOLDER), "profiles")):
        return profile_path(FOLDER, *parts)
    own = environment.get("MEMPLAN_DATA_DIR")
    base = environment.get("XDG_DATA_HOME") or os.path.join("~", ".local", "share")
    return os.path.join(os.path.expanduser(own or os.path.join(base, "memplan")), FOLDER, *parts)


def read_all_measurements(environment: Mapping[str, str]) -> Records:
    """Those that memplan comes with, and the user's own.

    Raises:
        MemplanError: they cannot be read.
    """
    found = [read_measurements(path) for path in dict.fromkeys((profile_path(FOLDER), records_path(environment)))]
    return Records(
        tuple(one for records in found for one in records.measurements),
        tuple(line for records in found for line in records.bad_lines),
    )


def file_of(card_name: str) -> str:
    """Name of the file for a device: ``NVIDIA H200`` -> ``nvidia-h200.jsonl``."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in card_name.lower()).split()
    return "-".join(words) + SUFFIX


def read_measurements(path: str) -> Records:
    """The records of a file, or of all files of a folder in the order of their names; none where there is nothing.

    Raises:
        MemplanError: it cannot be read.
    """
    measurements: list[Measurement] = []
    bad: list[BadLine] = []
    for file in _listed(path):
        try:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        measurements.append(_parse(line))
                    except RecordError as fault:
                        bad.append(BadLine(file, number, str(fault)))
        except OSError as fault:
            raise MemplanError(
                f"The measurements in {file} cannot be read: {fault.strerror}.", "Check the file, or name another."
            ) from None
    return Records(tuple(measurements), tuple(bad))


def _listed(path: str) -> list[str]:
    try:
        return _files(path)
    except OSError as fault:
        raise MemplanError(
            f"The measurements in {path} cannot be read: {fault.strerror}.", "Check the folder, or name another."
        ) from None


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [] if path == os.devnull else _regular([path])
    files = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(SUFFIX)]
    return _regular(files)


def _regular(files: list[str]) -> list[str]:
    """Those that are there; what is no regular file might never end.

    Raises:
        OSError: one of them is none.
    """
    there = [file for file in files if os.path.exists(file)]
    for file in there:
        if not os.path.isfile(file):
            raise OSError(22, f"{os.path.basename(file)} is no regular file")
    return there


def _parse(line: bytes) -> Measurement:
    if len(line) > LONGEST_LINE:
        raise RecordError(f"it has {len(line):,} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise RecordError("it is not JSON: cut off while it was written, or something else") from None
    return parse_measurement(record)


def check_appendable(path: str) -> None:
    """Make sure that a record could be appended, before anything is measured.

    Raises:
        NotWrittenError: it could not.
    """
    existed = os.path.exists(path)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "ab"):
            pass
        if not existed and not os.path.getsize(path):
            os.unlink(path)
    except OSError as fault:
        raise NotWrittenError(
            f"Nothing could be written to {path}: {fault.strerror}.", "Name another folder with --records; - is none."
        ) from None


def append_measurement(path: str, measurement: Measurement) -> None:
    """Append one record, whole: one write to a file that others may append to at the same time.

    A line that was cut off by an earlier fault is ended first.

    Raises:
        NotWrittenError: it cannot be, for example because the disk is full; the file is as it was before.
    """
    try:
        text = json.dumps(measurement_record(measurement), separators=(",", ":"), allow_nan=False) + "\n"
    except ValueError as fault:
        raise NotWrittenError(f"The measurement cannot be written: {fault}.", "This is a bug in memplan.") from None
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _append(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise NotWrittenError(
            f"The measurement could not be written to {path}: {fault.strerror}.",
            "Free some space or name another folder with --records; what was measured before is kept.",
        ) from None


def _append(descriptor: int, content: bytes) -> None:
    with _locked(descriptor):
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            content = b"\n" + content
        try:
            written = os.write(descriptor, content)
            if written != len(content):
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise


@contextlib.contextmanager
def _locked(descriptor: int):  # type: ignore[no-untyped-def]
    """Alone with the file, where the system can lock one: ranks of one run write to the same."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
