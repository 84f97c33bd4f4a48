"""The answer to "how many bytes": one configuration of one model, on one GPU or on none in particular."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from memplan.architectures.flattened import check_flattened
from memplan.errors import MemplanError, UsageError
from memplan.estimation import compiled
from memplan.estimation.assumptions import Assumption, assumptions, by_effect, left_out_of
from memplan.estimation.between import between_steps, left_out_between_steps
from memplan.estimation.compiled import Compiled, Range
from memplan.estimation.dimensions import dimensions
from memplan.estimation.evaluation import EvaluationProgram
from memplan.estimation.generation import DECODING, PREFILL, Generation, check_generation
from memplan.estimation.ledger import LedgerRow, at_evaluation, ledger
from memplan.estimation.lints import Lint, lints
from memplan.estimation.step import Recordings, StepProgram
from memplan.memory.events import Sizes
from memplan.operators.attention import MOST_OF_FLASH
from memplan.operators.tape import ATTENTION_KERNEL
from memplan.specs.margin import NONE as NO_MARGIN
from memplan.specs.pictured import Behind, PicturedBytes
from memplan.specs.tabular import Tabular
from memplan.specs.training import DISTILLATION, OPTIMIZERS, PRECISIONS, SCORED
from memplan.specs.values import NamedTuple, dataclass, field, replace
from memplan.steptime.roofline import Speed
from memplan.steptime.step import Pace, StepTime, TimedModel, seconds_of_update

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping

    from memplan.architectures.architecture import Architecture, Recording
    from memplan.estimation.step import Peaks
    from memplan.specs.evaluation import Evaluation
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.margin import Margin
    from memplan.specs.training import Setup
    from memplan.steptime.roofline import Term

    Answers = MutableMapping[str, tuple[float, ...]]
    """Numbers by question."""

SEGMENT_BYTES = 2 << 20
"""The caching allocator asks the driver for multiples of 2 MiB: reserved bytes without a replay are at least these."""

CUBLAS_WORKSPACE_BYTES = (4096 * 2 + 16 * 8) * 1024
CUBLAS_WORKSPACE_BYTES_HOPPER = 4096 * 8 * 1024
"""PyTorch's workspace for one cuBLAS handle (docs, CUDA semantics, "cuBLAS workspaces"); more on capability 9.0."""

EXPANDABLE_SEGMENTS = "expandable_segments:True"
"""The setting of the allocator that is tried where its default fragments too much."""

LEFT_OUT_OF_DISTILLATION = (
    ("generation", "lmbda is 0: the student writes no sequences of its own, and nor does the teacher (seq_kd)"),
    ("the prompts", "the data collator hands them out a second time, 16 bytes a token of theirs"),
    ("empty_cache() after the loss", "reserved bytes are those without it"),
)

LEAST_FLASH_CAPABILITY = 8
"""Major compute capability from which on flash attention's kernels run."""

NUM_CUBLAS_HANDLES = 2
"""One for the thread of the forward pass, one for autograd's."""

CONTEXT_BYTES = 504_658_657
"""0.47 GiB: the largest CUDA context measured with lazy loading.

A100, PyTorch 2.1 (ml-engineering, training/performance).
Stands in for cards whose context nobody has measured.
"""


class ModelSummary(NamedTuple):
    """Which model was estimated."""

    name: str
    model_type: str
    num_parameters: int
    num_trainable_parameters: int
    task: str = ""
    """``causal-lm``, ``masked-lm``, ``features`` or a classification: which head and loss were estimated."""
    attentions: tuple[str, ...] = ()
    """Attention implementations that transformers has for it."""
    unit: str = "sequence"
    """What a micro-batch counts; of others than sequences, the length means nothing."""


class Instant(NamedTuple):
    """A moment of the step."""

    name: str
    allocated_bytes: int
    """Highest number of allocated bytes in it, in steady state."""
    first_step_allocated_bytes: int
    """The same in the first step, before optimizer states exist."""


