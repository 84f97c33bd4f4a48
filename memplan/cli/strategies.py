"""The option that names ways to pack, of `lengths` and `same-update`."""

from __future__ import annotations

from memplan.cli.values import Row
from memplan.errors import UsageError, did_you_mean
from memplan.sequences.analysis import STRATEGIES


def _read_strategies(text: str, flag: str) -> tuple[str, ...]:
    """Names with commas."""
    names = tuple(one.strip().lower() for one in text.split(",") if one.strip())
    for name in names:
        if name not in STRATEGIES:
            otherwise = f"Known: {', '.join(STRATEGIES)}."
            raise UsageError(
                f"{flag} {name!r} is not known.", did_you_mean(name, list(STRATEGIES), otherwise=otherwise)
            )
    return names


def packing_row(section: str) -> Row:
    """``--packing``."""
    return Row(("--packing",), section, f"Of {', '.join(STRATEGIES)} (bfd).", _read_strategies, "NAMES")
