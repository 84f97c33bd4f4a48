"""Records of files, one after the other: JSON lines, JSON, CSV, Parquet and plain text, as they are or compressed.

    for record in read_records(find_sources("data/*.jsonl.gz")): ...

A record is a dict; a line of plain text is ``{"text": line}``, as the text loader of Hugging Face's datasets has it.
Nothing is read whole but a .json file that is no JSON lines.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from memplan.errors import MemplanError, UsageError
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Record = dict[str, Any]

STDIN = "-"
KIND_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = ".gz"
LISTS = ("data", "train", "rows", "examples")
"""Under which a .json file with one object keeps its records."""
MOST_BAD_SHOWN = 60
"""Characters of a bad line that are quoted."""


class Source(NamedTuple):
    """A file."""

    path: str
    """`STDIN` for what is piped in."""
    kind: str
    """One of the values of `KIND_BY_SUFFIX`; empty: to be told by how it begins."""


def find_sources(data: str) -> list[Source]:
    """The files that `data` names: a file, a folder (all in it that can be read, below it, too), a glob or ``-``.

    Raises:
        UsageError: there are none.
    """
    if data == STDIN:
        return [Source(STDIN, "")]
    path = os.path.expanduser(data)
    if os.path.isfile(path):
        return [Source(path, kind_of(path))]
    if os.path.isdir(path):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        found = [one for one in found if kind_of(one) and not os.path.basename(one).startswith(".")]
    else:
        found = [one for one in glob.glob(path, recursive=True) if os.path.isfile(one)]
    if not found:
        cure = f"Give a file, a folder or a pattern of {', '.join(KIND_BY_SUFFIX)}, or - for stdin."
        raise UsageError(f"There is no data at {data!r}.", cure)
    return [Source(one, kind_of(one)) for one in sorted(found)]


def kind_of(path: str) -> str:
    """What a file holds, by its name; empty where that does not say."""
    name = path.lower().removesuffix(COMPRESSED)
    return KIND_BY_SUFFIX.get(os.path.splitext(name)[1], "")


def read_records(sources: Iterable[Source]) -> Iterator[Record]:
    """The records of all sources.

    Raises:
        MemplanError: a file cannot be read, or holds something else than its name says; the line is named.
    """
    for source in sources:
        try:
            yield from _read(source)
        except (OSError, UnicodeDecodeError, EOFError, csv.Error) as fault:
            raise MemplanError(f"{_name(source)} cannot be read: {fault}.", "Give a file of text in UTF-8.") from None


def _name(source: Source) -> str:
    return "stdin" if source.path == STDIN else source.path


def _read(source: Source) -> Iterator[Record]:
    if source.kind == "parquet":
        yield from _parquet(source.path)
        return
    with _opened(source) as file:
        kind, lines = source.kind, file
        if not kind:
            first = next((line for line in file if line.strip()), "")
            kind = "jsonl" if first.lstrip().startswith("{") else "text"
            yield from READERS[kind](_name(source), _after(first, file))
            return
        yield from READERS[kind](_name(source), lines)


def _after(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


@contextmanager
def _opened(source: Source) -> Iterator[TextIO]:
    if source.path == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise MemplanError("Nothing is piped into stdin.", "Pipe the data in, or name a file.")
        yield sys.stdin
    elif source.path.lower().endswith(COMPRESSED):
        with gzip.open(source.path, "rt", encoding="utf-8", newline="") as file:
            yield file
    else:
        with open(source.path, encoding="utf-8", newline="") as file:
            yield file


def _jsonl(name: str, lines: Iterable[str]) -> Iterator[Record]:
    decode = json.JSONDecoder().raw_decode  # what json.loads calls, without what it does around it: half of its time
    for number, line in enumerate(lines, 1):
        try:
            record, end = decode(line)
        except ValueError:
            record, end = None, 0
        if type(record) is not dict or line[end:].strip():
            if not line.strip():
                continue
            record = _record(_loaded(line, name, number), f"{name}, line {number:,}")
        yield record


def _loaded(line: str, name: str, number: int) -> Any:
    """The line by the rules of JSON, spaces before it among them; what it breaks is named."""
    try:
        return json.loads(line)
    except ValueError:
        quoted = line.strip()[:MOST_BAD_SHOWN]
        raise MemplanError(f"{name}, line {number:,} is no JSON: {quoted!r}.", "Mend the line.") from None


def _json(name: str, lines: Iterable[str]) -> Iterator[Record]:
    text = "".join(lines)
    try:
        content = json.loads(text)
    except ValueError:  # JSON lines under another name
        yield from _jsonl(name, io.StringIO(text))
        return
    if isinstance(content, dict):
        kept = next((content[key] for key in LISTS if isinstance(content.get(key), list)), None)
        content = [content] if kept is None else kept
    if not isinstance(content, list):
        raise MemplanError(f"{name} holds no list of records.", "Give a list of objects.")
    for number, record in enumerate(content, 1):
        yield _record(record, f"{name}, record {number:,}")


def _record(record: Any, where: str) -> Record:
    if isinstance(record, str):
        return {"text": record}
    if isinstance(record, list):
        return {"messages": record}
    if not isinstance(record, dict):
        raise MemplanError(f"{where} is no record: {str(record)[:MOST_BAD_SHOWN]!r}.", "Give an object with fields.")
    return record


def _csv(name: str, lines: Iterable[str]) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    yield from csv.DictReader(lines, dialect="excel-tab" if ".tsv" in name.lower() else "excel")


def _text(_: str, lines: Iterable[str]) -> Iterator[Record]:
    for line in lines:
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


READERS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "text": _text}


def _parquet(path: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        cure = "Install it with pip install 'memplan[parquet]'."
        raise MemplanError(f"{path} needs pyarrow, which is not installed.", cure) from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except ArrowException as fault:
        raise MemplanError(f"{path} cannot be read: {fault}.", "Give a Parquet file.") from None
