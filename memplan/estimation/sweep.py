"""Which points of a grid of micro-batches and lengths fit on a card, and how sure that is.

    oom    even the least that the caching allocator can hold is too much: the tensors, in whole segments of 2 MiB
    fits   the run as it was replayed through the allocator with its default settings is within the budget
    tight  between the two: the tensors fit, and how the allocator cuts its segments decides

A replay takes some hundredths of a second, a point of the grid a millionth.  So only the boundary is replayed, the
largest micro-batch of a length, and it stands for what is smaller: a run that fits is taken to fit with fewer sequences
or shorter ones, too.  Of many lengths some are replayed; the others go by the next longer one that was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memplan.errors import UsageError
from memplan.estimation.estimate import EXPANDABLE_SEGMENTS
from memplan.estimation.grid import estimate_grid
from memplan.specs.margin import NONE as NO_MARGIN
from memplan.specs.pictured import PicturedMap
from memplan.specs.tabular import Tabular
from memplan.specs.values import NamedTuple, dataclass, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from memplan.estimation.estimate import Estimator, ModelSummary
    from memplan.estimation.grid import Grid
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.margin import Margin
    from memplan.specs.training import Setup

    Notify = Callable[[str], None]

MOST_POINTS = 200_000
"""A table of more is not for a screen or a spreadsheet: `memplan.estimate_grid` gives arrays."""

MOST_LENGTHS_REPLAYED = 8
"""Spread over all of them, the shortest and the longest included."""


class Largest(NamedTuple):
    """The largest micro-batch of the sweep that fits at one length; None where none does."""

    seq_len: int
    micro_batch_size: int | None
    """As replayed with the allocator's default settings."""
    with_expandable_segments: int | None
    """As replayed with ``PYTORCH_ALLOC_CONF=expandable_segments:True``, at least the one above."""
    at_the_least: int | None
    """If the allocator held no more than it has to: from the next one on it is out of memory."""
    is_replayed: bool
    """Whether runs of this length were replayed where that matters, or runs of the next longer length that was."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Tabular, PicturedMap):
    """Bytes and verdicts over a grid; records go by micro-batch, and for each by length."""

    model: ModelSummary
    gpu: GpuSpec | None
    micro_batch_sizes: tuple[int, ...]
    """Ascending."""
    seq_lens: tuple[int, ...]
    """Ascending."""
    grid: Grid
    margin: Margin
    """What has to stay free beside the process."""
    largest: tuple[Largest, ...]
    """One a length; empty without a GPU."""
    num_replays: int
    unmodelled: tuple[tuple[str, str], ...]

    @property
    def fits(self) -> bool | None:
        """Whether any point does, with expandable segments where need be; None without a GPU."""
        if self.gpu is None:
            return None
        return any(one.with_expandable_segments is not None for one in self.largest)

    def verdicts(self) -> list[str | None]:
        """``fits``, ``tight`` or ``oom`` of every point; None without a GPU."""
        if self.gpu is None:
            return [None] * len(self.grid.seq_len)
        most = np.array([one.micro_batch_size or 0 for one in self.largest])
        fits = np.asarray(self.micro_batch_sizes)[:, None] <= most
        oom = self.grid.peak_process_bytes > self.margin.budget(self.gpu.usable_bytes)
        found: list[str | None] = np.where(oom, "oom", np.where(fits.ravel(), "fits", "tight")).tolist()
        return found

    def columns(self) -> dict[str, list[Any]]:
        """The columns of the table, as plain values."""
        grid, gpu = self.grid, self.gpu
        process = grid.peak_process_bytes.tolist()
        upper = [self.margin.upper_bound(one) for one in process]
        return {
            **{name: values.tolist() for name, values in grid.columns().items()},
            "upper_bound_bytes": upper,
            "headroom_bytes": [None] * len(upper) if gpu is None else [gpu.usable_bytes - one for one in upper],
            "verdict": self.verdicts(),
        }

    def records(self) -> list[dict[str, Any]]:
        """One row a point."""
        columns = self.columns()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_pandas(self) -> Any:
        """One row a point."""
        return self.frame(self.columns())


def sweep(
    estimator: Estimator,
    setup: Setup,
    micro_batch_sizes: Sequence[int],
    seq_lens: Sequence[int],
    *,
    margin: Margin = NO_MARGIN,
    notify: Notify | None = None,
) -> Sweep:
    """Bytes at every pair of a micro-batch and a length, and what fits on the estimator's card.

    Args:
        estimator: The model and the GPU.
        setup: Everything else.
        micro_batch_sizes: Each once.
        seq_lens: Each once.
        margin: What has to stay free beside the process.
        notify: Is told what is being replayed.

    Raises:
        UsageError: too many points, a length beyond the model's positions, or a setup that it does not have.
    """
    batches, lengths = sorted(micro_batch_sizes), sorted(seq_lens)
    _check_points(len(batches), len(lengths))
    if notify is not None:
        notify(f"estimating {len(batches) * len(lengths):,} points")
    grid = estimate_grid(estimator, setup, np.array(batches)[:, None], np.array(lengths))
    boundary = _Boundary(estimator, setup, batches, margin, notify)
    largest: tuple[Largest, ...] = ()
    if estimator.gpu is not None:
        process = grid.peak_process_bytes.reshape(len(batches), len(lengths))
        largest = boundary.find(lengths, (process <= boundary.budget).sum(axis=0))
    example = replace(setup, micro_batch_size=batches[0], seq_len=lengths[0])
    return Sweep(
        model=estimator.summary(example),
        gpu=estimator.gpu,
        micro_batch_sizes=tuple(batches),
        seq_lens=tuple(lengths),
        grid=grid,
        margin=margin,
        largest=largest,
        num_replays=boundary.num_replays,
        unmodelled=estimator.unmodelled(example),
    )


def _check_points(num_batches: int, num_lengths: int) -> None:
    if num_batches * num_lengths > MOST_POINTS:
        raise UsageError(
            f"{num_batches:,} micro-batches x {num_lengths:,} lengths are {num_batches * num_lengths:,} points.",
            f"A sweep has {MOST_POINTS:,} at most: ask for fewer, or for arrays with memplan.estimate_grid in Python.",
        )


def spread(num: int, most: int) -> list[int]:
    """Positions of `most` out of `num` (of all where they are fewer), evenly, the first and the last included."""
    if num <= most:
        return list(range(num))
    return sorted({round(n * (num - 1) / (most - 1)) for n in range(most)})


class _Boundary:
    """Looks for the largest micro-batch of each length; positions stand for micro-batches, -1 for none."""

    def __init__(
        self, estimator: Estimator, setup: Setup, batches: Sequence[int], margin: Margin, notify: Notify | None
    ) -> None:
        self.estimator = estimator
        self.setup = setup
        self.batches = batches
        self.notify = notify
        self.position = ""
        self.budget = 0 if estimator.gpu is None else margin.budget(estimator.gpu.usable_bytes)
        self.num_replays = 0

    def find(self, lengths: Sequence[int], num_least: NDArray[np.int64]) -> tuple[Largest, ...]:
        """One a length, from how many micro-batches fit at the least."""
        open_ones = [n for n in spread(len(lengths), MOST_LENGTHS_REPLAYED) if num_least[n]]
        replayed = {*open_ones, *np.flatnonzero(num_least)[-1:].tolist()}
        found = []
        plain = expandable = -1
        for n in reversed(range(len(lengths))):
            top = int(num_least[n]) - 1
            if n in replayed:
                self.position = f"{1 + sum(n < one for one in replayed)}/{len(replayed)}"
                plain = self._last_that_fits(lengths[n], "", plain, top)
                expandable = self._last_that_fits(lengths[n], EXPANDABLE_SEGMENTS, max(plain, expandable), top)
            found.append(
                Largest(
                    lengths[n],
                    self._batch(plain),
                    self._batch(expandable),
                    self._batch(top),
                    n in replayed or top == expandable == plain,
                )
            )
        return tuple(reversed(found))

    def _batch(self, position: int) -> int | None:
        return None if position < 0 else self.batches[position]

    def _last_that_fits(self, seq_len: int, alloc_conf: str, low: int, high: int) -> int:
        """The last position up to `high` that fits as replayed; `low` is one that does."""
        if high > low and self._fits(high, seq_len, alloc_conf):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(middle, seq_len, alloc_conf):
                low = middle
            else:
                high = middle
        return low

    def _fits(self, position: int, seq_len: int, alloc_conf: str) -> bool:
        batch = self.batches[position]
        if self.notify is not None:
            self.notify(f"{self.position} replaying {batch:,} x {seq_len:,} tokens through the allocator")
        self.num_replays += 1
        setup = replace(self.setup, micro_batch_size=batch, seq_len=seq_len)
        return self.estimator.replayed_memory(setup, self.budget, alloc_conf).peak_process_bytes <= self.budget
