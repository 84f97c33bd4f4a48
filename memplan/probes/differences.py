"""Formula against trace: what only one of the two keeps for the backward pass, and the peaks side by side."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from memplan.estimation.difference import FORMULA, TRACE, Compared, Difference, KeptDifference, KeptRow
from memplan.estimation.step import COMPANIONS, HEAD, STEM
from memplan.operators.sizes import allocated
from memplan.probes.answers import instants_of, pattern
from memplan.specs.margin import Margin

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from memplan.estimation.estimate import Estimate, Estimator, Instant
    from memplan.estimation.step import Part, StepProgram
    from memplan.probes.events import Trace
    from memplan.specs.training import Setup

PASSES = ("forward", *COMPANIONS, "loss", "backward")
"""The formula's loss lies in both passes of a trace, so that these are compared as one."""


def difference(estimator: Estimator, trace: Trace, traced: Estimate, setup: Setup) -> Difference:
    """Compare the formula's answer with that of a trace of the same setup."""
    margin = Margin(traced.upper_bound_bytes - traced.memory.peak_process_bytes)
    formula = estimator.estimate(setup, margin=margin)
    names = ("parameter_bytes", "gradient_bytes", "optimizer_state_bytes", "kept_activation_bytes")
    totals = [
        Compared("num_parameters", formula.model.num_parameters, traced.model.num_parameters),
        *(Compared(name, getattr(formula, name), getattr(traced, name)) for name in names),
        Compared("peak_allocated_bytes", formula.memory.peak_allocated_bytes, traced.memory.peak_allocated_bytes),
        Compared("peak_reserved_bytes", formula.memory.peak_reserved_bytes, traced.memory.peak_reserved_bytes),
    ]
    ours, theirs = _joined(formula.instants), _joined(instants_of(trace))
    instants = [Compared(name, ours[name], theirs[name]) for name in theirs]
    rows = [*_of_formula(estimator.program(setup), estimator, setup), *_of_trace(trace)]
    return Difference(tuple(totals), tuple(instants), tuple(_unlike(rows)))


def _joined(instants: Iterable[Instant]) -> dict[str, int]:
    """The highest point by instant."""
    found: dict[str, int] = {}
    for one in instants:
        name = "forward, loss and backward" if one.name in PASSES else one.name
        found[name] = max(found.get(name, 0), one.allocated_bytes)
    return found


def _unlike(rows: list[KeptRow]) -> Iterator[KeptDifference]:
    """By size, the largest first; modules are named, not compared: the two cut a layer at different places."""
    counts = {FORMULA: Counter[int](), TRACE: Counter[int]()}
    for row in rows:
        counts[row.witness][row.num_bytes] += row.num
    for size in sorted({row.num_bytes for row in rows}, reverse=True):
        numbers = (counts[FORMULA][size], counts[TRACE][size])
        if numbers[0] != numbers[1]:
            same = sorted((row for row in rows if row.num_bytes == size), key=lambda row: row[:3])
            yield KeptDifference(size, *numbers, tuple(same))


def _of_trace(trace: Trace) -> list[KeptRow]:
    counts = Counter((pattern(e.module), e.op, e.dtype, allocated(e.num_bytes)) for e in trace.kept)
    return [KeptRow(TRACE, *key, num) for key, num in counts.items()]


def _of_formula(program: StepProgram, estimator: Estimator, setup: Setup) -> list[KeptRow]:
    sizes = estimator.sizes(setup)
    counts: Counter[tuple[str, str, str, int]] = Counter()
    for part in program.layout.forward:
        alive: Counter[tuple[Any, ...]] = Counter()
        event_of = {}
        for event in part.segment.events:
            alive[event.key] += event.sign
            event_of[event.key] = event
        for key, num in alive.items():
            event = event_of[key]
            for prefix in _prefixes(program, part) if num else ():
                module = ".".join(x for x in (prefix, event.row.module) if x)
                counts[module, event.row.tensor, event.row.dtype, sizes[event.size]] += num
    return [KeptRow(FORMULA, *key, num) for key, num in counts.items() if num]


def _prefixes(program: StepProgram, part: Part) -> Iterator[str]:
    recording = program.recording if part.companion is None else part.companion.recording
    for place in part.places:
        yield "" if place in {STEM, HEAD} else recording.pattern(recording.order[place])
