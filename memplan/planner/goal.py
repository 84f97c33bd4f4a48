"""What the user wants, and which micro-batches and accumulations reach it exactly.

    micro_batch_size x gradient_accumulation_steps x data_parallel_size = global_batch_size

Nothing is rounded silently: a batch that cannot be reached is a fault that names the nearest that can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.specs.margin import Margin
from memplan.specs.training import IN_BACKWARD, check_checkpointing, check_count, divisors
from memplan.specs.values import NamedTuple, dataclass, replace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.specs.training import Setup

WELL_DIVIDED = 8
"""A number of sequences that is a multiple of this can be split into micro-batches of 1, 2, 4 and 8."""

CLEARLY_LARGER = 1.5
"""Times as large a micro-batch, from which on a neighbouring target is spoken of."""

MOST_TRIED = 10**5
"""No micro-batch beyond this is looked for beside the target."""

CHECKPOINTING_CHOICES = ("none", "selective", "every-4", "every-3", "every-2", "full")
"""What the planner may choose from where the user leaves checkpointing free."""


class Target(NamedTuple):
    """Sequences per optimizer step, and how they came about."""

    global_batch_size: int
    target_tokens: int | None = None
    """Tokens per step as asked for, None where sequences were."""

    def rounding(self, seq_len: int, unit: str = "sequence") -> str | None:
        """What became of a target in tokens, in words; None where nothing was rounded.

        `seq_len`: tokens of a `unit`, two sequences of a pair.
        """
        if self.target_tokens is None:
            return None
        got = self.global_batch_size * seq_len
        difference = got - self.target_tokens
        exact = "exactly" if difference == 0 else f"{abs(difference):,} {'more' if difference > 0 else 'fewer'}"
        noun = unit if self.global_batch_size == 1 else f"{unit}s"
        sequences = f"{self.global_batch_size:,} {noun} of {seq_len:,}"
        return f"{self.target_tokens:,} tokens are {sequences}: {got:,} tokens, {exact}"


def target_from_tokens(target_tokens: int, seq_len: int, data_parallel_size: int) -> Target:
    """The number of sequences nearest to `target_tokens` that all GPUs can share evenly, at least one for each."""
    check_count("target_tokens", target_tokens)
    share = seq_len * data_parallel_size
    each = max(1, (2 * target_tokens + share) // (2 * share))
    return Target(each * data_parallel_size, target_tokens)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A batch to reach, what is fixed, and how many bytes there are."""

    setup: Setup
    """Everything that is fixed; micro-batch, accumulation and checkpointing in it are placeholders where free."""
    target: Target
    usable_bytes: int
    """Bytes the card offers."""
    reserve_bytes: int = 0
    """Bytes that something else on the card needs."""
    headroom_percent: float = 5.0
    """Share of the usable bytes that has to stay free."""
    bound_ratio: float = 0.0
    """Share of the predicted process bytes by which a calibrated bound lies above them."""
    micro_batch_size: int | None = None
    """Fixed by the user, None where free."""
    gradient_accumulation_steps: int | None = None
    activation_checkpointing: str | None = None
    checkpointings: tuple[str, ...] = CHECKPOINTING_CHOICES
    """What may be chosen where it is free."""

    def __post_init__(self) -> None:
        check_count("the target batch", self.target.global_batch_size)
        for name in ("micro_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.activation_checkpointing is not None:
            check_checkpointing(self.activation_checkpointing)
        if not 0 <= self.headroom_percent < 100:
            raise UsageError(
                f"headroom is {self.headroom_percent} %.", "Give a percentage from 0 up to, not including, 100."
            )
        if self.budget_bytes <= 0:
            raise UsageError("The reserve takes all of the card.", "Give a smaller --reserve or a larger --gpu.")
        self._check_reachable()

    @property
    def margin_bytes(self) -> int:
        """Bytes that have to stay free."""
        return int(self.usable_bytes * self.headroom_percent / 100)

    @property
    def margin(self) -> Margin:
        """Everything that is added to the bytes of a process."""
        return Margin(self.margin_bytes + self.reserve_bytes, self.bound_ratio)

    @property
    def budget_bytes(self) -> int:
        """Bytes a process may take, headroom included."""
        return self.usable_bytes - self.reserve_bytes

    def _check_reachable(self) -> None:
        target, ranks = self.target.global_batch_size, self.setup.data_parallel_size
        micro, steps = self.micro_batch_size, self.gradient_accumulation_steps
        if target < ranks:
            raise UsageError(
                f"A batch of {target} is smaller than the number of GPUs, {ranks}.",
                f"Every GPU needs a sequence: ask for --target-batch {ranks} or more, or use fewer GPUs.",
            )
        if micro is not None and steps is not None and micro * steps * ranks != target:
            product = micro * steps * ranks
            gpus = f"{ranks} GPU{'' if ranks == 1 else 's'}"
            raise UsageError(
                f"--micro-batch {micro} x --accumulation {steps} x {gpus} is {product}, not the target batch {target}.",
                f"Leave one of them out, or ask for --target-batch {product}.",
            )
        unit = ranks * (micro or 1) * (steps or 1)
        if target % unit:
            fixed = [f"{ranks} GPUs"] if ranks > 1 else []
            fixed += [f"micro-batches of {micro}"] if micro else []
            fixed += [f"{steps} accumulation steps"] if steps else []
            below, above = target // unit * unit, (target // unit + 1) * unit
            near = f"{below} or {above}" if below else str(above)
            raise UsageError(
                f"A batch of {target} cannot be divided exactly over {' and '.join(fixed)}.",
                f"The nearest that can: {near}.",
            )

    def coarseness(self) -> str | None:
        """A sentence about a target that hardly divides, with the nearest that does; None where there is choice."""
        ranks = self.setup.data_parallel_size
        each = self.target.global_batch_size // ranks
        if each <= WELL_DIVIDED or len(divisors(each)) > 2:
            return None
        near = round(each / WELL_DIVIDED) * WELL_DIVIDED
        return (
            f"{each:,} sequences on each GPU are a prime number: micro-batches can be 1 or {each:,}. "
            f"--target-batch {near * ranks} leaves more choice"
        )

    def neighbour(self, micro: int, most: float) -> tuple[int, int] | None:
        """A target close by that allows a clearly larger micro-batch than `micro`, up to `most`: (target, micro-batch).

        Close by is within 0.1 %, or two sequences; None where there is none, or micro-batch or accumulation are fixed.
        """
        if self.micro_batch_size is not None or self.gradient_accumulation_steps is not None:
            return None
        ranks = self.setup.data_parallel_size
        each = self.target.global_batch_size // ranks
        if any(micro < one <= most for one in divisors(each)):  # a larger one was to be had, and is slower
            return None
        reach = max(2 // ranks, each // 1000)
        largest = min(int(most), each + reach, MOST_TRIED)
        for larger in range(largest, int(CLEARLY_LARGER * micro), -1):
            near = round(each / larger) * larger
            if near and abs(near - each) <= reach:
                return near * ranks, larger
        return None

    def splits(self) -> Iterator[tuple[int, int]]:
        """Every (micro-batch, accumulation steps) that reaches the target exactly, largest micro-batch first."""
        each = self.target.global_batch_size // self.setup.data_parallel_size
        for micro in reversed(divisors(each)):
            steps = each // micro
            if steps > 1 and self.setup.optimizer in IN_BACKWARD:  # nothing is left to accumulate
                continue
            if self.micro_batch_size in {None, micro} and self.gradient_accumulation_steps in {None, steps}:
                yield micro, steps

    def modes(self) -> tuple[str, ...]:
        """The checkpointing choices that are open, and go with the rest of the setup."""
        if self.activation_checkpointing is not None:
            return (self.activation_checkpointing,)
        return tuple(mode for mode in self.checkpointings if self._allows(mode))

    def _allows(self, mode: str) -> bool:
        try:
            replace(self.setup, activation_checkpointing=mode)
        except UsageError:
            return False
        return True

    def at(self, micro: int, steps: int, mode: str) -> Setup:
        """The setup of one candidate."""
        return replace(
            self.setup, micro_batch_size=micro, gradient_accumulation_steps=steps, activation_checkpointing=mode
        )
