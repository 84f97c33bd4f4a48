"""What is added to the bytes of a process, so that a run that needs a little more does not fail."""

from __future__ import annotations

import math

from memplan.specs.values import NamedTuple


class Margin(NamedTuple):
    """Bytes, and a share of what is predicted."""

    num_bytes: int = 0
    """Headroom and what is reserved for others."""
    ratio: float = 0.0
    """Share of the predicted process bytes: how far a calibrated bound lies above them."""

    def upper_bound(self, process_bytes: int) -> int:
        """The bytes that have to be there for a process of so many."""
        return process_bytes + math.ceil(process_bytes * self.ratio) + self.num_bytes

    def budget(self, usable_bytes: int) -> int:
        """The most bytes of a process whose upper bound is within `usable_bytes`; 0 where there is none."""
        most = max(int((usable_bytes - self.num_bytes) / (1 + self.ratio)) + 1, 0)
        while most > 0 and self.upper_bound(most) > usable_bytes:
            most -= 1
        return most


NONE = Margin()
