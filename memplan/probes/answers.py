"""What a trace answers: the same estimate as the formula's, so that the two can be subtracted.

A trace has at most two micro-steps: a third one does what the second did, and only its inputs are there besides.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from memplan.allocator.replay import replay
from memplan.allocator.settings import AllocatorSettings
from memplan.estimation.assumptions import Assumption
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
from memplan.estimation.ledger import KIND_ORDER, LedgerRow
from memplan.estimation.traced import INSTANT_BY_PHASE, TRACED_MICRO_STEPS
from memplan.estimation.traced_estimator import time_of
from memplan.operators.sizes import allocated
from memplan.probes.trace import trace_training
from memplan.specs.margin import NONE as NO_MARGIN
from memplan.specs.training import IN_BATCH
from memplan.specs.values import replace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from memplan.probes.events import Trace, TraceEvent
    from memplan.probes.models import TracedModel
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.margin import Margin
    from memplan.specs.training import Setup
    from memplan.steptime.step import StepTime

UNMODELLED = (
    ("scratch memory inside kernels other than attention's", "a trace sees what PyTorch's operators allocate"),
    ("sequences of varying length", "all are as long as --seq-len; varying ones fragment the allocator more"),
    ("the time of operators that compute little", "only products of matrices are timed"),
)
"""(what, why) of what a trace leaves out."""


def trace_setup(
    model: TracedModel | Mapping[str, Any],
    setup: Setup,
    *,
    gpu: GpuSpec | None = None,
    sdpa_kernel: str | None = None,
) -> Trace:
    """The trace of a setup with any number of accumulation steps, for the kernels of this card."""
    steps = setup.gradient_accumulation_steps
    traced = replace(setup, gradient_accumulation_steps=min(steps, TRACED_MICRO_STEPS))
    found = trace_training(model, traced, sdpa_kernel=sdpa_kernel, compute_capability=capability(gpu))
    return found if traced == setup else with_micro_steps(found, steps)


def capability(gpu: GpuSpec | None) -> tuple[int, int] | None:
    """Compute capability as two numbers, None where it is not known."""
    major, _, minor = ((gpu.compute_capability if gpu else None) or "").partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def with_micro_steps(trace: Trace, steps: int) -> Trace:
    """A trace of two micro-steps as one of `steps`: with the inputs of the others, which are there throughout."""
    inputs = Counter((e.step, e.op) for e in trace.events if e.category == "input" and e.sign > 0)
    seen: Counter[tuple[int, str]] = Counter()
    copied: dict[int, list[int]] = {}
    events: list[TraceEvent] = []
    starts = []
    for event in trace.events:
        starts.append(len(events))
        events.append(event)
        if event.sign > 0 and event.category == "input":
            kind = (event.step, event.op)
            seen[kind] += 1
            if inputs[kind] == seen[kind] == TRACED_MICRO_STEPS:
                copied[event.key] = [-(event.key * steps + n + 1) for n in range(steps - TRACED_MICRO_STEPS)]
        events += [event._replace(key=key) for key in copied.get(event.key, ())]
    starts.append(len(events))
    spans = tuple(span._replace(start=starts[span.start], stop=starts[span.stop]) for span in trace.spans)
    setup = replace(trace.setup, gradient_accumulation_steps=steps)
    return replace(trace, setup=setup, events=tuple(events), spans=spans)


def estimate_of(
    trace: Trace,
    *,
    gpu: GpuSpec | None = None,
    margin: Margin = NO_MARGIN,
    model_type: str = "traced",
    sdpa_kernel: str | None = None,
    notes: Sequence[Assumption] = (),
    alloc_conf: str | None = None,
) -> Estimate:
    """Everything that a trace says about its configuration; `notes` are further assumptions."""
    memory = memory_of(trace, gpu, None if gpu is None else margin.budget(gpu.usable_bytes), alloc_conf)
    resident = {kind: trace.category_bytes(kind) for kind in ("parameter", "gradient", "optimizer_state")}
    return Estimate(
        model=ModelSummary(
            name=trace.name,
            model_type=model_type,
            num_parameters=trace.num_parameters,
            num_trainable_parameters=trace.num_trainable_parameters,
            unit=trace.unit,
        ),
        setup=trace.setup,
        gpu=gpu,
        memory=memory,
        parameter_bytes=resident["parameter"],
        gradient_bytes=resident["gradient"],
        optimizer_state_bytes=resident["optimizer_state"],
        host_bytes=trace.host_bytes,
        kept_activation_bytes=trace.kept_activation_bytes,
        kept_activation_bytes_per_layer=trace.kept_activation_bytes_per_layer,
        instants=instants_of(trace),
        upper_bound_bytes=margin.upper_bound(memory.peak_process_bytes),
        step_time=_step_time(trace, gpu),
        ledger=rows_of(trace) + process_rows(memory),
        assumptions=(*_assumptions(trace, gpu, sdpa_kernel), *notes),
        unmodelled=UNMODELLED,
    )


def _step_time(trace: Trace, gpu: GpuSpec | None) -> StepTime | None:
    speed = speed_of(gpu)
    if speed is None:
        return None
    return time_of(trace.setup, speed, *trace.flops, trace.num_parameters, trace.num_trainable_parameters)


def instants_of(trace: Trace) -> tuple[Instant, ...]:
    """The highest points of a steady and of the first step, by instant."""
    steady, first = _by_instant(trace.phase_peaks()), _by_instant(trace.phase_peaks(0))
    return tuple(
        Instant(name=name, allocated_bytes=value, first_step_allocated_bytes=first[name])
        for name, value in steady.items()
    )


def _by_instant(by_phase: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for phase, value in by_phase.items():
        if phase in INSTANT_BY_PHASE:
            name = INSTANT_BY_PHASE[phase]
            found[name] = max(found.get(name, 0), value)
    return found


def memory_of(trace: Trace, gpu: GpuSpec | None, budget_bytes: int | None, given: str | None = None) -> Memory:
    """The three totals; `budget_bytes`: what the whole process may take.

    `given`: the settings of the allocator; None: the default, or what fits where it does not.
    """
    context, workspaces = context_bytes(gpu), workspace_bytes(gpu)
    capacity = None if budget_bytes is None else max(budget_bytes - context - workspaces, 0)
    reserved, alloc_conf = -(-trace.peak_allocated_bytes // SEGMENT_BYTES) * SEGMENT_BYTES, ""
    if capacity is None or reserved <= capacity:  # else not even the tensors fit
        reserved, alloc_conf = _reserved(trace, capacity, expandable=bool(given)), given or ""
        if capacity is not None and reserved > capacity and given is None:
            tighter = _reserved(trace, capacity, expandable=True)
            if tighter < reserved:
                reserved, alloc_conf = tighter, EXPANDABLE_SEGMENTS
    return Memory(
        peak_allocated_bytes=trace.peak_allocated_bytes,
        peak_reserved_bytes=reserved,
        context_bytes=context,
        workspace_bytes=workspaces,
        alloc_conf=alloc_conf,
    )


def allocator_events(trace: Trace) -> list[tuple[int, int, int]]:
    """The events as the allocator's replay takes them."""
    return [(event.key, event.num_bytes, event.sign) for event in trace.events]


