"""What two witnesses of one configuration, the formula and a trace of the real module, differ in."""

from __future__ import annotations

from memplan.specs.values import NamedTuple

FORMULA, TRACE = "formula", "trace"


class KeptRow(NamedTuple):
    """Storages of one size that one of the two witnesses keeps in equal places."""

    witness: str
    """``formula`` or ``trace``."""
    module: str
    tensor: str
    dtype: str
    num_bytes: int
    """Allocated, of one."""
    num: int
    """Negative: released."""


class KeptDifference(NamedTuple):
    """A size of which the two do not keep equally many."""

    num_bytes: int
    num_in_formula: int
    num_in_trace: int
    rows: tuple[KeptRow, ...]
    """Everything of this size."""


class Compared(NamedTuple):
    """One number by both."""

    name: str
    formula: int
    trace: int

    @property
    def percent(self) -> float:
        """The formula's less the trace's, as a share of the trace's."""
        return 100 * (self.formula / self.trace - 1) if self.trace else 0.0


class Difference(NamedTuple):
    """Formula against trace."""

    totals: tuple[Compared, ...]
    instants: tuple[Compared, ...]
    kept: tuple[KeptDifference, ...]
