"""A training step that is known from traces alone: any module, at any micro-batch and length.

The step is traced at a few small sizes.  Event by event the traces have to tell the same story (the same operators of
the same modules in the same order); the bytes of each storage become a polynomial in micro-batch and length, which
further sizes confirm.  A micro-batch of one takes other paths in PyTorch (slices that need no copy): it has traces and
polynomials of its own.

Two micro-steps are traced.  A step without accumulation is the first of them with the clip and the update; more than
two do what the second did.

Left out: programs that take another path at larger sizes than were traced (windows, masks): the sizes that are held
out lie above the fitted ones, and what a plan chooses can be traced once more.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from memplan.allocator.replay import new_allocator
from memplan.allocator.rounding import fitting
from memplan.errors import MemplanError
from memplan.estimation.replaying import Replayed
from memplan.memory.polynomials import Fitter, Polynomial
from memplan.operators.sizes import allocated
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from memplan.allocator.settings import AllocatorSettings

    Point = tuple[int, int]

ALIGNMENT = 16
"""Kernels of attention take a bias in rows of such a multiple, and PyTorch pads others (attention.cu)."""

LONG_ALIGNED, LONG = (48, 160, 352, 432), (41, 150, 343, 420)
"""Lengths of the traces, the last held out: each in another tile of 128, and not by the same distance from its end, so
that rounding up to one is no polynomial in the length itself."""

SHORT = (16, 24, 40, 56)
"""Of those that stand for a length shorter than these: a module may have no more positions."""


def points_for(micro_batch_size: int, seq_len: int, *, squares: bool = False) -> tuple[Point, ...]:
    """(micro-batch, length) of the traces that stand for one size.

    Micro-batches of one are traced by themselves, and so are lengths that are no multiple of `ALIGNMENT`.  `squares`:
    the loss compares all examples of a micro-batch.
    """
    longer = LONG if seq_len % ALIGNMENT else LONG_ALIGNED
    lengths = longer if seq_len >= longer[-1] else SHORT
    if micro_batch_size == 1:
        return tuple((1, s) for s in lengths)
    fitted = tuple((b, s) for s in lengths[:-1] for b in (2, 3))
    return (*fitted, (4, lengths[0]), (5, lengths[-1])) if squares else (*fitted, (4, lengths[-1]))


TRACED_MICRO_STEPS = 2
TRACED_STEPS = 2

INSTANT_BY_PHASE = {
    "forward": "forward",
    "backward": "backward",
    "clip": "gradient clip",
    "optimizer": "optimizer step",
    "generation": "generation",
    "evaluation": "evaluation",
    "zero_grad": "optimizer step",
}
"""memplan's instants by the phases of a trace."""


