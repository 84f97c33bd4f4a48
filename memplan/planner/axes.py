"""Which sizes and choices lie around a plan?

Numbers in doublings, lengths as far as the model has positions, names that are common, and always the plan's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.planner.levers import SHORTEST
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from memplan.estimation.estimate import Estimator
    from memplan.specs.training import Setup

PRECISIONS = ("bf16", "bf16-mixed", "fp32")
CHECKPOINTINGS = ("none", "selective", "full")
OPTIMIZERS = ("adamw", "adamw-8bit", "lion", "sgd")
RANKS = (8, 16, 64)
MICRO_BATCHES, ACCUMULATIONS, GPUS = 32, 64, 8
"""Up to here in doublings, and up to twice the plan's own."""
NUM_MICRO_BATCHES, NUM_LENGTHS = 7, 7
MOST_BYTES = 2**50
"""No length is offered at which 64 bits might not count what there is."""


class Axes(NamedTuple):
    """What each choice may be; the plan's own is always among them."""

    precision: tuple[str, ...]
    lora_rank: tuple[int | None, ...]
    activation_checkpointing: tuple[str, ...]
    optimizer: tuple[str, ...]
    micro_batch_size: tuple[int, ...]
    seq_len: tuple[int, ...]
    gradient_accumulation_steps: tuple[int, ...]
    data_parallel_size: tuple[int, ...]


def axes_of(estimator: Estimator, setup: Setup) -> Axes:
    """The choices around `setup`."""
    micro = _with_doublings(MICRO_BATCHES, setup.micro_batch_size)[-NUM_MICRO_BATCHES:]
    micro = tuple(sorted({*micro, setup.micro_batch_size}))
    rank = None if setup.lora is None else setup.lora.rank
    return Axes(
        precision=tuple(dict.fromkeys((*PRECISIONS, setup.precision))),
        lora_rank=(None, *sorted({*RANKS, *(() if rank is None else (rank,))})),
        activation_checkpointing=tuple(dict.fromkeys((*CHECKPOINTINGS, setup.activation_checkpointing))),
        optimizer=tuple(dict.fromkeys((*OPTIMIZERS, setup.optimizer))),
        micro_batch_size=micro,
        seq_len=_lengths(estimator, replace(setup, micro_batch_size=micro[-1])),
        gradient_accumulation_steps=_with_doublings(ACCUMULATIONS, setup.gradient_accumulation_steps),
        data_parallel_size=_with_doublings(GPUS, setup.data_parallel_size),
    )


def _with_doublings(last: int, own: int) -> tuple[int, ...]:
    """Doublings of one up to `last`, or up to twice `own`, which is among them."""
    found, size = {own}, 1
    while size <= max(last, 2 * own):
        found.add(size)
        size *= 2
    return tuple(sorted(found))


def _lengths(estimator: Estimator, setup: Setup) -> tuple[int, ...]:
    """Halves and doubles of the length, as the model has positions: as many above as there are, the rest below."""
    own = setup.seq_len
    longer = [own << n for n in range(1, NUM_LENGTHS // 2 + 1) if _can_be(estimator, setup, own << n)]
    shorter = [own >> n for n in range(1, NUM_LENGTHS) if own >> n >= SHORTEST]
    shorter = [one for one in shorter if _can_be(estimator, setup, one)][: NUM_LENGTHS - 1 - len(longer)]
    return tuple(sorted({own, *longer, *shorter}))


def _can_be(estimator: Estimator, setup: Setup, length: int) -> bool:
    longer = estimator.other(setup, seq_len=length)
    return longer is not None and int(estimator.peaks(longer).peak) < MOST_BYTES
