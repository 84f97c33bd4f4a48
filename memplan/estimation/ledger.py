"""Which tensors make up the bytes: those a step holds, and those alive at its peak.

Equal tensors of equal layers share a row.  Two columns: `num_bytes` is what the tensors take while they exist (all
parameters, all gradients, everything the forward pass keeps); `bytes_at_peak` is what of it is alive at the highest
point of the step.  The rows' `bytes_at_peak` add up to the peak exactly.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from memplan.estimation.step import EVALUATION, HEAD, STEM
from memplan.memory.model_states import GRADIENT_BUCKETS
from memplan.operators.sizes import BYTES_PER_ELEMENT, num_bytes
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memplan.estimation.evaluation import EvaluationProgram
    from memplan.estimation.generation import Stage
    from memplan.estimation.step import Layout, Part, StepProgram
    from memplan.memory.events import Row, Segment, Sizes
    from memplan.memory.model_states import Tensors
    from memplan.operators.sizes import Shape, Size

    Key = tuple[Row, Size]

KIND_ORDER = ("parameter", "gradient", "optimizer_state", "activation", "loss", "temporary", "input", "buffer")
"""Kinds of rows in the order in which they are listed; ``allocator``, ``workspace`` and ``context`` follow."""


SOURCE_BY_KIND = {
    "parameter": "config.json, table of parameters",
    "gradient": "one for each trained parameter, in its dtype (torch.autograd)",
    "input": "ids and labels of all micro-batches, fetched before the first forward pass (transformers.Trainer)",
    "buffer": "registered by the model (transformers)",
}

SOURCE_BY_TENSOR = {
    "gradient of the hidden states": "handed from layer to layer in the backward pass",
    "gradient of the loss": "what the backward pass starts with: ones_like(loss)",
    "gradient to be added to that of the tied head": "made by the embedding in its backward pass",
    "sum of gradients": "made by torch.autograd where gradients meet (input_buffer.cpp)",
}

GRADIENT, SCRATCH = "gradient from ", "scratch of "
"""How the names of tensors begin that the operator named behind it makes (`memplan.memory.lifetimes`)."""


class LedgerRow(NamedTuple):
    """Some equal tensors."""

    module: str
    """Path in the model, ``*`` for the number of a layer."""
    tensor: str
    kind: str
    """One of `KIND_ORDER`, or ``allocator``, ``workspace``, ``context``."""
    num: int
    """How many of them there are."""
    shape: Shape | None
    """Dimensions; ``b`` is the micro-batch, ``s`` the sequence length."""
    dtype: str
    num_bytes: int
    """Bytes while they exist."""
    bytes_at_peak: int
    """Bytes of them at the peak of the step."""
    formula: str
    """Factors whose product is the bytes before each tensor is rounded up to blocks: ``28 x b x s x 8960 x 2``."""
    source: str
    """Why it is there, or who makes it."""


def ledger(program: StepProgram, sizes: Sizes, accumulation: int) -> tuple[LedgerRow, ...]:
    """The rows of a step in steady state, by kind, then largest first."""
    whole: Counter[Key] = Counter()
    for tensors in program.resident(accumulation, with_states=True):
        _add(whole, tensors)
    at_peak = Counter(whole)
    peak = _Peak(program, sizes)
    peak.climb_step(program, accumulation)
    at_peak.update(peak.found)
    _add(whole, program.gradients)
    whole += _after(program, program.forward)
    rows = []
    for key in whole.keys() | at_peak.keys():
        row, size = key
        bytes_at_peak = at_peak[key] * sizes[size]
        num = whole[key] or at_peak[key]
        if num > 0 or bytes_at_peak:
            rows.append(
                LedgerRow(
                    row.module,
                    row.tensor,
                    row.kind if whole[key] else "temporary",  # alive at the peak alone: autocast's cache, say
                    num,
                    row.shape,
                    row.dtype,
                    num * sizes[size],
                    bytes_at_peak,
                    _formula(row, size, num),
                    row.reason or _source(row),
                )
            )
    order = {kind: n for n, kind in enumerate(KIND_ORDER)}
    return tuple(sorted(rows, key=lambda r: (order.get(r.kind, 99), -r.num_bytes, r.module, r.tensor, r.dtype)))


RESIDENT = frozenset({"parameter", "optimizer_state", "input", "buffer"})
"""Kinds that are there between steps, too."""


def at_evaluation(rows: Sequence[LedgerRow], evaluation: EvaluationProgram) -> tuple[LedgerRow, ...]:
    """The rows of a step whose peak is that of an evaluation: what is resident, and what the evaluation makes."""
    step = [
        row if row.kind in RESIDENT or row.tensor == GRADIENT_BUCKETS else row._replace(bytes_at_peak=0) for row in rows
    ]
    high = evaluation.high()
    sizes = evaluation.sizes(high.batch or 1)
    start: Counter[Key] = Counter()
    _add(start, high.held)
    peak = _Peak(evaluation.layout, sizes)
    if high.batch:
        _add(start, evaluation.inputs_of_high(high))
        if high.stage is not None:
            return (*step, *_rows_of_generation(start, sizes, high.stage))
        peak.climb(evaluation.layout.forward, start)
    else:
        peak.consider(start)
    return (*step, *_temporary(peak.found, sizes, EVALUATION))


def _temporary(found: Counter[Key], sizes: Sizes, during: str) -> list[LedgerRow]:
    """Rows of what is there at the peak alone."""
    rows = [
        LedgerRow(
            during if row.module == during else f"{during}: {row.module}",
            row.tensor,
            "temporary",
            num,
            row.shape,
            row.dtype,
            num * sizes[size],
            num * sizes[size],
            _formula(row, size, num),
            row.reason or _source(row),
        )
        for (row, size), num in found.items()
        if num and sizes[size]
    ]
    return sorted(rows, key=lambda r: (-r.num_bytes, r.module, r.tensor))


def _rows_of_generation(beside: Counter[Key], sizes: Sizes, stage: Stage) -> list[LedgerRow]:
    """What the evaluation holds `beside`, in its own dimensions, and what the generation makes."""
    start: Counter[Key] = Counter()
    _add(start, stage.held)
    peak = _Peak(stage.layout, stage.sizes)
    peak.climb(stage.layout.forward, start)
    return [*_temporary(beside, sizes, EVALUATION), *_temporary(peak.found, stage.sizes, stage.name)]


def _formula(row: Row, size: Size, num: int) -> str:
    """How many, by their dimensions, by the bytes of an element; where those do not make up the size, by its factor."""
    shape, element = row.shape, BYTES_PER_ELEMENT.get(row.dtype)
    if shape is not None and element is not None and num_bytes(shape, row.dtype) == size:
        return " x ".join(map(str, (num, *shape, element)))
    return " x ".join((str(num), *size.dims, str(size.factor)))


def _source(row: Row) -> str:
    """Of a tensor whose description gives no reason."""
    known = SOURCE_BY_KIND.get(row.kind) or SOURCE_BY_TENSOR.get(row.tensor)
    if known:
        return known
    if row.tensor.startswith(GRADIENT):
        return f"made by {row.tensor[len(GRADIENT) :].partition(' before it is reduced')[0]} in its backward pass"
    if row.tensor.startswith(SCRATCH):
        op, backward, _ = row.tensor[len(SCRATCH) :].replace(" gradient of ", " backward ").partition(" backward")
        return f"made by {op} in its {'backward' if backward else 'forward'} pass, and freed within it"
    op, again, _ = row.tensor.partition(", computed again")
    return f"made by {op} {'when it is computed again in the backward pass' if again else 'in its forward pass'}"


def _add(counts: Counter[Key], tensors: Tensors) -> None:
    for row, size, times in tensors.rows:
        counts[row, size] += times


def _net(program: StepProgram | Layout, part: Part, events: Iterable[tuple[Row, Size, int]], runs: int) -> Counter[Key]:
    """What `runs` runs of a part leave behind, under the full paths of their modules."""
    prefix = _prefix(program, part)
    counts: Counter[Key] = Counter()
    for row, size, sign in events:
        counts[row, size] += sign * runs
    return Counter({(_located(row, prefix), size): n for (row, size), n in counts.items() if n})


def _located(row: Row, prefix: str) -> Row:
    if not prefix or row.module == "between layers":
        return row
    between = "" if prefix.endswith(" ") else "."
    return row._replace(module=f"{prefix}{between}{row.module}" if row.module else prefix.removesuffix(": "))


def _prefix(program: StepProgram | Layout, part: Part) -> str:
    place = part.places[0] if part.places else STEM
    recording = program.recording if part.companion is None else part.companion.recording
    path = "" if place in {STEM, HEAD} else recording.pattern(recording.order[place])
    return path if part.companion is None else f"{part.companion.label}: {path}"


def _events(segment: Segment) -> list[tuple[Row, Size, int]]:
    return [(event.row, event.size, event.sign) for event in segment.events]


def _after(program: StepProgram | Layout, parts: Sequence[Part]) -> Counter[Key]:
    runs: dict[tuple[int, str], tuple[Part, int]] = {}
    for part in parts:
        key = (id(part.segment), _prefix(program, part))
        runs[key] = (part, runs[key][1] + len(part.places) if key in runs else len(part.places))
    counts: Counter[Key] = Counter()
    for part, num in runs.values():
        counts.update(_net(program, part, _events(part.segment), num))
    return counts


class _Peak:
    """The tensors alive at the highest point, beside those that are always there."""

    def __init__(self, program: StepProgram | Layout, sizes: Sizes) -> None:
        self.program = program
        self.sizes = sizes
        self.best = 0
        self.found: Counter[Key] = Counter()

    def climb_step(self, program: StepProgram, accumulation: int) -> None:
        """Go through a step of training."""
        first = (*program.forward, *program.backward)
        self.climb(first, Counter())
        gradients: Counter[Key] = Counter()
        _add(gradients, program.gradients)
        if accumulation > 1:
            self.climb((*program.forward, *program.backward_again), gradients)
        for tensors in program.end_temporaries:
            alive = Counter(gradients)
            _add(alive, tensors)
            self.consider(alive)

    def _bytes(self, counts: Counter[Key]) -> int:
        return sum(n * self.sizes[size] for (_, size), n in counts.items())

    def consider(self, alive: Counter[Key]) -> None:
        """These are alive at a high point."""
        height = self._bytes(alive)
        if height > self.best:
            self.best, self.found = height, alive

    def climb(self, parts: Sequence[Part], start: Counter[Key]) -> None:
        """Find the part and run with the highest point, then walk only that one."""
        live = self._bytes(start)
        highest, where = self.best, None
        for n, part in enumerate(parts):
            one = self.sizes.extent(part.segment)
            for run in (0, len(part.places) - 1):
                height = live + one.net * run + one.peak
                if part.places and height > highest:
                    highest, where = height, (n, run)
            live += one.net * len(part.places)
        if where is None:
            return
        n, run = where
        alive = Counter(start)
        alive.update(_after(self.program, parts[:n]))
        part = parts[n]
        events = _events(part.segment)
        alive.update(_net(self.program, part, events, run))
        at, height, top = 0, 0, 0
        for i, (_, size, sign) in enumerate(events):
            height += sign * self.sizes[size]
            if height > top:
                at, top = i + 1, height
        alive.update(_net(self.program, part, events[:at], 1))
        self.consider(alive)
