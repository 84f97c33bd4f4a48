"""What measurements on one card have taught: what it charges beside tensors, how fast it is, how wrong memplan was."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from memplan.specs.values import NamedTuple, dataclass, field

if TYPE_CHECKING:
    from collections.abc import Mapping


class Regime(NamedTuple):
    """Reserved bytes over what the replay says of them, under like conditions."""

    name: str
    """``free``: memory is no object; ``tight``: the card is nearly full, so that the allocator frees its cache."""
    num: int
    """Records behind it."""
    reserved_over_allocated: float
    """Median of reserved over allocated bytes, as measured."""
    reserved_over_predicted: float
    """Median of measured over predicted reserved bytes."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One card and software stack."""

    gpu: str
    """Catalogue id of the card, else its name as a file has it."""
    card_name: str
    """As the driver calls it."""
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Library -> version."""
    first: str
    """When the first record was measured, UTC."""
    last: str
    num_fitted: int
    """Records that the coefficients come from."""
    context_bytes: int | None = None
    """Process bytes less reserved bytes in steady state, median: context, kernels, libraries."""
    workspace_bytes: int | None = None
    """What cuBLAS holds in the allocator, the most."""
    regimes: tuple[Regime, ...] = ()
    flops_fraction: float | None = None
    """Achieved over peak FLOP/s of matrix products."""
    bandwidth_fraction: float | None = None
    """Achieved over peak bandwidth of everything else."""
    launch_s: float | None = None
    """Seconds that an operator takes at least, and the host with it."""
    scores: tuple[float, ...] = ()
    """(measured - predicted) / predicted process bytes of the other records, ascending."""
    num_exceeded: int = 0
    """Of the other records those that ran out of memory where the prediction says that they fit: scores without a
    number."""

    @property
    def all_scores(self) -> tuple[float, ...]:
        """With infinity for the runs that ran out of memory against the prediction."""
        return (*self.scores, *(inf for _ in range(self.num_exceeded)))

    @property
    def name(self) -> str:
        """Card and stack in one line."""
        torch = self.versions.get("torch")
        return f"{self.card_name}{f', torch {torch}' if torch else ''}"
