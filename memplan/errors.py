"""Faults, as one small exception tree.

An answer is never an exception: "does not fit" is a value.  A fault is one sentence of cause and one of cure; the
command line prints both on stderr and ends with the exit status of the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class MemplanError(Exception):
    """Something could not be read or modelled (exit status 1)."""

    exit_status = 1

    def __init__(self, cause: str, cure: str = "") -> None:
        super().__init__(f"{cause} {cure}".strip())
        self.cause = cause
        """One sentence: what went wrong, and where."""
        self.cure = cure
        """One sentence: what to do next."""


class UsageError(MemplanError):
    """A value or a combination of values that has no meaning (exit status 2)."""

    exit_status = 2


class ConfigError(MemplanError):
    """A model configuration that cannot be read or contradicts itself."""


class NotModelledError(MemplanError):
    """A way of training that no formula describes yet."""


class UnknownModelError(MemplanError):
    """A model or architecture that memplan has no description of."""


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str) -> str:
    """The cure for an unknown name: the nearest known ones, else the sentence `otherwise`."""
    from difflib import get_close_matches

    folded = {candidate.lower(): candidate for candidate in known}
    near = get_close_matches(name.lower(), list(folded), n=3, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(folded[match] for match in near) + "?"
    return otherwise
