"""Estimates of a module that memplan has no description of, from traces of it.

It answers what `memplan.estimation.estimate.Estimator` answers, so that the planner takes either.

The time of a step is that of its FLOPs, as PyTorch counts them operator by operator (`torch.utils.flop_counter`), or of
reading the parameters where that takes longer: a lower bound, which orders plans of one module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.allocator.settings import AllocatorSettings
from memplan.errors import UsageError
from memplan.estimation.estimate import (
    EXPANDABLE_SEGMENTS,
    SEGMENT_BYTES,
    Estimate,
    Instant,
    Memory,
    ModelSummary,
    context_bytes,
    process_rows,
    speed_of,
    workspace_bytes,
)
from memplan.estimation.ledger import LedgerRow
from memplan.estimation.traced import TRACED_MICRO_STEPS, TracedProgram, digest, fit_program, points_for
from memplan.specs.margin import NONE as NO_MARGIN
from memplan.specs.training import IN_BATCH, OPTIMIZERS, PRECISIONS
from memplan.specs.values import replace
from memplan.steptime.step import StepTime, bytes_of_update

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    from memplan.estimation.traced import Run
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.margin import Margin
    from memplan.specs.training import Setup
    from memplan.steptime.roofline import Speed

    Tracer = Callable[[Setup], Run]
    Programs = MutableMapping[str, TracedProgram]

BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a parameter by dtype."""


