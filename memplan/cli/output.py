"""Where an answer goes: stdout, or a file that is written whole or not at all."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.report.ansi import join, wants_colour
from memplan.report.layout import ASCII

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TextIO

    from memplan.cli.values import Options
    from memplan.report.ansi import Line

DOES_NOT_FIT = 3
"""The exit status where the answer is that it does not fit."""


def write_answer(
    document: Mapping[str, Any],
    *,
    format: str,  # noqa: A002 -- the option's name
    output: str | None,
    quiet: bool,
    lines: Callable[[], Sequence[Line]],
    records: Callable[[], Sequence[Mapping[str, Any]]],
    page: Callable[[], str] | None = None,
) -> None:
    """Write `document` in the format that was asked for, to stdout or to the file `output`.

    Args:
        document: The answer as plain data.
        format: One of `memplan.cli.values.FORMATS`.
        output: The file; None or ``-``: stdout.
        quiet: Say nothing beside the answer.
        lines: The answer as text.
        records: The answer as rows.
        page: The answer as a page, where it shows more than the page of `document` alone.
    """
    to_file = output if output not in {None, "-"} else None
    if to_file is None and sys.stdout is None:  # closed by whoever started the program
        raise MemplanError("There is no stdout to write the answer to.", "Write it to a file, with --output FILE.")
    if format == "json":
        import json

        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    elif format == "csv":
        from memplan.report.tables import render_csv

        text = render_csv(records())
    elif format == "markdown":
        from memplan.report.tables import render_markdown

        text = render_markdown(records())
    elif format == "html":
        from memplan.report.pages.answers import page_of

        text = page_of(dict(document)) if page is None else page()
        if to_file is None:
            write_page(text)
            return
    else:
        text = join(lines(), colour=to_file is None and wants_colour(sys.stdout, os.environ))
    if to_file is None:
        write_stdout(text)
    else:
        write_file(to_file, text)
        say(f"written to {to_file}", quiet=quiet)


def say(text: str, *, quiet: bool) -> None:
    """A word on stderr, beside the result."""
    if not quiet:
        write_stderr(f"{on_screen(f'memplan: {text}')}\n")


def say_bound(options: Options) -> None:
    """A word where measurements do not vouch for the confidence that was asked for."""
    if options.confidence is None:
        return
    if options.gpu is None:
        say("--confidence has no effect without --gpu", quiet=options.quiet)
        return
    from memplan import api
    from memplan.safety import find_safety

    gpu, _ = api.find_gpu(options.gpu, options.gpus)
    said = find_safety(gpu, options.headroom, options.confidence).said
    if said:
        say(f"--confidence: {said}", quiet=options.quiet)


def say_every(checkpointing: str | None, num_layers: int, *, quiet: bool) -> None:
    """A word where every-N reaches the first layer alone."""
    if checkpointing is not None and checkpointing.startswith("every-") and int(checkpointing[6:]) >= num_layers:
        layers = f"the model has {num_layers} layer{'' if num_layers == 1 else 's'}"
        say(f"--checkpointing {checkpointing}: {layers}, so only the first is checkpointed", quiet=quiet)


def on_screen(text: str) -> str:
    """A sentence for stderr: a terminal gets lines broken between words, anything else one line."""
    if sys.stderr is None or not sys.stderr.isatty():
        return text
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def write_stderr(text: str) -> None:
    """The text, where there is a stderr and somebody reads it."""
    if sys.stderr is None:  # closed by whoever started the program
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _forget(sys.stderr)


def write_page(page: str | bytes) -> None:
    """A page or a picture on stdout.

    Raises:
        MemplanError: it cannot be written.
    """
    if sys.stdout is None:
        raise MemplanError("There is no stdout to write the answer to.", "Write it to a file, with --output FILE.")
    if isinstance(page, str):
        write_stdout(declared(page, getattr(sys.stdout, "encoding", None) or "utf-8"))
        return
    try:
        sys.stdout.buffer.write(page)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        _forget(sys.stdout)
    except OSError as fault:
        _forget(sys.stdout)
        raise MemplanError(
            f"The answer could not be written to stdout: {fault.strerror}.", "Write it elsewhere, with --output FILE."
        ) from None


def write_stdout(text: str) -> None:
    """The text, in characters that stdout has; a reader that has gone is no fault.

    Raises:
        MemplanError: it cannot be written, for example because the disk is full.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(encodable(text, encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        _forget(sys.stdout)
    except OSError as fault:
        _forget(sys.stdout)
        raise MemplanError(
            f"The answer could not be written to stdout: {fault.strerror}.", "Write it elsewhere, with --output FILE."
        ) from None


def encodable(text: str, encoding: str) -> str:
    """`text`, where the encoding has no blocks with ``#`` for them, and with escapes for all else that it has not."""
    try:
        text.encode(encoding)
    except UnicodeError:
        return text.translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text


def declared(page: str, encoding: str) -> str:
    """A page for a stream of that encoding: it says that it is UTF-8, so where it will not be it has ASCII alone."""
    if encoding.lower().replace("_", "-") in {"utf-8", "utf8"}:
        return page
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _forget(stream: TextIO) -> None:
    """What is still in the buffer goes nowhere, so that the interpreter's own flush at the end does not fail again."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # it has no file behind it
        pass


def write_file(path: str, text: str | bytes, *, flag: str = "--output") -> None:
    """Write to a temporary file beside `path` and rename it; what is no regular file is written as it is.

    Raises:
        MemplanError: it cannot be written; nothing is left behind.
    """
    content = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
    try:
        target = os.path.realpath(path)
        if os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target):
            with open(target, "wb") as file:
                file.write(content)
        else:
            _replace(target, content)
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault)
        raise MemplanError(
            f"{path} could not be written: {reason}.", f"Give {flag} a file in a folder that exists and is writable."
        ) from None


def _replace(target: str, content: bytes) -> None:
    if os.path.isdir(target):
        raise IsADirectoryError(21, "it is a folder")
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:100]}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
