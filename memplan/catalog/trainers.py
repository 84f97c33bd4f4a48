"""What trainers do by default with the losses of micro-batches: `profiles/trainers/accumulation.toml`, by version.

Which trainer is installed is asked of the installed distributions; nothing is imported.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from memplan.catalog.profiles import read_profile
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NEWEST = (10**9,)


class TrainerRow(NamedTuple):
    """One behaviour of one trainer."""

    trainer: str
    checked: str
    """Versions whose source was read; ``not read`` where a public page says so."""
    tokens: str
    """Weight of a token within a rank: ``same``, ``micro-batch mean`` or ``sample mean``."""
    ranks: str
    """The same over ranks."""
    window: str
    """By what the last, short step is divided: its ``own`` micro-batches, or those of a ``full`` one."""
    says: str
    source: str
    package: str = ""
    since: str = ""
    until: str = ""

    @property
    def versions(self) -> str:
        """From and to, in a few words; empty: one row for all."""
        if self.since and self.until:
            return f"{self.since} to before {self.until}"
        return f"from {self.since}" if self.since else f"before {self.until}" if self.until else ""


class Trainer(NamedTuple):
    """A trainer with what its installed version does, or its newest where none is."""

    row: TrainerRow
    installed: str | None
    """Its version; None: it is not there."""


def read_rows() -> tuple[TrainerRow, ...]:
    """All rows, in the order of the file."""
    return tuple(TrainerRow(**row) for row in read_profile("trainers", "accumulation.toml")["row"])


def find_trainers(installed: Callable[[str], str | None] | None = None) -> tuple[Trainer, ...]:
    """Every trainer once, those that are installed first.

    Args:
        installed: Distribution -> its version, None where it is not there; None: ask this interpreter.
    """
    ask = installed or installed_version
    by_trainer: dict[str, list[TrainerRow]] = {}
    for row in read_rows():
        by_trainer.setdefault(row.trainer, []).append(row)
    found = [_chosen(rows, ask(rows[0].package)) for rows in by_trainer.values()]
    return tuple(sorted(found, key=lambda one: one.installed is None))


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _chosen(rows: Iterable[TrainerRow], installed: str | None) -> Trainer:
    at = NEWEST if installed is None else _numbers(installed)
    rows = tuple(rows)
    fits = [
        row
        for row in rows
        if (not row.since or _numbers(row.since) <= at) and (not row.until or at < _numbers(row.until))
    ]
    return Trainer(fits[-1], installed)


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
