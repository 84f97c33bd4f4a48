"""How near were predictions to measurements, when this version of memplan was made?

A short form of what `memplan validate` says, kept as a file of its own, as validating takes seconds.
"""

from __future__ import annotations

import json
from typing import Any

from memplan.catalog.profiles import profile_path
from memplan.errors import MemplanError

FILE = "accuracy.json"


def read_accuracy() -> dict[str, Any]:
    """The summary (`memplan.report.accuracy.summary`).

    Raises:
        MemplanError: it cannot be read.
    """
    try:
        with open(profile_path(FILE), encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
    except (OSError, ValueError) as fault:
        raise MemplanError(f"{FILE} cannot be read: {fault}.", "Install memplan again.") from None
    return found
