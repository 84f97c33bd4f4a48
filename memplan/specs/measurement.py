"""What was measured on a device: real training steps of one configuration, phase by phase.

A record is written once and never edited.  Bytes are those of one rank; ``allocated`` is what PyTorch's allocator
counts, cuBLAS workspaces among it, ``reserved`` what it took from the driver, ``process`` what the driver charges to
the process.  Steady state is the second step and later ones: the first makes the optimizer states.
"""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.specs.training import library_of
from memplan.specs.values import NamedTuple, dataclass, field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.specs.training import Setup

DONE, OUT_OF_MEMORY, TIMED_OUT, KILLED, FAILED = "done", "out-of-memory", "timed-out", "killed", "failed"
OUTCOMES = (DONE, OUT_OF_MEMORY, TIMED_OUT, KILLED, FAILED)
"""How a trial ended; running out of memory is an answer, the last three are not."""

METERED_STEPS = 3
"""Steps whose phases are recorded: the first, the second and the third."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A configuration to be measured."""

    model: str
    """What it is called."""
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Content of its config.json: a record says by itself what was measured."""
    setup: Setup
    limit_bytes: int | None = None
    """Bytes that the whole process may take: a large card stands in for a smaller one; None: all there is."""
    limit: str = ""
    """The limit as it was given, such as ``24GB``."""
    target_batch: int | None = None
    """The batch whose plan is put to the test, where that is why this was measured."""
    role: str = ""
    """In such a test: ``plan``, ``larger`` (the next micro-batch) or empty."""
    alloc_conf: str = ""
    """The PYTORCH_ALLOC_CONF that it runs with; empty: the default."""

    def __post_init__(self) -> None:
        if self.limit_bytes is not None and self.limit_bytes <= 0:
            raise UsageError(f"The limit is {self.limit_bytes} bytes.", "Give a size such as 24GB.")


class PhaseBytes(NamedTuple):
    """One phase of one step, all its micro-steps together."""

    name: str
    """forward, backward, clip, optimizer or zero_grad."""
    allocated_bytes: int
    """At its end."""
    peak_allocated_bytes: int
    """The most within it."""
    reserved_bytes: int | None
    """At its end; None on a CPU, where nothing is reserved."""
    peak_reserved_bytes: int | None
    process_bytes: int | None
    """At its end; None where nobody says."""


class StepRecord(NamedTuple):
    """One optimizer step."""

    number: int
    """From 0."""
    phases: tuple[PhaseBytes, ...]
    num_alloc_retries: int
    """How often the allocator freed its cache and tried again, since the start of the process."""
    num_ooms: int
    """How often it gave up, since the start of the process."""

    def most(self, quantity: str) -> int | None:
        """The highest of a field of `PhaseBytes` over the phases; None where it was never read."""
        values = [value for phase in self.phases if (value := getattr(phase, quantity)) is not None]
        return max(values, default=None)


class Card(NamedTuple):
    """The device as it was found."""

    device: str
    """``cuda``, or ``cpu``: then bytes are those of the tensors alone, and nothing is reserved."""
    name: str
    """As the driver calls it: ``NVIDIA H200``."""
    total_bytes: int
    """What torch sees."""
    compute_capability: str = ""
    driver: str = ""
    clocks: Mapping[str, int] = {}
    """MHz as found before the first step (``sm``, ``memory``) and right after the timed ones (``sm_loaded``)."""
    num_other_processes: int | None = None
    """Processes on it beside this one; None where nobody says."""
    other_bytes: int | None = None
    """Bytes that were taken before this process began."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one trial said, on one rank."""

    trial: Trial
    outcome: str
    """One of `OUTCOMES`."""
    message: str = ""
    """Why, where it did not end well."""
    phase: str = ""
    """Where it ended, if not well: ``forward of step 0``."""
    rank: int = 0
    measured_at: str
    """UTC, ``2026-11-22T10:00:00Z``."""
    card: Card
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Library -> version: torch, cuda, transformers, python, memplan, peft where it took part."""
    num_parameters: int | None = None
    num_trainable_parameters: int | None = None
    parameter_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_state_bytes: int | None = None
    kept_activation_bytes: int | None = None
    """Allocated after a forward pass less before it, in steady state."""
    context_bytes: int | None = None
    """What the driver charges before the first tensor is made."""
    workspace_bytes: int | None = None
    """What cuBLAS had in the allocator at the end."""
    process_basis: str = ""
    """Who says what the process takes: ``nvml``, ``device`` (what is used of the card less what was before) or, empty,
    nobody."""
    steps: tuple[StepRecord, ...] = ()
    step_times_s: tuple[float, ...] = ()
    """Seconds of further steps, in which nothing else was read."""
    wall_s: float | None = None
    """Seconds of the whole trial, from the start of its process."""

    # -- in steady state, as an estimate says it ---------------------------------------------------------------------

    @property
    def steady(self) -> tuple[StepRecord, ...]:
        """Complete steps from the second on."""
        return tuple(step for step in self.steps if step.number > 0 and step.phases)

    def _steady(self, quantity: str) -> int | None:
        values = [value for step in self.steady if (value := step.most(quantity)) is not None]
        return max(values, default=None) if self.outcome == DONE else None

    @property
    def peak_allocated_bytes(self) -> int | None:
        """The most that was allocated from the second step on; None where the trial did not end well."""
        return self._steady("peak_allocated_bytes")

    @property
    def peak_reserved_bytes(self) -> int | None:
        """The most that was reserved; nothing is given back while all goes well."""
        return self._steady("peak_reserved_bytes")

    @property
    def peak_process_bytes(self) -> int | None:
        """The most that the driver charged to the process."""
        return self._steady("process_bytes")

    @property
    def step_time_s(self) -> float | None:
        """Median of the timed steps."""
        times = sorted(self.step_times_s)
        if not times:
            return None
        middle = len(times) // 2
        return times[middle] if len(times) % 2 else (times[middle - 1] + times[middle]) / 2

    @property
    def survived(self) -> bool | None:
        """Whether it fitted; None where that was not found out, as where others took some of the card."""
        crowded = self.card.num_other_processes or (self.card.other_bytes or 0) > OTHERS_BYTES
        if self.outcome == OUT_OF_MEMORY and crowded:
            return None
        return {DONE: True, OUT_OF_MEMORY: False}.get(self.outcome)

    @cached_property
    def id(self) -> str:
        """A short name of this very record."""
        return sha256(f"{self.measured_at} {self.rank} {identity(self)}".encode()).hexdigest()[:12]


OTHERS_BYTES = 2 << 30
"""What is taken of a card beyond this is others'. A choice, well above the 0.25 to 0.75 GiB that a driver keeps for
itself (`memplan.specs.gpu`)."""

SAME_STACK = ("torch", "cuda", "transformers", "memplan-probe")
"""Versions that decide whether something was measured before; those of adapters and optimizers where they take part."""

PROBE_VERSION = "1"
"""Raised when trials are run in another way, so that earlier ones are measured again."""


def identity(measurement: Measurement) -> str:
    """What was measured on what, in one line: a trial with the same identity need not be run again."""
    return trial_identity(measurement.trial, measurement.card, measurement.versions)


def trial_identity(trial: Trial, card: Card, versions: Mapping[str, str]) -> str:
    """The same of a trial that is to be run."""
    taking_part = [*SAME_STACK]
    taking_part += ["peft"] if trial.setup.lora else []
    library = library_of(trial.setup.optimizer)
    taking_part += [library] if library not in SAME_STACK else []
    taking_part += ["bitsandbytes"] if trial.setup.quantize and library != "bitsandbytes" else []
    stack = " ".join(f"{name}={versions.get(name, '')}" for name in taking_part)
    config = sha256(json.dumps(trial.config, sort_keys=True).encode()).hexdigest()[:16]
    place = f"{card.device} {card.name} of {card.total_bytes} driver {card.driver}"
    limit = f"limit {trial.limit_bytes} {trial.alloc_conf}".strip()
    return f"{trial.model} {config} {trial.setup!r} {limit} on {place} with {stack}"


OPTIMIZER_WORDS = {
    "adamw-fused": "fused",
    "adamw-foreach": "foreach",
    "adamw-forloop": "for-loop",
    "adamw-8bit": "8-bit",
}
"""Optimizer -> what it is called among a few words."""


def describe(trial: Trial) -> str:
    """A trial in a few words."""
    setup = trial.setup
    steps = setup.gradient_accumulation_steps
    words = [trial.model.rpartition("/")[2], f"{setup.micro_batch_size} x {setup.seq_len:,}", setup.precision]
    words += [f"K {steps}"] if steps > 1 else []
    words += [] if not trial.limit else [f"at {trial.limit}"]
    words += [] if setup.activation_checkpointing == "none" else [f"ckpt {setup.activation_checkpointing}"]
    words += [] if setup.lora is None else [f"{'DoRA' if setup.lora.dora else 'LoRA'} {setup.lora.rank}"]
    words += [setup.quantize] if setup.quantize else []
    words += ["frozen parts"] if setup.freeze else []
    words += [] if setup.attention == "sdpa" else [setup.attention]
    words += [OPTIMIZER_WORDS.get(setup.optimizer, setup.optimizer)] if setup.optimizer != "adamw" else []
    words += ["padded"] if setup.padding else []
    words += ["compiled"] if setup.compile else []
    words += [setup.batching] if setup.is_flattened else []
    words += [f"{setup.data_parallel_size} ranks"] if setup.data_parallel_size > 1 else []
    return ", ".join(words)