class Event(Protocol):
    """What is needed of an event of a trace (`memplan.probes.events.TraceEvent`)."""

    @property
    def key(self) -> int: ...  # noqa: D102
    @property
    def num_bytes(self) -> int: ...  # noqa: D102
    @property
    def sign(self) -> int: ...  # noqa: D102
    @property
    def op(self) -> str: ...  # noqa: D102
    @property
    def module(self) -> str: ...  # noqa: D102
    @property
    def phase(self) -> str: ...  # noqa: D102
    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def micro_step(self) -> int: ...  # noqa: D102
    @property
    def category(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102


class Run(Protocol):
    """What is needed of a trace (`memplan.probes.events.Trace`)."""

    @property
    def events(self) -> Sequence[Event]: ...  # noqa: D102
    @property
    def flops(self) -> tuple[int, int]: ...  # noqa: D102


class Step(NamedTuple):
    """One event with its bytes at any size."""

    key: int
    size: int
    """Which of the program's polynomials."""
    sign: int
    phase: str
    step: int
    micro_step: int
    category: str
    op: str
    module: str
    dtype: str


class TracedPeaks(NamedTuple):
    """Allocated bytes of a step."""

    by_instant: dict[str, int]
    first_step: dict[str, int]
    kept_activation_bytes: int
    by_category: dict[str, int]
    """Parameters, gradients, optimizer states: the most that each had allocated."""

    @property
    def peak(self) -> int:
        """The highest of all instants, in steady state."""
        return max(self.by_instant.values())


class TracedProgram:
    """The events of a step, fitted."""

    def __init__(
        self, polynomials: Sequence[Polynomial], steps: Sequence[Step], flops: Sequence[Polynomial] = ()
    ) -> None:
        """`flops`: of a forward and of a backward pass."""
        self.polynomials = tuple(polynomials)
        self.steps = tuple(steps)
        self.flops = tuple(flops)

    def sizes(self, micro_batch_size: int, seq_len: int) -> list[Any]:
        """Requested bytes of every polynomial."""
        return [p.value(micro_batch_size, seq_len) for p in self.polynomials]

    def input_bytes(self, micro_batch_size: int, seq_len: int) -> int:
        """Allocated bytes of the inputs of one micro-batch."""
        sizes = self.sizes(micro_batch_size, seq_len)
        inputs = [s for s in self.steps if s.category == "input" and s.sign > 0 and s.step == 0]
        growing = [s for s in inputs if any(self.polynomials[s.size].coefficients[1:])]
        return int(sum(allocated(sizes[s.size]) for s in growing)) // TRACED_MICRO_STEPS

    def peaks(self, micro_batch_size: int, seq_len: int, accumulation: int) -> TracedPeaks:
        """Peaks of the first and of a later step, for one size and any number of micro-steps."""
        sizes = [allocated(n) for n in self.sizes(micro_batch_size, seq_len)]
        found: list[dict[str, int]] = [{}, {}]
        level: dict[str, int] = {}
        live = kept = 0
        more = (accumulation - TRACED_MICRO_STEPS) * self.input_bytes(micro_batch_size, seq_len)
        highest: dict[str, int] = {}
        for one in self.steps:
            change = one.sign * sizes[one.size]
            live += change
            level[one.category] = level.get(one.category, 0) + change
            highest[one.category] = max(highest.get(one.category, 0), level[one.category])
            if one.step == TRACED_STEPS - 1 and one.micro_step == 0 and one.phase == "forward":
                kept += change if one.category == "activation" else 0
            if one.step >= 0 and self._counts(one, accumulation):
                instant = INSTANT_BY_PHASE[one.phase]
                peaks = found[one.step]
                peaks[instant] = max(peaks.get(instant, 0), live - min(change, 0), live)
        steady, first = ({name: value + more for name, value in peaks.items()} for peaks in reversed(found))
        return TracedPeaks(steady, first, kept, highest)

    def _counts(self, one: Step, accumulation: int) -> bool:
        """Whether an event happens with so many micro-steps: without accumulation there is no second one."""
        return accumulation > 1 or one.micro_step <= 0

    def replay(
        self,
        micro_batch_size: int,
        seq_len: int,
        *,
        capacity_bytes: int | None = None,
        settings: AllocatorSettings | None = None,
    ) -> Replayed:
        """The traced run through the caching allocator (two micro-steps, two steps)."""
        sizes = self.sizes(micro_batch_size, seq_len)
        allocator = new_allocator(settings, capacity_bytes=capacity_bytes)
        missing = 0
        for one in self.steps:
            if one.sign < 0:
                allocator.free(one.key)
            elif not allocator.allocate(one.key, sizes[one.size]):
                missing = fitting(sizes[one.size], allocator.settings).segment_bytes
                break
        reserved = allocator.reserved + missing if missing else allocator.peak_reserved
        return Replayed(allocator.peak_allocated, reserved, allocator.num_alloc_retries, missing > 0)

    def rows_at_peak(self, micro_batch_size: int, seq_len: int, accumulation: int) -> list[tuple[Step, int, int]]:
        """(a storage, how many like it, bytes of all) alive at the highest point of the last step."""
        sizes = [allocated(n) for n in self.sizes(micro_batch_size, seq_len)]
        live = best = at = 0
        for i, one in enumerate(self.steps):
            live += one.sign * sizes[one.size]
            if one.step == TRACED_STEPS - 1 and live > best and self._counts(one, accumulation):
                best, at = live, i + 1
        alive: dict[int, Step] = {}
        for one in self.steps[:at]:
            if one.sign > 0:
                alive[one.key] = one
            else:
                alive.pop(one.key, None)
        groups: dict[Any, list[Step]] = {}
        for one in alive.values():
            groups.setdefault((one.module, one.op, one.category, one.size), []).append(one)
        rows = [(group[0], len(group), len(group) * sizes[group[0].size]) for group in groups.values()]
        return sorted(rows, key=lambda row: -row[2])


def fit_program(traces: Mapping[Point, Run]) -> TracedProgram:
    """The program behind traces at several sizes (`points_for` one, in their order).

    Raises:
        MemplanError: the traces differ in more than sizes, or a storage is no such polynomial.
    """
    points, runs = list(traces), [run.events for run in traces.values()]
    _check_alike(points, runs)
    fitter = Fitter(points)
    number_of: dict[Polynomial, int] = {}
    size_of: dict[int, int] = {}
    steps = []
    for column in zip(*runs, strict=True):
        event = column[0]
        if event.sign > 0:
            polynomial = fitter.fit([one.num_bytes for one in column])
            if polynomial is None:
                raise MemplanError(
                    f"What {event.op} in {event.module or 'the module'} allocates is no polynomial in micro-batch and "
                    "length.",
                    "Trace the sizes you care about one by one with memplan trace.",
                )
            size_of[event.key] = number_of.setdefault(polynomial, len(number_of))
        size = size_of[event.key]
        steps.append(
            Step(
                event.key,
                size,
                event.sign,
                event.phase,
                event.step,
                event.micro_step,
                event.category,
                event.op,
                event.module,
                event.dtype,
            )
        )
    flops = [fitter.fit(counts) for counts in zip(*(run.flops for run in traces.values()), strict=True)]
    return TracedProgram(tuple(number_of), steps, [one for one in flops if one is not None] if all(flops) else ())


def _check_alike(points: Sequence[tuple[int, int]], runs: Sequence[Sequence[Event]]) -> None:
    """Raise where the traces are not event by event the same but for bytes."""
    for point, run in zip(points[1:], runs[1:], strict=True):
        for one, other in zip(runs[0], run, strict=False):
            same = (one.sign, one.op, one.module, one.phase, one.key) == (
                other.sign,
                other.op,
                other.module,
                other.phase,
                other.key,
            )
            if not same:
                raise _differs(points[0], point, other)
        if len(run) != len(runs[0]):
            raise _differs(points[0], point, run[-1])


def _differs(first: tuple[int, int], other: tuple[int, int], event: Event) -> MemplanError:
    return MemplanError(
        f"The module takes another path at micro-batch {other[0]}, length {other[1]} than at {first[0]}, {first[1]}: "
        f"{event.op} in {event.module or 'the module'}.",
        "Trace the sizes you care about one by one with memplan trace.",
    )


def traced_at(points: Sequence[Point], trace: Callable[[int, int], Run]) -> TracedProgram:
    """Trace at all of `points` and fit."""
    return fit_program({point: trace(*point) for point in points})


def digest(events: Sequence[Event]) -> str:
    """Names a trace by its content."""
    from hashlib import sha256

    found = sha256()
    for e in events:
        line = (e.key, e.num_bytes, e.sign, e.op, e.module, e.phase, e.step, e.micro_step, e.category, e.dtype)
        found.update(repr(line).encode())
    return found.hexdigest()


def as_values(program: TracedProgram) -> dict[str, Any]:
    """A program as plain values, for a file."""
    words: dict[str, int] = {}

    def number(word: str) -> int:
        return words.setdefault(word, len(words))

    steps = [
        [
            s.key,
            s.size,
            s.sign,
            number(s.phase),
            s.step,
            s.micro_step,
            *map(number, (s.category, s.op, s.module, s.dtype)),
        ]
        for s in program.steps
    ]
    return {
        "polynomials": [_as_list(p) for p in program.polynomials],
        "flops": [_as_list(p) for p in program.flops],
        "words": list(words),
        "steps": steps,
    }


def from_values(values: Mapping[str, Any]) -> TracedProgram:
    """The program that `as_values` wrote."""
    words = values["words"]
    polynomials, flops = ([_as_polynomial(p) for p in values[name]] for name in ("polynomials", "flops"))
    steps = [
        Step(key, size, sign, words[phase], step, micro, *(words[n] for n in rest))
        for key, size, sign, phase, step, micro, *rest in values["steps"]
    ]
    return TracedProgram(polynomials, steps, flops)


def _as_list(polynomial: Polynomial) -> list[Any]:
    return [polynomial.tile, *(str(c) for c in polynomial.coefficients)]


def _as_polynomial(values: Sequence[Any]) -> Polynomial:
    return Polynomial(tuple(Fraction(c) for c in values[1:]), values[0])
