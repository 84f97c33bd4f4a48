"""How is a pickle of plain values read without running anything that it says?

A pickle is a program: one that names a function and its arguments runs them when it is loaded.  Here the program is
read first, instruction by instruction, and refused unless it only builds dicts, lists, tuples of numbers, strings,
bytes, numbers, booleans and None; only then is it loaded, by an unpickler that would refuse any name once more.

Limits: bytes of the file, and how deep containers are nested.  Tuples may hold numbers only, because the hash of a
tuple of tuples of tuples ... overflows Python's stack; the tuples of a memory snapshot are pairs of ints.

Source: the instructions are those of Lib/pickletools.py, protocols 2 to 5, in binary forms as `pickle.dump` writes
them.  Left out: protocols 0 and 1, which have instructions as text.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any, NoReturn

from memplan.errors import ConfigError

MAX_DEPTH = 64
"""Containers that may be open at once; a memory snapshot has five."""

_LONG = rb"\x8a(?:" + b"|".join(b"\\x%02x" % n + b"." * n for n in range(10)) + rb")"
_NUMBER = rb"(?:K.|M..|J....|" + _LONG + rb"|G........)"
_STEADY = re.compile(
    # A run of instructions of fixed length that open no container: what the memo takes, None, booleans, empty
    # containers, a pair into a dict, an item into a list; what the memo gives; tuples of numbers; numbers.  Runs are
    # cut at 4096, because the matcher remembers every step of one.
    rb"(?:[\x94N\x88\x89}\])sa]|[hq].|j....|"
    rb"%b{2}\x86|%b\x85|%b{3}\x87|%b){1,4096}" % ((_NUMBER,) * 4),
    re.DOTALL,
)
_OPEN = b"("[0]
_STEP_BY_CODE = {_OPEN: 1, b"u"[0]: -1, b"e"[0]: -1}
"""Instruction -> containers opened: a mark is set, or used up by the pairs of a dict or the items of a list."""

_LENGTH_BYTES = {0x8C: 1, b"X"[0]: 4, 0x8D: 8, b"C"[0]: 1, b"B"[0]: 4, 0x8E: 8}
"""Instruction -> bytes of the length that follows it: strings and bytes."""

_LONG_PUT, _FRAME, _STOP = b"r"[0], 0x95, b"."[0]


def load_plain(data: bytes, *, source: str, cure: str) -> Any:
    """The plain value that a pickle describes.

    Args:
        data: the whole file.
        source: how error messages call the file.
        cure: what to do where it cannot be read.

    Raises:
        ConfigError: it is truncated, is no pickle, or does anything but build plain values.
    """
    _check(data, source, cure)
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"{source} is not a whole pickle: {str(error)[:120]}.", cure) from error
    except (MemoryError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{source} does not fit into memory.", cure) from error


class _PlainUnpickler(pickle.Unpickler):
    """Knows no name: the second lock behind `_check`."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError("it names a class or function")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside the file")


def _check(data: bytes, source: str, cure: str) -> None:
    """Walk over the instructions to the last one; a `ConfigError` at the first that is not known to be harmless."""
    if data[:1] != b"\x80" or len(data) < 2:
        raise ConfigError(f"{source} is not a pickle of protocol 2 or later.", cure)
    at, depth, end = 2, 0, len(data)
    while (at := _skip_steady(data, at)) < end:
        code = data[at]
        if code == _STOP:
            return
        if code == _OPEN and depth >= MAX_DEPTH:
            raise ConfigError(f"{source} nests containers more than {MAX_DEPTH} deep.", cure)
        if code in _STEP_BY_CODE:
            depth += _STEP_BY_CODE[code]
            at += 1
        elif code in _LENGTH_BYTES:
            width = _LENGTH_BYTES[code]
            at += 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little")
        elif code == _FRAME:
            at += 9
        elif code == _LONG_PUT and int.from_bytes(data[at + 1 : at + 5], "little") < end:
            at += 5  # the memo is an array as long as its highest index: one that is no larger than the file
        else:
            raise ConfigError(
                f"{source} holds more than plain values (instruction 0x{code:02x} at byte {at}); it was not loaded.",
                "A file that runs code when it is read may be an attack. " + cure,
            )
    raise ConfigError(f"{source} is truncated.", cure)


def _skip_steady(data: bytes, at: int) -> int:
    at = min(at, len(data))
    while (run := _STEADY.match(data, at)) is not None:
        at = run.end()
    return at