class TracedEstimator:
    """Estimates of one module; each choice that changes what runs is traced once, at some small sizes."""

    prices_levers = False
    """A lever would have to be traced; the planner asks for none."""

    def __init__(
        self,
        name: str,
        trace: Tracer,
        num_parameters: Callable[[Setup], tuple[int, int]],
        gpu: GpuSpec | None = None,
        speed: GpuSpec | None = None,
        programs: Programs | None = None,
        identity: str = "",
        unit: str = "sequence",
    ) -> None:
        """`trace`: a run of a setup; `num_parameters`: all and trained ones; `programs`: what is known already.

        `identity`: what `programs` are known by, beside the setup and a trace at the smallest size.
        `unit`: what a micro-batch counts.
        """
        self.name = name
        self.gpu = gpu
        self._trace = trace
        self._num_parameters = num_parameters
        self._speed = speed_of(speed or gpu)
        self._programs: Programs = {} if programs is None else programs
        self._identity = identity
        self._unit = unit
        self._found: dict[str, TracedProgram] = {}

    def check(self, setup: Setup) -> None:
        """Raise `UsageError` for what a trace cannot answer."""
        if setup.evaluation is not None:
            raise UsageError(
                "A traced module is planned without an evaluation.",
                "Leave --eval-... out, or ask memplan estimate about one size.",
            )
        if setup.compile:
            raise UsageError(
                "A traced module is planned as it runs without a compiler.",
                "Leave --compile out, or ask memplan trace about one size.",
            )
        if setup.is_flattened:
            raise UsageError(
                "A traced module is planned with a row for each sequence.",
                "Leave --batching out, or ask memplan trace about one size.",
            )
        if setup.data_parallel_size > 1:
            raise UsageError("A traced module is planned for one GPU.", "Leave --gpus out.")

    def program(self, setup: Setup) -> TracedProgram:
        """The traced step of `setup`; its size is left open."""
        squares = setup.objective in IN_BATCH
        points = points_for(setup.micro_batch_size, setup.seq_len, squares=squares)
        choices = replace(setup, micro_batch_size=1, gradient_accumulation_steps=TRACED_MICRO_STEPS, seq_len=1)
        key = f"{points} {choices!r}"
        if key not in self._found:
            self._found[key] = self._fitted(key, choices, points)
        return self._found[key]

    def _fitted(self, key: str, choices: Setup, points: Sequence[tuple[int, int]]) -> TracedProgram:
        """From `programs` where the trace at the smallest size is the same as it was then, else from all traces."""

        def trace(micro_batch_size: int, seq_len: int) -> Run:
            return self._trace(replace(choices, micro_batch_size=micro_batch_size, seq_len=seq_len))

        first = trace(*points[0])
        key = f"{self._identity} {key} {digest(first.events)}"
        if key not in self._programs:
            self._programs[key] = fit_program({points[0]: first} | {point: trace(*point) for point in points[1:]})
        return self._programs[key]

    def memory(self, setup: Setup) -> Memory:
        """The bytes of one configuration in steady state; reserved bytes are the least that can be."""
        peaks = self.program(setup).peaks(setup.micro_batch_size, setup.seq_len, setup.gradient_accumulation_steps)
        return Memory(
            peak_allocated_bytes=peaks.peak,
            peak_reserved_bytes=-(-peaks.peak // SEGMENT_BYTES) * SEGMENT_BYTES,
            context_bytes=context_bytes(self.gpu),
            workspace_bytes=workspace_bytes(self.gpu),
        )

    def replayed_memory(self, setup: Setup, budget_bytes: int | None = None) -> Memory:
        """The same with the reserved bytes of a replay within `budget_bytes` for the whole process."""
        least = self.memory(setup)
        capacity = None
        if budget_bytes is not None:
            capacity = max(budget_bytes - least.context_bytes - least.workspace_bytes, 0)
            if capacity < least.peak_reserved_bytes:
                return least
        alloc_conf = ""
        reserved = self._reserved(setup, capacity, expandable=False)
        if capacity is not None and reserved > capacity:
            tighter = self._reserved(setup, capacity, expandable=True)
            if tighter < reserved:
                reserved, alloc_conf = tighter, EXPANDABLE_SEGMENTS
        return least._replace(peak_reserved_bytes=max(reserved, least.peak_reserved_bytes), alloc_conf=alloc_conf)

    def _reserved(self, setup: Setup, capacity: int | None, *, expandable: bool) -> int:
        settings = AllocatorSettings(expandable_segments=expandable)
        found = self.program(setup).replay(
            setup.micro_batch_size, setup.seq_len, capacity_bytes=capacity, settings=settings
        )
        return found.reserved_bytes

    def step_time(self, setup: Setup) -> StepTime | None:
        """At the card's rates; None where they or the FLOPs are not known."""
        program = self.program(setup)
        if self._speed is None or not program.flops:
            return None
        forward, backward = (p.value(setup.micro_batch_size, setup.seq_len) for p in program.flops)
        return time_of(setup, self._speed, forward, backward, *self._num_parameters(setup))

    def summary(self, setup: Setup) -> ModelSummary:
        """Name and size of the module."""
        num, trained = self._num_parameters(setup)
        return ModelSummary(
            name=self.name,
            model_type="traced",
            num_parameters=num,
            num_trainable_parameters=trained,
            unit=self._unit,
        )

    def estimate(self, setup: Setup, *, margin: Margin = NO_MARGIN) -> Estimate:
        """Everything about one configuration."""
        self.check(setup)
        program = self.program(setup)
        size = (setup.micro_batch_size, setup.seq_len, setup.gradient_accumulation_steps)
        peaks = program.peaks(*size)
        budget = None if self.gpu is None else margin.budget(self.gpu.usable_bytes)
        memory = self.replayed_memory(setup, budget)
        rows = tuple(
            LedgerRow(
                step.module or "(the module)",
                step.op,
                step.category,
                num,
                None,
                step.dtype,
                num_bytes,
                num_bytes,
                f"{num} x ({program.polynomials[step.size].formula()})",
                "trace of the module",
            )
            for step, num, num_bytes in program.rows_at_peak(*size)
        )
        return Estimate(
            model=self.summary(setup),
            setup=setup,
            gpu=self.gpu,
            memory=memory,
            parameter_bytes=peaks.by_category.get("parameter", 0),
            gradient_bytes=peaks.by_category.get("gradient", 0),
            optimizer_state_bytes=peaks.by_category.get("optimizer_state", 0),
            kept_activation_bytes=peaks.kept_activation_bytes,
            kept_activation_bytes_per_layer=0,
            instants=tuple(
                Instant(name=name, allocated_bytes=value, first_step_allocated_bytes=peaks.first_step.get(name, 0))
                for name, value in peaks.by_instant.items()
            ),
            upper_bound_bytes=margin.upper_bound(memory.peak_process_bytes),
            step_time=self.step_time(setup),
            ledger=rows + process_rows(memory),
            assumptions=(),
            unmodelled=(
                ("paths that the module takes at larger sizes only", "it was traced at small ones and fitted"),
                ("scratch memory inside kernels other than attention's", "a trace does not see it"),
                (
                    "the time of operators that compute little",
                    "only products of matrices are timed",
                ),
            ),
        )


def time_of(setup: Setup, speed: Speed, forward: int, backward: int, num: int, trained: int) -> StepTime:
    """A step of a module with `num` parameters, whose passes over a micro-batch take these FLOPs."""
    parameters, autocast = PRECISIONS[setup.precision]
    flops_per_s = speed.of(autocast or parameters)
    reading = num * BYTES_OF[parameters] / speed.bytes_per_s
    moved = bytes_of_update(OPTIMIZERS[setup.optimizer], trained * BYTES_OF[parameters], trained)
    steps = setup.gradient_accumulation_steps
    return StepTime(
        steps * max(forward / flops_per_s, reading),
        steps * max(backward / flops_per_s, 2 * reading),
        0.0,
        moved / speed.bytes_per_s,
    )
