"""Which sample goes to which GPU in which micro-step of an optimizer step?

Of K micro-steps on G GPUs with micro-batches of b samples, GPU r takes in micro-step m, all counted from 0,

    r + G (m b + i)        for i = 0 ... b - 1        of the order in which the epoch goes through the data

That is what a DataLoader with torch.utils.data.DistributedSampler gives: GPU r gets each G-th sample from the r-th on
(``indices[rank:total_size:num_replicas]``), in batches of b.  accelerate's BatchSamplerShard, which the Trainer of
transformers uses, deals whole micro-batches out instead: b (m G + r) + i.  Both give the same b K G samples to the
step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.specs.training import Setup

MOST_GPUS = 4
MOST_MICRO_STEPS = 4
"""More are drawn as the first ones, an ellipsis and the last."""


class Share(NamedTuple):
    """What one GPU works on in one micro-step."""

    micro_step: int
    """From 0."""
    gpu: int
    """From 0."""
    samples: range
    """Places in the order of the epoch, of the first step."""


class Schedule(NamedTuple):
    """An optimizer step."""

    num_gpus: int
    num_micro_steps: int
    micro_batch_size: int
    gpus: tuple[int, ...]
    """Those that are drawn."""
    micro_steps: tuple[int, ...]
    """Those that are drawn."""
    shares: tuple[Share, ...]
    """Of the drawn ones, micro-step by micro-step."""

    @property
    def global_batch_size(self) -> int:
        """Samples of the step."""
        return self.micro_batch_size * self.num_micro_steps * self.num_gpus


def schedule(setup: Setup) -> Schedule:
    """The first optimizer step of `setup`; long ones are condensed."""
    num_gpus, steps = setup.data_parallel_size, setup.gradient_accumulation_steps
    gpus, micro_steps = condensed(num_gpus, MOST_GPUS), condensed(steps, MOST_MICRO_STEPS)
    return Schedule(
        num_gpus=num_gpus,
        num_micro_steps=steps,
        micro_batch_size=setup.micro_batch_size,
        gpus=gpus,
        micro_steps=micro_steps,
        shares=tuple(
            Share(micro, gpu, samples_of(gpu, micro, num_gpus, setup.micro_batch_size))
            for micro in micro_steps
            for gpu in gpus
        ),
    )


def samples_of(gpu: int, micro_step: int, num_gpus: int, micro_batch_size: int) -> range:
    """Places in the order of the epoch."""
    first = gpu + num_gpus * micro_step * micro_batch_size
    return range(first, first + num_gpus * micro_batch_size, num_gpus)


def condensed(num: int, most: int) -> tuple[int, ...]:
    """The numbers from 0 on that are drawn: all, or the first ones and the last."""
    return tuple(range(num)) if num <= most else (*range(most - 2), num - 1)
