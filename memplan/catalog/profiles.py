"""Where the checked-in data lies, and how one file of it is read.

The data is one folder of TOML files: `profiles/` at the root of a checkout, `memplan/profiles/` in an installed
package.  Every caller names the one file it needs; nothing here lists or reads a whole folder.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder of the `memplan` package itself."""


def profiles_dir() -> Path:
    """The folder that holds `gpus/`, `models/`, `matrix/`, `published/`, `calibration/` and `measurements/`."""
    from pathlib import Path  # here, because single look-ups do without it

    return Path(profile_path())


def profile_path(*parts: str) -> str:
    """The path of something in the profiles folder: `profile_path("gpus", "t4.toml")`."""
    installed = os.path.join(PACKAGE_FOLDER, "profiles")
    if os.path.isdir(installed):
        return os.path.join(installed, *parts)
    return os.path.join(os.path.dirname(PACKAGE_FOLDER), "profiles", *parts)


def read_profile(*parts: str) -> dict[str, Any]:
    """The content of one TOML file of the profiles folder.

    Raises:
        FileNotFoundError: when there is no such file; the caller knows what its name stood for.
        MemplanError: when the file is not TOML.
    """
    path = profile_path(*parts)
    with open(path, "rb") as file:
        content = file.read()
    try:
        return cut_profile(content.decode())
    except ValueError:
        pass  # it is written in another way, or not TOML
    try:
        return parse_toml(content)
    except ValueError as fault:
        raise MemplanError(
            f"The profile {path} is not valid TOML: {fault}.", "Reinstall memplan or mend the file."
        ) from fault


def parse_toml(content: bytes) -> dict[str, Any]:
    """A TOML file's content; `ValueError` (which `TOMLDecodeError` is) where it is not TOML in UTF-8."""
    if sys.version_info >= (3, 11):  # here, because a look-up that reads no TOML does without the parser
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(content.decode())


def cut_profile(text: str) -> dict[str, Any]:
    """The content of a profile in the form in which all are written, cut at its marks: importing a parser takes longer.

    A line is a table's name, ``key = value`` or ``key = { value = value, source = "..." }``, where a value is a number,
    a string, an array, or a text in three quotes of which some lines end with a backslash; an array may have a line for
    each of its values.

    Raises:
        ValueError: a line has another form.
    """
    found: dict[str, Any] = {}
    table = found
    lines = iter(text.splitlines())
    for line in lines:
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            name, closed, rest = line[1:].partition("]")
            if not (closed and _is_key(name)) or name in found or rest.strip()[:1] not in ("", "#"):
                raise ValueError(line)
            table = found[name] = {}
            continue
        key, _, value = line.partition(" = ")
        if not _is_key(key) or key in table:
            raise ValueError(line)
        table[key] = _cut_text(lines) if value == '"""' else _cut_array(lines) if value == "[" else _cut_entry(value)
    return found


def _is_key(text: str) -> bool:
    return text.isascii() and text.replace("_", "").replace("-", "").isalnum()


def _cut_entry(text: str) -> Any:
    """A value, or one with its source."""
    if not text.startswith("{"):
        return _cut_value(text)
    value, comma, source = text.partition(", source = ")
    if not (value.startswith("{ value = ") and comma and source.endswith(" }")):
        raise ValueError(text)
    return {"value": _cut_value(value[10:]), "source": _cut_value(source[:-2])}


def _cut_value(text: str) -> Any:
    """A number, a string or an array of strings; of the last two JSON's are TOML's."""
    import json

    if text.startswith(("[", '"')):
        return json.loads(text)
    digits = text.replace("_", "")
    if not digits.isdigit() and not digits.replace(".", "").replace("e", "").isdigit():
        raise ValueError(text)
    return int(digits) if digits.isdigit() else float(digits)


def _cut_array(lines: Iterator[str]) -> list[Any]:
    """The lines up to a bracket, one value and a comma each."""
    values: list[Any] = []
    for line in lines:
        if line == "]":
            return values
        if not line.endswith(","):
            raise ValueError(line)
        values.append(_cut_value(line[:-1].strip()))
    raise ValueError("an array does not end")


def _cut_text(lines: Iterator[str]) -> str:
    """The lines up to three quotes; one that ends with a backslash goes on in the next."""
    text = ""
    for line in lines:
        last = line.endswith('"""')
        part = line[:-3] if last else line
        goes_on = part.endswith("\\")
        text += part[:-1] if goes_on else part if last else f"{part}\n"
        if "\\" in part[: -1 if goes_on else None] or '"""' in part or (goes_on and last):
            raise ValueError(line)
        if last:
            return text
    raise ValueError(text)
