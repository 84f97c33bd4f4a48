"""What a traced run allocated, event by event, and what follows from it.

Time is the number of events so far.  Bytes of events are as requested; totals count as torch.cuda does, every storage
rounded up to 512 bytes.  Nothing here needs torch.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

from memplan.operators.sizes import allocated
from memplan.specs.tabular import Tabular
from memplan.specs.values import NamedTuple, dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memplan.specs.training import Setup

PHASES = ("load", "forward", "backward", "clip", "optimizer", "generation", "evaluation", "zero_grad")
"""Phases of a run, in order; ``load`` comes once, before the first step."""

CATEGORIES = ("parameter", "buffer", "gradient", "optimizer_state", "activation", "temporary", "input")


class TraceEvent(NamedTuple):
    """One allocation or release of one storage."""

    key: int
    """Names the storage, for the whole run."""
    num_bytes: int
    """As requested, not rounded."""
    sign: int
    """+1 allocated, -1 released."""
    op: str
    """The operator that made it; ``parameter``, ``gradient``, the name of a state or of an input."""
    module: str
    """Path of the module that made it; of parameters, gradients and states that of the parameter."""
    phase: str
    """One of `PHASES`: when this event happens."""
    step: int
    """Optimizer step, from 0; -1 while loading."""
    micro_step: int
    """Micro-batch of the step, from 0; -1 outside of them."""
    category: str
    """One of `CATEGORIES`; ``activation`` was made in a forward pass and is alive at its end."""
    shape: tuple[int, ...]
    dtype: str


class Span(NamedTuple):
    """Which events belong to one pass through a phase: ``events[start:stop]``."""

    phase: str
    step: int
    micro_step: int
    start: int
    stop: int
    flops: int = 0
    """Of products of matrices, convolutions and attention, as `torch.utils.flop_counter` counts them."""


class Peak(NamedTuple):
    """The instant at which most bytes were allocated."""

    allocated_bytes: int
    time: int
    """Events up to it."""
    phase: str
    step: int
    micro_step: int
    op: str
    """The operator that made the last storage before it; empty where the phase began at its highest."""
    module: str


class TraceRow(NamedTuple):
    """Equal storages."""

    module: str
    op: str
    category: str
    shape: tuple[int, ...]
    dtype: str
    num: int
    num_bytes: int
    """Allocated bytes of all of them."""


@dataclass(frozen=True, kw_only=True)
class Trace(Tabular):
    """A run of some optimizer steps of a real module."""

    name: str
    setup: Setup
    num_parameters: int
    num_trainable_parameters: int
    layers: tuple[str, ...]
    """Module paths of the repeated layers, in order; empty where nothing repeats."""
    events: tuple[TraceEvent, ...]
    spans: tuple[Span, ...]
    """The run in order, without gaps."""
    assumptions: tuple[str, ...]
    """What the model asked about its data, and what it was told."""
    host_bytes: int = 0
    """Bytes of optimizer states in unified memory."""
    unit: str = "sequence"
    """What a micro-batch counts."""

    # -- over time ---------------------------------------------------------------------------------------------------

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Allocated bytes after each event."""
        level, levels = 0, []
        for event in self.events:
            level += event.sign * allocated(event.num_bytes)
            levels.append(level)
        return tuple(levels)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.spans[-1].step + 1

    def phase_peaks(self, step: int | None = None) -> dict[str, int]:
        """Highest allocated bytes of each phase of a step (the last, if none is given)."""
        peaks: dict[str, int] = {}
        for span in self._of_step(step):
            peaks[span.phase] = max(peaks.get(span.phase, 0), self._highest(span).allocated_bytes)
        return peaks

    def peak(self, step: int | None = None) -> Peak:
        """The highest instant of a step (the last, if none is given)."""
        return max((self._highest(span) for span in self._of_step(step)), key=lambda peak: peak.allocated_bytes)

    @cached_property
    def peak_allocated_bytes(self) -> int:
        """The highest of the last step: the steady state, if at least two were run."""
        return self.peak().allocated_bytes

    @cached_property
    def first_step_peak_allocated_bytes(self) -> int:
        """The same of the first step, which makes the optimizer states."""
        return self.peak(0).allocated_bytes

    @cached_property
    def grown_bytes(self) -> int:
        """What is allocated after the last step more than after the one before: 0 in a steady state."""
        if self.num_steps < 2:
            return 0
        last, before = (max(span.stop for span in self._of_step(self.num_steps - n)) for n in (1, 2))
        return self.levels[last - 1] - self.levels[before - 1]

    def _of_step(self, step: int | None) -> Iterable[Span]:
        wanted = self.num_steps - 1 if step is None else step
        return [span for span in self.spans if span.step == wanted]

    def _highest(self, span: Span) -> Peak:
        before = self.levels[span.start - 1] if span.start else 0
        inside = self.levels[span.start : span.stop]
        height = max(inside, default=0)
        if height <= before:
            return Peak(before, span.start, span.phase, span.step, span.micro_step, "", "")
        time = span.start + inside.index(height) + 1
        last = self.events[time - 1]
        return Peak(height, time, span.phase, span.step, span.micro_step, last.op, last.module)

    # -- what is alive -----------------------------------------------------------------------------------------------

    def alive_at(self, time: int) -> tuple[TraceEvent, ...]:
        """The allocations among the first `time` events that are not released among them."""
        alive: dict[int, TraceEvent] = {}
        for event in self.events[:time]:
            if event.sign > 0:
                alive[event.key] = event
            else:
                del alive[event.key]
        return tuple(alive.values())

    @cached_property
    def alive_at_peak(self) -> tuple[TraceEvent, ...]:
        """The storages behind the peak of the last step."""
        return self.alive_at(self.peak().time)

    @cached_property
    def rows_at_peak(self) -> tuple[TraceRow, ...]:
        """The same, equal ones of one module together, largest first."""
        return rows(self.alive_at_peak)

    def bytes_at_peak(self, by: str) -> dict[str, int]:
        """Allocated bytes at the peak by ``module``, ``op``, ``category`` or ``dtype``, largest first."""
        totals: Counter[str] = Counter()
        for event in self.alive_at_peak:
            totals[getattr(event, by)] += allocated(event.num_bytes)
        return dict(totals.most_common())

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs of the last forward and of the last backward pass, with what that computes again."""
        forward, backward = (
            [span.flops for span in self.spans if span.phase == phase][-1] for phase in ("forward", "backward")
        )
        return forward, backward

    def category_bytes(self, category: str) -> int:
        """The most that a category had allocated at any time."""
        level = highest = 0
        for event in self.events:
            if event.category == category:
                level += event.sign * allocated(event.num_bytes)
                highest = max(highest, level)
        return highest

    # -- what the forward pass keeps ---------------------------------------------------------------------------------

    @cached_property
    def kept(self) -> tuple[TraceEvent, ...]:
        """What the last forward pass left for its backward pass, in the order of birth.

        Gradients are among it where a fused loss makes them in the forward pass.
        """
        last = [span for span in self.spans if span.phase == "forward"][-1]
        inside = self.events[last.start : last.stop]
        return tuple(event for event in inside if event.category in {"activation", "gradient"} and event.sign > 0)

    @property
    def kept_activation_bytes(self) -> int:
        """Allocated bytes of `kept`."""
        return sum(allocated(event.num_bytes) for event in self.kept)

    @property
    def kept_activation_requested_bytes(self) -> int:
        """Bytes of `kept` before rounding."""
        return sum(event.num_bytes for event in self.kept)

    @cached_property
    def kept_in_middle_layer(self) -> tuple[TraceEvent, ...]:
        """What of `kept` the layer in the middle made; nothing where no layers repeat."""
        if not self.layers:
            return ()
        path = self.layers[len(self.layers) // 2]
        return tuple(event for event in self.kept if event.module == path or event.module.startswith(f"{path}."))

    @property
    def kept_activation_bytes_per_layer(self) -> int:
        """Allocated bytes of `kept_in_middle_layer`."""
        return sum(allocated(event.num_bytes) for event in self.kept_in_middle_layer)

    @property
    def kept_activation_requested_bytes_per_layer(self) -> int:
        """Bytes of `kept_in_middle_layer` before rounding."""
        return sum(event.num_bytes for event in self.kept_in_middle_layer)

    def records(self) -> list[dict[str, Any]]:
        """All events, one row each."""
        return [event._asdict() for event in self.events]


def rows(events: Iterable[TraceEvent]) -> tuple[TraceRow, ...]:
    """Equal storages of one module together, largest first."""
    groups = Counter((e.module, e.op, e.category, e.shape, e.dtype, allocated(e.num_bytes)) for e in events)
    found = [
        TraceRow(module, op, category, shape, dtype, num, num * num_bytes)
        for (module, op, category, shape, dtype, num_bytes), num in groups.items()
    ]
    return tuple(sorted(found, key=lambda row: (-row.num_bytes, row.module, row.op)))
