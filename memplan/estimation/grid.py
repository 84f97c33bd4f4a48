"""A whole grid of micro-batches and lengths at once: the same formulas on arrays.

The points are worked through in blocks, so that memory stays bounded whatever the size of the grid; lengths on either
side of an attention window are different programs and go into different blocks, and so are one sequence by itself and
several in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memplan.errors import UsageError
from memplan.estimation.compiled import least
from memplan.estimation.dimensions import dimensions
from memplan.estimation.estimate import SEGMENT_BYTES, context_bytes, workspace_bytes
from memplan.memory.events import Sizes
from memplan.specs.tabular import Tabular
from memplan.specs.training import LARGEST_COUNT
from memplan.specs.values import dataclass, replace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

    from memplan.estimation.estimate import Estimator
    from memplan.specs.training import Setup

LOWER_ENDS = ("least_kept_activation_bytes", "least_peak_process_bytes")
"""Columns of what is told as a range."""

BLOCK_POINTS = 1 << 15
"""Points worked out together: the arrays of a block stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class Grid(Tabular):
    """Bytes at every point; arrays of shape (num_points,)."""

    setup: Setup
    """What all points have in common; its micro-batch and length are placeholders."""
    micro_batch_size: NDArray[np.int64]
    seq_len: NDArray[np.int64]
    kept_activation_bytes: NDArray[np.int64]
    peak_allocated_bytes: NDArray[np.int64]
    peak_process_bytes: NDArray[np.int64]
    least_kept_activation_bytes: NDArray[np.int64] | None = None
    """Under ``torch.compile`` the lower end of a range, whose upper one is above; None without."""
    least_peak_process_bytes: NDArray[np.int64] | None = None
    """The same of the process."""

    def columns(self) -> dict[str, Any]:
        """The columns of the table; lower ends only where there are ranges."""
        lower = {name: getattr(self, name) for name in LOWER_ENDS}
        return {
            "micro_batch_size": self.micro_batch_size,
            "seq_len": self.seq_len,
            "kept_activation_bytes": self.kept_activation_bytes,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_process_bytes": self.peak_process_bytes,
            **{name: values for name, values in lower.items() if values is not None},
        }

    def records(self) -> list[dict[str, Any]]:
        """One row a point, as plain ints."""
        columns = {name: values.tolist() for name, values in self.columns().items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_pandas(self) -> Any:
        """One row a point."""
        return self.frame(self.columns())


def estimate_grid(estimator: Estimator, setup: Setup, micro_batch_size: ArrayLike, seq_len: ArrayLike) -> Grid:
    """Bytes at every pair of a micro-batch and a length.

    Args:
        estimator: The model and the GPU.
        setup: Everything else.
        micro_batch_size: Micro-batches, any shape that broadcasts with `seq_len`.
        seq_len: Tokens per sequence.

    Raises:
        UsageError: a length beyond the model's positions, or a number below 1.
    """
    if setup.evaluation is not None:
        raise UsageError("A grid is of training steps, without an evaluation between them.", "Leave --eval-... out.")
    numbers = _whole("micro_batch", micro_batch_size), _whole("seq_len", seq_len)
    try:
        batches, lengths = np.broadcast_arrays(*numbers)
    except ValueError:
        shapes = " and ".join(str(one.shape) for one in numbers)
        raise UsageError(
            f"micro_batch and seq_len have shapes that do not go together: {shapes}.", "Give one number, or as many."
        ) from None
    batches, lengths = batches.ravel(), lengths.ravel()
    if batches.size:
        for b, s in ((batches.min(), lengths.min()), (batches.max(), lengths.max())):
            _check(estimator, replace(setup, micro_batch_size=int(b), seq_len=int(s)))
    kept = np.empty(batches.shape, np.int64)
    peak = np.empty(batches.shape, np.int64)
    low_kept, low_peak = np.empty_like(kept), np.empty_like(peak)
    steps = setup.gradient_accumulation_steps
    alone = setup.batching == "padding-free"  # a single sequence in the row needs no mask
    for points in blocks(batches > alone, lengths, sorted(estimator.architecture.windows)):
        b, s = batches[points], lengths[points]
        program = estimator.program(replace(setup, micro_batch_size=int(b[0]), seq_len=int(s[0])))
        sizes = Sizes(dimensions(setup, b, s))
        found = program.peaks(sizes, steps)
        kept[points], peak[points] = found.kept_activation_bytes, found.peak
        if setup.compile:
            low_kept[points], low_peak[points] = least(program, sizes, found.by_instant, steps)
    return Grid(
        setup=setup,
        micro_batch_size=batches,
        seq_len=lengths,
        kept_activation_bytes=kept,
        peak_allocated_bytes=peak,
        peak_process_bytes=_process_bytes(peak, estimator),
        least_kept_activation_bytes=low_kept if setup.compile else None,
        least_peak_process_bytes=_process_bytes(low_peak, estimator) if setup.compile else None,
    )


def _process_bytes(peak: NDArray[np.int64], estimator: Estimator) -> NDArray[np.int64]:
    """Of the process where the allocator holds no more than it has to."""
    reserved = -(-peak // SEGMENT_BYTES) * SEGMENT_BYTES
    return reserved + context_bytes(estimator.gpu) + workspace_bytes(estimator.gpu)


def _whole(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """Whole numbers from 1 to 10**9."""
    cure = f"Give {name} as whole numbers from 1 to {LARGEST_COUNT}."
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        raise UsageError(f"{name} is no array.", cure) from None
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"{name} holds {array.dtype} values, not whole numbers.", cure)
    if array.size and not (array.min() >= 1 and array.max() <= LARGEST_COUNT):
        raise UsageError(f"{name} reaches from {array.min()} to {array.max()}.", cure)
    return array.astype(np.int64)


def _check(estimator: Estimator, setup: Setup) -> None:
    """The corners of the grid have to be setups, and their bytes to be numbers that an array can hold."""
    estimator.check(setup)
    if estimator.memory(setup).peak_process_bytes > np.iinfo(np.int64).max:
        raise UsageError(
            f"A micro-batch of {setup.micro_batch_size:,} x {setup.seq_len:,} tokens is beyond what 64 bits count.",
            "Ask for smaller ones.",
        )


def blocks(several: NDArray[np.bool_], lengths: NDArray[np.int64], windows: list[int]) -> Iterator[Any]:
    """Positions of the points, in blocks whose lengths exceed the same windows and which are alike in `several`."""
    if not windows and several.all():
        for start in range(0, lengths.size, BLOCK_POINTS):
            yield slice(start, start + BLOCK_POINTS)
        return
    side = 2 * np.searchsorted(np.asarray(windows, np.int64), lengths, side="left") + several
    for value in np.unique(side):
        positions = np.flatnonzero(side == value)
        for start in range(0, positions.size, BLOCK_POINTS):
            yield positions[start : start + BLOCK_POINTS]
