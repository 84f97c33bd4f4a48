"""How does memory grow with the micro-batch and with the length, around one configuration, and what takes over?

At each point the bytes of the process by kind, at the peak of the step; the allocator holds the least it can (whole
segments of 2 MiB), as nothing is replayed.  Beside it the formula of the kept activations (`memplan.estimation.kept`)
and the first micro-batch and length at which they take more than parameters, gradients and optimizer states together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.estimation.dimensions import dimensions
from memplan.estimation.estimate import process_rows
from memplan.estimation.kept import kept_formula
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.estimation.estimate import Estimator
    from memplan.estimation.kept import Kept
    from memplan.specs.training import Setup

NUM_POINTS = 8
STEPS_TO_IT = 4
"""Points up to the configuration itself, which lies in the middle."""

MICRO_BATCH, LENGTH = "micro_batch_size", "seq_len"
"""The fields of a setup that are looked along."""

LARGEST_LOOKED_AT = 1 << 20
"""Micro-batches and lengths beyond it are not looked for."""


class GrowthPoint(NamedTuple):
    """The bytes of one size."""

    size: int
    """The micro-batch, or the length."""
    by_kind: tuple[tuple[str, int], ...]
    """(kind, bytes) at the peak of the process, in the order of the ledger."""


class TakeOver(NamedTuple):
    """From where on activations take more than what does not grow."""

    micro_batch_size: int | None
    """At the length of the configuration; None: at none of up to `LARGEST_LOOKED_AT`."""
    seq_len: int | None
    """At its micro-batch; None: at none that the model has positions for."""


class Growth(NamedTuple):
    """How memory grows around a configuration."""

    setup: Setup
    by_length: tuple[GrowthPoint, ...]
    """Ascending; empty where the length means nothing or is fixed."""
    by_micro_batch: tuple[GrowthPoint, ...]
    kept: Kept
    kept_bytes: int
    """What the forward pass keeps at the configuration, rounded as the allocator does."""
    state_bytes: int
    """Parameters, gradients and optimizer states."""
    takes_over: TakeOver
    windows: tuple[int, ...]
    """Lengths beyond which attention is another one, and so is the formula."""


def growth(estimator: Estimator, setup: Setup) -> Growth:
    """Around `setup`."""
    program, sizes = estimator.program(setup), estimator.sizes(setup)
    states = program.parameter_bytes(sizes) + program.gradients.total(sizes) + program.optimizer_states.total(sizes)

    def axis(name: str) -> tuple[GrowthPoint, ...]:
        found = [(size, estimator.other(setup, **{name: size})) for size in around(getattr(setup, name))]
        return tuple(_point(estimator, one, size) for size, one in found if one is not None)

    def takes_over(name: str) -> int | None:
        def does(size: int) -> bool | None:
            one = estimator.other(setup, **{name: size})
            return None if one is None else int(estimator.peaks(one).kept_activation_bytes) > states

        return first_that_does(does)

    return Growth(
        setup=setup,
        by_length=axis(LENGTH),
        by_micro_batch=axis(MICRO_BATCH),
        kept=kept_formula(program, dimensions(setup), supervised=setup.supervised, is_one_row=bool(setup.is_flattened)),
        kept_bytes=int(estimator.peaks(setup).kept_activation_bytes),
        state_bytes=int(states),
        takes_over=TakeOver(takes_over(MICRO_BATCH), takes_over(LENGTH)),
        windows=tuple(sorted(estimator.architecture.windows)),
    )


def around(size: int) -> list[int]:
    """Quarters of `size` up to its double, itself among them; of small ones the first numbers."""
    if size < STEPS_TO_IT:
        return list(range(1, NUM_POINTS + 1))
    return [size * n // STEPS_TO_IT for n in range(1, NUM_POINTS + 1)]


def _point(estimator: Estimator, setup: Setup, size: int) -> GrowthPoint:
    by_kind: dict[str, int] = {}
    for row in (*estimator.rows(setup), *process_rows(estimator.memory(setup))):
        by_kind[row.kind] = by_kind.get(row.kind, 0) + row.bytes_at_peak
    return GrowthPoint(size, tuple(by_kind.items()))


def first_that_does(does: Callable[[int], bool | None]) -> int | None:
    """The first size from 1 on, of those up to the first for which there is no answer (None); bytes never fall."""
    low, high = 0, 1
    while not does(high):
        if does(high) is None or high >= LARGEST_LOOKED_AT:
            break
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if does(middle) is False:
            low = middle
        else:
            high = middle
    return high if does(high) else None
