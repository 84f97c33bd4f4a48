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
    from pathlib import Path

PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder of the `memplan` package itself."""


def profiles_dir() -> Path:
    """The folder that holds `gpus/`, `models/`, `calibration/` and `measurements/`."""
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