class Memory(NamedTuple):
    """The bytes of one configuration, without the tensors behind them: what a plan compares."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    """What the caching allocator holds, by replaying the run through it on this card (on none in particular: where
    memory is no object); without a replay, the least it can hold."""
    context_bytes: int
    workspace_bytes: int
    alloc_conf: str = ""
    """The PYTORCH_ALLOC_CONF that the reserved bytes need; empty: none."""

    @property
    def peak_process_bytes(self) -> int:
        """Reserved bytes, CUDA context and cuBLAS workspaces: what nvidia-smi shows."""
        return self.peak_reserved_bytes + self.context_bytes + self.workspace_bytes


@dataclass(frozen=True, kw_only=True)
class Estimate(Tabular, PicturedBytes):
    """Everything that is known about the memory of one configuration."""

    model: ModelSummary
    setup: Setup
    gpu: GpuSpec | None
    memory: Memory
    parameter_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int
    kept_activation_bytes: int
    """What the forward pass keeps for the backward pass, loss head included, parameters and inputs not."""
    kept_activation_bytes_per_layer: int
    """The same of the layer in the middle of the model."""
    instants: tuple[Instant, ...]
    upper_bound_bytes: int
    """Process bytes plus the headroom or the calibrated bound that was asked for."""
    step_time: StepTime | None
    """A lower bound; None where the GPU's rates are not known."""
    ledger: tuple[LedgerRow, ...]
    assumptions: tuple[Assumption, ...]
    """What is taken for granted, with its effect on the peak."""
    unmodelled: tuple[tuple[str, str], ...]
    """(what, why) of what the numbers leave out."""
    host_bytes: int = 0
    """Bytes of optimizer states in unified memory: on the host, as far as the card has no room for them."""
    lints: tuple[Lint, ...] = ()
    """What is worth knowing before the run."""
    compiled: Compiled | None = None
    """Between which bounds the bytes lie under ``torch.compile``; those of the other fields are the upper ones."""
    confidence: float = 0.0
    """Probability that a comparable run stays under the upper bound, at least; 0 where no measurement says so."""
    behind: Behind = field(default_factory=Behind, repr=False)
    """What pictures are worked out with."""

    @property
    def peak_instant(self) -> str:
        """Name of the instant with the most allocated bytes."""
        return max(self.instants, key=lambda instant: instant.allocated_bytes).name

    @property
    def headroom_bytes(self) -> int | None:
        """Usable bytes of the GPU less the upper bound; negative where it does not fit."""
        return None if self.gpu is None else self.gpu.usable_bytes - self.upper_bound_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the upper bound is within the usable bytes."""
        return None if self.headroom_bytes is None else self.headroom_bytes >= 0

    def records(self) -> list[dict[str, Any]]:
        """The ledger, one row a group of equal tensors."""
        return [row._asdict() for row in self.ledger]


class Estimator:
    """Estimates of one model; what setups have in common is worked out once."""

    prices_levers = True

    def __init__(
        self,
        architecture: Architecture,
        name: str,
        gpu: GpuSpec | None = None,
        speed: GpuSpec | None = None,
        answers: Answers | None = None,
        teacher: Architecture | None = None,
    ) -> None:
        """`gpu`: whose context and workspaces are counted; `speed`: whose rates time the steps (else the same).

        `answers`: where numbers of this model are remembered from run to run.
        `teacher`: the model that is distilled, read without dropout.
        """
        self._answers: Answers = {} if answers is None else answers
        self._behind = Behind(partial(Estimator, architecture, name, gpu, speed, answers, teacher))
        self.architecture = architecture
        self.name = name
        self.gpu = gpu
        self._speed = speed_of(speed or gpu)
        self._recordings = Recordings(architecture, teacher)
        self._timed: dict[tuple[int, int, bool], TimedModel] = {}
        self._sizes: dict[tuple[int, int, float, int], Sizes] = {}

    def check(self, setup: Setup) -> None:
        """Raise `UsageError` where the model cannot be trained like this, `NotModelledError` where nobody knows."""
        self.architecture.check_length(setup.seq_len, self.name)
        if setup.teacher is not None and self._recordings.teacher is not None:
            self._recordings.teacher.check_length(setup.seq_len, f"The teacher {setup.teacher}")
        if setup.attention not in self.architecture.attentions:
            raise UsageError(
                f"{self.architecture.model_type} has no {setup.attention} attention in transformers.",
                f"Use --attention {' or '.join(self.architecture.attentions)}.",
            )
        if setup.attention == "flash":
            self._check_flash(setup)
        if setup.evaluation is not None:
            program = self.evaluation(setup, setup.evaluation)
            if setup.evaluation.samples is not None:
                program.results()
        if setup.is_flattened:
            check_flattened(self.architecture, setup)
        for recording in self._recorded(setup) if setup.passes_mask else ():
            if not recording.stem.tape.minds_padding:
                raise _unmodelled_mask(setup, recording.architecture.model_type)

    def _recorded(self, setup: Setup) -> tuple[Recording, ...]:
        """The models that run."""
        layout = self.program(setup).layout
        return (layout.recording,) if layout.companion is None else (layout.recording, layout.companion.recording)

    def accepts(self, setup: Setup) -> bool:
        """Whether `check` lets it pass."""
        try:
            self.check(setup)
        except MemplanError:
            return False
        return True

    def other(self, setup: Setup, **changes: object) -> Setup | None:
        """`setup` with some fields changed; None where the model cannot be trained like that."""
        try:
            changed = replace(setup, **changes)  # type: ignore[arg-type]
        except MemplanError:
            return None
        return changed if self.accepts(changed) else None

    def _check_flash(self, setup: Setup) -> None:
        """Raise `UsageError` where the flash kernel does not run (check_flash_attention_* in sdp_utils.cpp)."""
        cure = "Use --attention sdpa."
        parameters, autocast = PRECISIONS[setup.precision]
        if (autocast or parameters) == "fp32":
            raise UsageError("The flash-attention kernel takes half precision only, not fp32.", cure)
        capability = None if self.gpu is None else self.gpu.compute_capability
        major = (capability or "").partition(".")[0]
        if self.gpu is not None and major.isdigit() and int(major) < LEAST_FLASH_CAPABILITY:
            raise UsageError(
                f"The flash-attention kernel needs compute capability {LEAST_FLASH_CAPABILITY}.0, "
                f"and {self.gpu.label} has {capability}.",
                cure,
            )
        longest = max(map(longest_head, self._recorded(setup)))
        if longest > MOST_OF_FLASH:
            raise UsageError(
                f"The flash-attention kernel takes heads of up to {MOST_OF_FLASH}, and {self.name} has heads of "
                f"{longest}.",
                cure,
            )

    def program(self, setup: Setup) -> StepProgram:
        """The step of `setup`."""
        return self._recordings.program(setup)

    def sizes(self, setup: Setup) -> Sizes:
        """Bytes of everything at the micro-batch and length of `setup`; setups that share both share the work."""
        flattened = setup.is_flattened and setup.num_sequences
        key = (setup.sequences_per_micro_batch, setup.seq_len, setup.supervised, flattened)
        if key not in self._sizes:
            self._sizes[key] = Sizes(dimensions(setup))
        return self._sizes[key]

    def peaks(self, setup: Setup, *, first_step: bool = False) -> Peaks:
        """Allocated bytes at the instants of a step, and of an evaluation where the setup has one."""
        sizes = self.sizes(setup)
        found = self.program(setup).peaks(sizes, setup.gradient_accumulation_steps, first_step=first_step)
        if setup.evaluation is None:
            return found
        between = self.evaluation(setup, setup.evaluation).peaks(sizes)
        return found._replace(by_instant={**found.by_instant, **between})

    def evaluation(self, setup: Setup, evaluation: Evaluation) -> EvaluationProgram:
        """Such an evaluation between the steps of `setup`."""
        setup = replace(setup, evaluation=evaluation)
        layout = self._recordings.evaluation_layout(replace(setup, micro_batch_size=evaluation.batch))
        return EvaluationProgram(self.program(setup), layout, setup, evaluation, self._generation(setup, evaluation))

    def _generation(self, setup: Setup, evaluation: Evaluation) -> Generation | None:
        """What it generates, None where it does not.

        Raises:
            UsageError: the model does not generate, or has too few positions.
        """
        if evaluation.generate is None:
            return None
        check_generation(self.architecture, self.name, setup, evaluation.generate)
        lengths = {PREFILL: setup.seq_len, DECODING: setup.seq_len + max(evaluation.generate - 1, 1)}
        layouts = {name: self._recordings.generation_layout(setup, length) for name, length in lengths.items()}
        return Generation(layouts, setup, evaluation.generate)

    def memory(self, setup: Setup) -> Memory:
        """The bytes of one configuration in steady state; reserved bytes are the least that can be."""
        (peak,) = self._remembered("peak", setup, lambda: (int(self.peaks(setup).peak),))
        return self._memory(int(peak), -(-int(peak) // SEGMENT_BYTES) * SEGMENT_BYTES)

    def _remembered(self, question: str, setup: Setup, answer: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """The numbers of `answer`, worked out only where nobody has asked before."""
        key = f"{question} {setup.unlike_the_default()}"
        known = self._answers.get(key)
        if known is None:
            known = self._answers[key] = answer()
        return known

    def replayed_memory(self, setup: Setup, budget_bytes: int | None = None, alloc_conf: str | None = None) -> Memory:
        """The same with the reserved bytes of a replay: exact, and slower by some hundredths of a second.

        `budget_bytes`: what the whole process may take; where that is too little, the reserved bytes lie above it by
        what is missing.
        `alloc_conf`: the settings of the allocator; None: the default, or what fits where it does not.
        """
        least = self.memory(setup)
        capacity = None
        if budget_bytes is not None:
            capacity = max(budget_bytes - least.context_bytes - least.workspace_bytes, 0)
            if capacity < least.peak_reserved_bytes:
                return least
        reserved, chosen = self._reserved(setup, capacity, alloc_conf or ""), alloc_conf or ""
        if capacity is not None and reserved > capacity and alloc_conf is None:
            tighter = self._reserved(setup, capacity, EXPANDABLE_SEGMENTS)
            if tighter < reserved:
                reserved, chosen = tighter, EXPANDABLE_SEGMENTS
        return least._replace(peak_reserved_bytes=max(reserved, least.peak_reserved_bytes), alloc_conf=chosen)

    def _reserved(self, setup: Setup, capacity: int | None, alloc_conf: str) -> int:
        """Reserved bytes by a replay."""
        alike = replace(setup, data_parallel_size=min(setup.data_parallel_size, 2))

        def answer() -> tuple[int]:
            from memplan.allocator.settings import AllocatorSettings
            from memplan.estimation.replaying import replay

            settings = AllocatorSettings(expandable_segments=bool(alloc_conf))
            steps = setup.gradient_accumulation_steps
            evaluation = None if setup.evaluation is None else self.evaluation(setup, setup.evaluation)
            program, sizes = self.program(setup), self.sizes(setup)
            found = replay(program, sizes, steps, evaluation=evaluation, capacity_bytes=capacity, settings=settings)
            return (int(found.reserved_bytes),)

        (reserved,) = self._remembered(f"reserved {capacity} {alloc_conf}", alike, answer)
        return int(reserved)

    def _memory(self, peak: int, reserved: int) -> Memory:
        return Memory(
            peak_allocated_bytes=peak,
            peak_reserved_bytes=reserved,
            context_bytes=context_bytes(self.gpu),
            workspace_bytes=workspace_bytes(self.gpu),
        )

    def step_time(self, setup: Setup) -> StepTime | None:
        """The time of a step, None where the rates of the GPU are not known: a lower bound, unless it was measured."""
        if self._speed is None:
            return None
        speed = self._speed
        step = lambda: self._timed_model(setup, speed).step(**self._step_of(setup))  # noqa: E731
        return StepTime(*self._remembered(f"time {speed}", setup, step))

    def pace(self, setup: Setup, env: Mapping[str, Any]) -> Pace | None:
        """What makes the time of a step, for the dimensions of `env`, arrays among them; None as for `step_time`."""
        if self._speed is None:
            return None
        passes = self._timed_model(setup, self._speed).passes(env, self.program(setup).layout.modes)
        step = self._step_of(setup)
        added, update = seconds_of_update(step["optimizer"], step["trained_bytes"], step["trained"], self._speed)
        return Pace(sum(passes), added, update)

    def time_terms(self, setup: Setup) -> tuple[Term, ...] | None:
        """The same, operator by operator."""
        if self._speed is None:
            return None
        return self._timed_model(setup, self._speed).terms(**self._step_of(setup))

    def _timed_model(self, setup: Setup, speed: Speed) -> TimedModel:
        program = self.program(setup)
        recording, companion = program.recording, program.layout.companion
        beside = None if companion is None else companion.recording
        key = (id(recording), 0 if beside is None else id(beside), setup.compile)
        if key not in self._timed:
            self._timed[key] = TimedModel(recording, speed, beside, fused=setup.compile)
        return self._timed[key]

    def _step_of(self, setup: Setup) -> dict[str, Any]:
        program = self.program(setup)
        return {
            "env": dimensions(setup),
            "modes": program.layout.modes,
            "accumulation": setup.gradient_accumulation_steps,
            "optimizer": OPTIMIZERS[setup.optimizer],
            "trained_bytes": program.layout.gradients.requested(),
            "trained": program.states.num_trained,
        }

    def estimate(self, setup: Setup, *, margin: Margin = NO_MARGIN, alloc_conf: str | None = None) -> Estimate:
        """Everything about one configuration; `margin` is added to the process bytes for the upper bound.

        `alloc_conf`: as for `replayed_memory`.
        """
        self.check(setup)
        program = self.program(setup)
        sizes = self.sizes(setup)
        steady, first = self.peaks(setup), self.peaks(setup, first_step=True)
        budget = None if self.gpu is None else margin.budget(self.gpu.usable_bytes)
        memory = self.replayed_memory(setup, budget, alloc_conf)
        rows = self.rows(setup)
        return Estimate(
            model=self.summary(setup),
            setup=setup,
            gpu=self.gpu,
            memory=memory,
            parameter_bytes=program.parameter_bytes(sizes),
            gradient_bytes=program.gradients.total(sizes),
            optimizer_state_bytes=program.optimizer_states.total(sizes),
            host_bytes=program.host_bytes + program.offloaded_bytes(sizes),
            kept_activation_bytes=steady.kept_activation_bytes,
            kept_activation_bytes_per_layer=steady.kept_activation_bytes_per_layer,
            instants=tuple(
                Instant(name=name, allocated_bytes=value, first_step_allocated_bytes=first.by_instant[name])
                for name, value in steady.by_instant.items()
            ),
            upper_bound_bytes=margin.upper_bound(memory.peak_process_bytes),
            step_time=self.step_time(setup),
            ledger=rows + process_rows(memory),
            assumptions=by_effect(
                *assumptions(self, setup, program, sizes, steady, rows), *between_steps(self, setup, sizes, steady)
            ),
            unmodelled=self.unmodelled(setup),
            lints=lints(self, setup, program, sizes, steady),
            compiled=self._compiled(setup, steady, memory) if setup.compile else None,
            behind=self._behind,
        )

    def rows(self, setup: Setup) -> tuple[LedgerRow, ...]:
        """The ledger of the tensors, at the peak of the step or of an evaluation that needs more."""
        rows = ledger(self.program(setup), self.sizes(setup), setup.gradient_accumulation_steps)
        if setup.evaluation is not None and self.peaks(setup).at_evaluation:
            return at_evaluation(rows, self.evaluation(setup, setup.evaluation))
        return rows

    def _compiled(self, setup: Setup, peaks: Peaks, memory: Memory) -> Compiled:
        """The range under ``torch.compile``, whose upper end `memory` is."""
        program, sizes = self.program(setup), self.sizes(setup)
        kept, low = compiled.least(program, sizes, peaks.by_instant, setup.gradient_accumulation_steps)
        if setup.evaluation is not None:
            low = max(low, self.evaluation(setup, setup.evaluation).least(sizes))
        return compiled.range_of(Range(kept, peaks.kept_activation_bytes), low, memory)

    def longest_head(self, setup: Setup) -> int:
        """The last dimension of the widest queries that an attention kernel is given; 0 without one."""
        return longest_head(self.program(setup).recording)

    def summary(self, setup: Setup) -> ModelSummary:
        """Name, type and size of the model."""
        program = self.program(setup)
        return ModelSummary(
            name=self.name,
            model_type=self.architecture.model_type,
            num_parameters=program.states.num_parameters,
            num_trainable_parameters=program.states.num_trained,
            task=setup.objective if setup.objective in SCORED else self.architecture.task,
            attentions=self.architecture.attentions,
        )

    def unmodelled(self, setup: Setup) -> tuple[tuple[str, str], ...]:
        """What the numbers leave out, for this setup."""
        found = [
            ("sequences of varying length", "all are as long as --seq-len; varying ones fragment the allocator more"),
        ]
        if self.gpu is None or self.gpu.calibration is None or self.gpu.calibration.launch_s is None:
            found.append(
                ("kernel launches, host and data loading", "the step time is a lower bound from FLOPs and bytes")
            )
        if self.gpu is None or self.gpu.context_bytes is None:
            found.append(("the CUDA context of this card", "nobody measured it; 0.47 GiB, the largest known, is taken"))
        if self.gpu is not None and set(PRECISIONS[setup.precision]) & set(self.gpu.unsupported_dtypes):
            found.append((f"{setup.precision} on this card", "it has no fast units for it: bytes hold, times do not"))
        found += (compiled.NOT_PROVEN, *compiled.UNMODELLED) if setup.compile else ()
        if setup.data_parallel_size > 1:
            found.append(("NCCL's buffers and the time of communication", "not modelled yet"))
        if setup.precision == "fp16-mixed":
            found.append(("the gradient scaler", "a few scalars"))
        found += left_out_of(OPTIMIZERS[setup.optimizer])
        if setup.objective == DISTILLATION:
            found += LEFT_OUT_OF_DISTILLATION
        found += left_out_between_steps(setup)
        if setup.precision == "fp32" and setup.attention == "sdpa" and _groups_queries(self.program(setup)):
            found.append(
                (
                    "scores of grouped-query attention in fp32",
                    "a fused kernel is counted; CUDA's for fp32 takes no grouped queries, and the math kernel that "
                    "torch then falls back to stores all scores, as eager does",
                )
            )
        return (*found, *self.architecture.unmodelled)


def _unmodelled_mask(setup: Setup, model_type: str) -> UsageError:
    """The refusal of a mask that nobody described."""
    if setup.padding:
        return UsageError(f"What padding adds is not modelled for {model_type}.", "Leave --padding out.")
    return UsageError(
        f"Under torch.compile transformers gives {model_type} a mask, and what that adds is not modelled.",
        "Use --attention eager, or leave --compile out.",
    )


def longest_head(recording: Recording) -> int:
    """The last dimension of the widest queries that an attention kernel is given; 0 without one."""
    kernels = (op for piece in recording.pieces() for op in piece.tape.ops if op.name == ATTENTION_KERNEL)
    return max((dim for op in kernels for dim in op.inputs[0].shape[-1:] if isinstance(dim, int)), default=0)


def _groups_queries(program: StepProgram) -> bool:
    """Whether a fused attention has fewer heads of keys than of queries."""
    kernels = (op for piece in program.recording.pieces() for op in piece.tape.ops if op.name == ATTENTION_KERNEL)
    return any(op.inputs[0].shape[1] != op.inputs[1].shape[1] for op in kernels)


def speed_of(gpu: GpuSpec | None) -> Speed | None:
    """The rates of a GPU, None where they are not known."""
    if gpu is None or gpu.memory_bandwidth_bytes_per_s is None or not gpu.flops_per_s:
        return None
    return Speed(gpu.flops_per_s, gpu.memory_bandwidth_bytes_per_s, gpu.launch_s)


def context_bytes(gpu: GpuSpec | None) -> int:
    """Bytes of the CUDA context: measured on this card, else the largest measured on any."""
    return CONTEXT_BYTES if gpu is None or gpu.context_bytes is None else gpu.context_bytes


def workspace_bytes(gpu: GpuSpec | None) -> int:
    """Bytes of the cuBLAS workspaces of the process: measured on this card, else PyTorch's default."""
    if gpu is not None and gpu.workspace_bytes is not None:
        return gpu.workspace_bytes
    hopper = gpu is not None and gpu.compute_capability == "9.0"
    return NUM_CUBLAS_HANDLES * (CUBLAS_WORKSPACE_BYTES_HOPPER if hopper else CUBLAS_WORKSPACE_BYTES)


def process_rows(memory: Memory) -> tuple[LedgerRow, ...]:
    """What the process holds beside the tensors."""
    rows = (
        (
            "allocator",
            "cached and unsplit blocks",
            memory.peak_reserved_bytes - memory.peak_allocated_bytes,
            "replay of the run through the caching allocator (c10/cuda/CUDACachingAllocator.cpp)",
        ),
        ("workspace", "cuBLAS workspaces", memory.workspace_bytes, "PyTorch docs, CUDA semantics"),
        ("context", "CUDA context", memory.context_bytes, "measured, see the GPU's profile"),
    )
    return tuple(
        LedgerRow("process", tensor, kind, 1, None, "", num, num, str(num), source)
        for kind, tensor, num, source in rows
    )