def _reserved(trace: Trace, capacity_bytes: int | None, *, expandable: bool) -> int:
    settings = AllocatorSettings(expandable_segments=expandable)
    found = replay(allocator_events(trace), settings, capacity_bytes=capacity_bytes)
    missing = found.out_of_memory
    return found.peak_reserved_bytes if missing is None else found.end.reserved + missing.segment_bytes


def pattern(module: str) -> str:
    """The path of a module with ``*`` for the number of a layer: the first number that has a name before it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module, count=1)


def rows_of(trace: Trace) -> tuple[LedgerRow, ...]:
    """What is alive at the peak of the last step: equal storages of equal layers together."""
    groups = Counter((pattern(e.module), e.op, e.category, e.shape, e.dtype, e.num_bytes) for e in trace.alive_at_peak)
    rows = [
        LedgerRow(
            module=module or "(the module)",
            tensor=op,
            kind=category,
            num=num,
            shape=shape,
            dtype=dtype,
            num_bytes=num * allocated(num_bytes),
            bytes_at_peak=num * allocated(num_bytes),
            formula=f"{num} x {num_bytes}",
            source=f"trace: {op} in {module or 'the module'}",
        )
        for (module, op, category, shape, dtype, num_bytes), num in groups.items()
    ]
    order = {kind: n for n, kind in enumerate(KIND_ORDER)}
    return tuple(sorted(rows, key=lambda r: (order[r.kind], -r.num_bytes, r.module, r.tensor, r.dtype)))


def _assumptions(trace: Trace, gpu: GpuSpec | None, sdpa_kernel: str | None) -> list[Assumption]:
    """What was taken for granted: the kernels, and what the module asked about data that is not there."""
    if sdpa_kernel is not None:
        kernel = f"scaled_dot_product_attention runs the {sdpa_kernel} kernel, as asked for"
    else:
        major, minor = capability(gpu) or (8, 0)
        kernel = f"scaled_dot_product_attention runs the kernel that CUDA chooses on compute capability {major}.{minor}"
    found = [Assumption("attention", kernel, "", None, "PyTorch's rules (sdp_utils.cpp)")]
    steps = trace.setup.gradient_accumulation_steps
    if steps > TRACED_MICRO_STEPS:
        others = steps - TRACED_MICRO_STEPS
        text = f"{TRACED_MICRO_STEPS} micro-steps were run; the other {others:,} do what the second did"
        found.append(Assumption("accumulation", text, "", None, "their inputs are counted"))
    if trace.setup.objective in IN_BATCH:
        text = f"{trace.setup.micro_batch_size - 1:,} of each anchor, the other positives of its micro-batch"
        found.append(
            Assumption("negatives", text, "", None, "accumulation adds none: it is the loss of a smaller batch")
        )
    if trace.grown_bytes:
        text = f"no steady state: {trace.grown_bytes:+,} bytes from step to step, which the module holds; two were run"
        found.append(Assumption("steps", text, "", None, "a peak after more steps is another one"))
    found += [Assumption("data", text, "", None, "a trace has no data") for text in trace.assumptions]
    return found
