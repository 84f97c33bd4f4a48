"""Planning with a module of the user's own: what the planner asks of it, answered from traces."""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from memplan.errors import MemplanError, UsageError
from memplan.estimation.assumptions import Assumption
from memplan.estimation.traced_estimator import TracedEstimator
from memplan.planner.plan import Rejection
from memplan.probes.answers import capability, estimate_of, trace_setup
from memplan.probes.faults import require
from memplan.probes.trace import trace_training
from memplan.specs.values import replace
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    from memplan.estimation.estimate import Estimate
    from memplan.estimation.traced import TracedProgram
    from memplan.planner.goal import Goal
    from memplan.planner.plan import Candidate, Plan
    from memplan.probes.events import Trace
    from memplan.probes.models import TracedModel
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.margin import Margin
    from memplan.specs.training import Setup

CHECKPOINTINGS = ("none", "every-2", "full")
"""What is tried where checkpointing is free: each choice is traced at some ten sizes."""

SHORT = 16
"""The length at which parameters are counted."""


class TracedModule:
    """A module that is known from running it."""

    def __init__(
        self,
        model: TracedModel,
        *,
        gpu: GpuSpec | None = None,
        sdpa_kernel: str | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        """`notify` is told what is being traced."""
        self.model = model
        self.gpu = gpu
        self.sdpa_kernel = sdpa_kernel
        self._notify = notify
        self._num_parameters: tuple[int, int] | None = None

    def trace(self, setup: Setup) -> Trace:
        """A trace of this very setup."""
        self._say(setup)
        found = trace_setup(self.model, setup, gpu=self.gpu, sdpa_kernel=self.sdpa_kernel)
        self._num_parameters = (found.num_parameters, found.num_trainable_parameters)
        return found

    def estimate(self, setup: Setup, margin: Margin, *, model_type: str = "traced") -> tuple[Trace, Estimate]:
        """A trace of this very setup, and what it says."""
        if setup.compile:
            from memplan.probes.compiled import check

            check(setup)
        trace = self.trace(setup)
        answer = estimate_of(trace, gpu=self.gpu, margin=margin, model_type=model_type, sdpa_kernel=self.sdpa_kernel)
        return trace, self._compiled(setup, trace, answer) if setup.compile else answer

    def _compiled(self, setup: Setup, trace: Trace, answer: Estimate) -> Estimate:
        """The answer with what the compiler's own partition keeps."""
        from memplan.probes.compiled import compiled_activations, compiled_estimate

        found = compiled_activations(
            self.model, setup, sdpa_kernel=self.sdpa_kernel, compute_capability=capability(self.gpu)
        )
        return compiled_estimate(replace(answer, setup=setup), trace, found)

    def estimator(self, speed: GpuSpec, programs: MutableMapping[str, TracedProgram]) -> TracedEstimator:
        """Estimates of the module at any size, from traces at small ones."""
        return TracedEstimator(
            self.model.name,
            self._run,
            self.num_parameters,
            self.gpu,
            speed,
            programs,
            identity=self._identity(),
            unit=self.model.kind.unit,
        )

    def num_parameters(self, setup: Setup) -> tuple[int, int]:
        """All of them, and those that are trained."""
        if self._num_parameters is None:
            self.trace(replace(setup, micro_batch_size=1, gradient_accumulation_steps=1, seq_len=SHORT))
        assert self._num_parameters is not None
        return self._num_parameters

    def checkpointings(self, setup: Setup) -> tuple[str, ...]:
        """What the planner may choose from: nothing but none, unless the module knows how to compute layers again."""
        require("torch")
        import torch

        with torch.device("meta"):
            module = self.model.build(setup).module
        if "transformers" in sys.modules:  # what it would say of each of the many traces
            sys.modules["transformers"].logging.set_verbosity_error()
        if not hasattr(module, "gradient_checkpointing_enable"):
            return CHECKPOINTINGS[:1]
        several = hasattr(module, "activation_checkpointing_enable")
        return CHECKPOINTINGS if several else (CHECKPOINTINGS[0], CHECKPOINTINGS[-1])

    def _run(self, setup: Setup) -> Trace:
        self._say(setup)
        found = trace_training(self.model, setup, sdpa_kernel=self.sdpa_kernel, compute_capability=capability(self.gpu))
        self._num_parameters = (found.num_parameters, found.num_trainable_parameters)
        return found

    def _say(self, setup: Setup) -> None:
        if self._notify is not None:
            self._notify(
                f"tracing {self.model.name}: micro {setup.micro_batch_size:,} x {setup.seq_len:,} tokens, "
                f"checkpointing {setup.activation_checkpointing}"
            )

    def _identity(self) -> str:
        """What else than its traces tells a module from an earlier one: the text of its file, the libraries."""
        parts = [self.model.name, str(self.sdpa_kernel), str(capability(self.gpu))]
        parts += map(_version, ("torch", "transformers"))
        file = getattr(sys.modules.get(self.model.name.partition(":")[0]), "__file__", None)
        if file and os.path.isfile(file):
            with open(file, "rb") as source:
                parts.append(sha256(source.read()).hexdigest())
        return " ".join(parts)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def confirm(plan: Plan, module: TracedModule, goal: Goal) -> Plan:
    """The plan with its first choice traced at its real size; where that does not fit, the next one.

    What the trace of the real size says is exact and takes the place of what was fitted.
    """
    start = plan.best or plan.nearest
    assert start is not None
    ranked = [start, *plan.alternatives]
    short: list[Candidate] = []
    first: Estimate | None = None
    for position, candidate in enumerate(ranked):
        found, estimate = _retraced(candidate, module, goal)
        first = first or estimate
        if found.fits:
            rest = tuple(ranked[position + 1 :])
            return replace(
                plan,
                best=found,
                nearest=None,
                estimate=estimate,
                alternatives=rest,
                rejections=(*_refused(short), *plan.rejections),
                ways_out=(),
            )
        short.append(found)
    assert first is not None
    refused = _refused(short) if plan.best else ()
    return replace(
        plan, best=None, nearest=short[0], estimate=first, alternatives=(), rejections=(*refused, *plan.rejections)
    )


def _refused(candidates: Sequence[Candidate]) -> tuple[Rejection, ...]:
    return tuple(
        Rejection(c, f"{format_bytes(c.short_by_bytes)} short of the budget, by a trace of its own size")
        for c in candidates
    )


def _retraced(candidate: Candidate, module: TracedModule, goal: Goal) -> tuple[Candidate, Estimate]:
    margin = goal.margin
    _, estimate = module.estimate(candidate.setup, margin)
    exact, fitted = estimate.memory.peak_allocated_bytes, candidate.memory.peak_allocated_bytes
    if exact == fitted:
        value = "peaks are fitted to traces at small sizes; a trace of the plan at its own size says the same"
        effect = None
    else:
        value = (
            f"a trace of the plan at its own size says {format_bytes(exact)} allocated, which is used; "
            f"{exact - fitted:+,} bytes beside what was fitted to traces at small sizes"
        )
        effect = fitted - exact
    note = Assumption("size", value, "as fitted" if effect else "", effect, "alternatives are as fitted")
    estimate = replace(estimate, assumptions=(*estimate.assumptions, note))
    memory = estimate.memory
    bound = margin.upper_bound(memory.peak_process_bytes)
    return candidate._replace(
        memory=memory, upper_bound_bytes=bound, headroom_bytes=goal.usable_bytes - bound
    ), estimate


def own_module(spec: str) -> TracedModel:
    """What ``package.module:factory`` makes.

    Its Python module is imported here: tensors that are made by the import are no part of a training step.

    Raises:
        MissingLibraryError: torch is not installed.
        FactoryError: it cannot be imported.
    """
    require("torch")
    import torch

    from memplan.probes.factories import factory_model, find_factory

    model = factory_model(spec)
    module, _, name = spec.partition(":")
    with torch.device("meta"):
        find_factory(module, name)
    return model


def check_is_of_one_rank(setup: Setup) -> None:
    """Raise `UsageError` for several GPUs."""
    if setup.data_parallel_size > 1:
        raise UsageError("A module is traced for one GPU.", "Leave --gpus out.")


def fallback_attention(model: TracedModel, setup: Setup) -> str:
    """The attention of `setup` where transformers can build the model with it, else ``eager``."""
    require("torch")
    import torch

    try:
        with torch.device("meta"):
            model.build(setup)
    except MemplanError:
        return "eager"
    return setup.attention
