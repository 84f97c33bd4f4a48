"""The questions memplan answers, asked with plain values: what the library offers and what the command line calls.

    memplan.estimate("llama-3-8b", gpu="a100-80gb", seq_len=4096)
    memplan.suggest("llama-3.2-3b", gpu="24GB", target_batch=32)

Each reads the catalogue, builds the question and lets the core answer it; what an estimate without GPU and target does
not need is imported where it is used.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Literal, overload

from memplan.architectures.config import shown
from memplan.architectures.registry import read_architecture
from memplan.architectures.undescribed import DIFFUSERS, NO_LENGTH, kind_of, most_positions, type_of, usual_length
from memplan.catalog.answers import RememberedAnswers, code_stamp
from memplan.catalog.models import find_default_model, read_config
from memplan.errors import MemplanError, UnknownModelError, UsageError
from memplan.estimation.estimate import Estimator, speed_of
from memplan.safety import as_bytes, find_safety, margin_of, vouched
from memplan.specs.choices import as_count, dropout_of, setup_fields
from memplan.specs.training import TRACED, Setup
from memplan.specs.values import NamedTuple, replace
from memplan.units import parse_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import ArrayLike
    from typing_extensions import Unpack

    from memplan.architectures.architecture import Architecture
    from memplan.estimation.difference import Difference
    from memplan.estimation.estimate import Estimate
    from memplan.estimation.grid import Grid
    from memplan.estimation.sweep import Sweep
    from memplan.planner.goal import Goal, Target
    from memplan.planner.plan import Plan
    from memplan.probes.events import Trace
    from memplan.probes.modules import TracedModule
    from memplan.specs.choices import Choices
    from memplan.specs.gpu import GpuSpec

DEFAULT_SEQ_LEN = 2048
"""Where nobody gives a length; less for a model with fewer positions."""

DEFAULT_MODULE_SEQ_LEN = 1024
"""The same for a module of the user's own."""

DEFAULT_SWEEP = (tuple(2**n for n in range(7)), tuple(2**n for n in range(9, 14)))
"""Micro-batches and lengths of a sweep where nobody gives any: 1 to 64, 512 to 8,192."""

SPEED_STAND_INS = ((32 * 10**9, "rtx4090"), (None, "a100-80gb"))
"""Whose rates time a step on a card of which only the size is known: (largest size in bytes, catalogue name)."""


class Model(NamedTuple):
    """A model that was found and described."""

    architecture: Architecture
    name: str
    values: dict[str, Any]
    """Its config."""
    origin: str
    """Why it is this one: as asked for, from a file of the project, or the default."""
    dropout: float | None = None
    """What it was read with in place of every dropout of the config; None: these."""
    teacher: Model | None = None
    """The model that is distilled into it."""


class UserModule(NamedTuple):
    """A module that nobody described, so that it is run (without numbers).

    One of the user's own, ``package.module:factory``, or a model that transformers or diffusers builds from its config.
    """

    name: str
    origin: str = "as asked for"
    notify: Callable[[str], None] | None = None
    """Told what is being traced."""
    values: dict[str, Any] | None = None
    """Its config; None: a module of the user's own."""
    teacher: Model | None = None
    """The model that is distilled into it."""

    @property
    def model_type(self) -> str:
        """What its config says; ``traced`` without one."""
        return "traced" if self.values is None else type_of(self.values)

    def check_length(self, seq_len: int) -> None:
        """Raise `UsageError` where the model has too few positions, or takes no sequences."""
        if self.values is None:
            return
        kind, most = kind_of(self.values), most_positions(self.values)
        if kind.usual == NO_LENGTH:
            raise UsageError(f"{self.name} is {kind.name}: its inputs have one size.", "Leave --seq-len out.")
        if most is not None and seq_len > most:
            raise UsageError(
                f"{self.name} has positions for {most} tokens, not for {seq_len}.", f"Use --seq-len {most} or less."
            )


class Traced(NamedTuple):
    """What a run of the real module says."""

    trace: Trace
    estimate: Estimate
    difference: Difference | None
    """Formula against trace, where it was asked for."""
    origin: str
    """Why it is this model."""


def names_factory(text: str) -> bool:
    """Whether this is ``package.module:factory``; an existing file has priority.

    Raises:
        UsageError: it can only have been meant so, and is none.
    """
    if ":" not in text or "/" in text or "\\" in text or os.path.exists(text):
        return False
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        cure = "Write package.module:factory, such as models.tiny:make_model."
        raise UsageError(f"{shown(text)} does not name a factory.", cure)
    return True


@overload
def find_model(model: Model, *, dropout: float | None = None, objective: Literal["lm"] = "lm") -> Model: ...
@overload
def find_model(
    model: str | os.PathLike[str] | Model | UserModule | None, *, dropout: float | None = None, objective: str = "lm"
) -> Model | UserModule: ...
def find_model(
    model: str | os.PathLike[str] | Model | UserModule | None, *, dropout: float | None = None, objective: str = "lm"
) -> Model | UserModule:
    """The model of this name, path or hub id; the project's or memplan's default where None; a found one as it is.

    What no formula describes, a model or what it is trained for, comes back as a module that is run.

    Raises:
        MemplanError: it cannot be found, read or modelled.
    """
    if isinstance(model, Model | UserModule):
        run = isinstance(model, Model) and objective in TRACED
        return UserModule(model.name, model.origin, values=model.values) if run else model
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if model is not None and not isinstance(model, str):
        raise UsageError(f"model is {shown(model)}, not a name or a path.", "Say for example 'llama-3-8b'.")
    asked, origin = (model, "as asked for") if model is not None else find_default_model()
    if names_factory(asked):
        return UserModule(asked, origin)
    values, name = read_config(asked)
    if objective in TRACED:
        return UserModule(name, origin, values=values)
    try:
        architecture = read_architecture(values, name, dropout=dropout)
    except UnknownModelError:
        _check_runs(values, name)
        return UserModule(name, origin, values=values)
    return Model(architecture=architecture, name=name, origin=origin, values=values, dropout=dropout)


def _check_runs(values: dict[str, Any], name: str) -> None:
    """Raise for what memplan does not describe and what cannot be traced here in a short time; of the former its own.

    Raises:
        UnknownModelError: there is no library that could build it, or PyTorch runs it token by token.
    """
    from importlib.util import find_spec

    library = "diffusers" if type_of(values) in DIFFUSERS else "transformers"
    if find_spec("torch") is None or find_spec(library) is None:
        raise  # noqa: PLE0704 -- what the description's reader said
    kind = kind_of(values)
    if kind.loops:
        raise UnknownModelError(
            f"{name} is {kind.name} ({type_of(values)}), which PyTorch runs token by token without its own kernels: a "
            "plan would take many long traces.",
            "Ask memplan trace about one size, with a short --seq-len.",
        )


def find_trained(
    model: str | os.PathLike[str] | Model | UserModule | None, choices: Mapping[str, Any]
) -> Model | UserModule:
    """The model that is trained like this, with its teacher where it has one.

    Raises:
        UsageError: one of the two is not described, so that there is no formula.
        MemplanError: one cannot be found, read or modelled.
    """
    found = find_model(model, dropout=dropout_of(choices), objective=choices.get("objective") or "lm")
    teacher = find_teacher(choices)
    if teacher is not None and isinstance(found, UserModule):
        raise UsageError(
            f"Distillation into {found.name} is not modelled: memplan does not describe it.",
            "Ask memplan trace, which runs both models.",
        )
    return found if teacher is None else found._replace(teacher=teacher)


def find_teacher(choices: Mapping[str, Any]) -> Model | None:
    """The teacher that is named, without dropout, as it is only asked.

    Raises:
        UsageError: memplan does not describe it.
    """
    named: str | os.PathLike[str] | None = choices.get("teacher")
    if named is None:
        return None
    teacher: Model | UserModule = find_model(named, dropout=0.0)
    if isinstance(teacher, UserModule):
        raise UsageError(
            f"{teacher.name} is no teacher: memplan does not describe it.", "Name a model that memplan models lists."
        )
    return teacher


def estimator_of(
    model: Model, gpu: GpuSpec | None, speed: GpuSpec | None = None, *, remembers: bool = True
) -> Estimator:
    """The formula of a model on a card; `remembers`: earlier answers."""
    teacher = None if model.teacher is None else model.teacher.architecture
    answers = remembered(model) if remembers else None
    return Estimator(model.architecture, model.name, gpu, speed, answers=answers, teacher=teacher)


def remembered(model: Model) -> RememberedAnswers:
    """Earlier answers about this model, and of its teacher, by this code."""
    taught = () if model.teacher is None else (model.teacher.values,)
    fingerprint = json.dumps([code_stamp(), model.values, model.dropout, *taught], sort_keys=True)
    return RememberedAnswers(fingerprint, os.environ)


def find_gpu(gpu: str, gpus: int | None) -> tuple[GpuSpec, int]:
    """The card and how many of them; ``2xa100-80gb`` and ``gpus=2`` say the same."""
    from memplan.catalog.calibrations import calibrated
    from memplan.catalog.gpus import parse_gpu

    if not isinstance(gpu, str):
        raise UsageError(f"gpu is {shown(gpu)}, not a text.", "Say for example 'rtx4090', '24GB' or 'auto'.")
    num, spec = parse_gpu(gpu)
    if gpus is not None:
        gpus = as_count("gpus", gpus)
        if num not in {1, gpus}:
            raise UsageError(f"--gpu {gpu} names {num} GPUs and --gpus says {gpus}.", "Leave one of them out.")
        num = gpus
    return calibrated(spec, os.environ), num


def find_speed(gpu: GpuSpec) -> GpuSpec:
    """The card whose rates time the steps: itself, or a stand-in of about its size where they are not known."""
    from memplan.catalog.gpus import read_gpu

    if speed_of(gpu) is not None:
        return gpu
    names = [name for most, name in SPEED_STAND_INS if most is None or gpu.usable_bytes <= most]
    return read_gpu(names[0])


def default_seq_len(model: Model | UserModule) -> int:
    """2048, or as many tokens as the model has positions for or was made with; 1024 for a module nobody described."""
    if isinstance(model, UserModule):
        return DEFAULT_MODULE_SEQ_LEN if model.values is None else usual_length(model.values)
    most = model.architecture.max_positions or model.architecture.usual_positions
    return DEFAULT_SEQ_LEN if most is None else min(DEFAULT_SEQ_LEN, most)


def default_attention(model: Model | UserModule) -> str:
    """``sdpa`` where transformers has it for the model, as it chooses itself."""
    if isinstance(model, UserModule):
        return "sdpa"
    return "sdpa" if "sdpa" in model.architecture.attentions else model.architecture.attentions[0]


def make_setup(model: Model | UserModule, data_parallel_size: int, choices: Mapping[str, object]) -> Setup:
    """A setup of what was given; what is None takes its default."""
    fields = setup_fields(choices)
    if model.teacher is not None:
        fields["teacher"] = model.teacher.name
    fields.setdefault("seq_len", default_seq_len(model))
    fields.setdefault("attention", default_attention(model))
    return Setup(data_parallel_size=as_count("gpus", data_parallel_size), **fields)


def find_target(setup: Setup, target_batch: int | None, target_tokens: int | str | None) -> Target | None:
    """The batch that was asked for in one of two ways, None where in none.

    Raises:
        UsageError: it was asked for in both, or is no number.
    """
    if target_batch is not None and target_tokens is not None:
        raise UsageError("--target-batch and --target-tokens both say how large a step is.", "Leave one of them out.")
    if target_batch is None and target_tokens is None:
        return None
    from memplan.planner.goal import Target, target_from_tokens

    if target_batch is not None:
        return Target(as_count("target_batch", target_batch))
    assert target_tokens is not None
    tokens = parse_count(target_tokens) if isinstance(target_tokens, str) else as_count("target_tokens", target_tokens)
    return target_from_tokens(tokens, setup.tokens_per_example, setup.data_parallel_size)


def reach(setup: Setup, target: Target, accumulation: int | None) -> Setup:
    """`setup` with the accumulation steps that reach the target exactly.

    Raises:
        UsageError: none do, or `accumulation` says otherwise.
    """
    from memplan.planner.goal import Goal

    goal = Goal(
        setup=setup,
        target=target,
        usable_bytes=1,
        micro_batch_size=setup.micro_batch_size,
        gradient_accumulation_steps=None if accumulation is None else as_count("accumulation", accumulation),
    )
    ((_, steps),) = goal.splits()
    return replace(setup, gradient_accumulation_steps=steps)


def estimate(
    model: str | os.PathLike[str] | Model | UserModule | None = None,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    reserve: str | int | None = None,
    headroom: float | None = None,
    confidence: float | None = None,
    target_batch: int | None = None,
    target_tokens: int | str | None = None,
    **choices: Unpack[Choices],
) -> Estimate:
    """The bytes of one configuration.

    Args:
        model: Name of the catalogue, path of a config.json or of a folder with one, or hub id; None: the default model.
        gpu: Name, size (``24GB``) or ``auto``; None: no card in particular, and nothing is said about fitting.
        gpus: Number of GPUs with different data.
        reserve: Bytes that something else on the card needs, as ``1GiB`` or as a number.
        headroom: Percent of the usable bytes that has to stay free (5, or 0 with a confidence that measurements of the
            card vouch for).
        confidence: Probability with which the upper bound has to hold, by the measurements of the card.
        target_batch: Sequences per optimizer step over all GPUs, from which the accumulation follows; or
        target_tokens: tokens per optimizer step (``4M``), rounded to whole sequences.
        choices: How the model is trained: see `memplan.specs.choices.Choices`.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: the model cannot be read or modelled.
    """
    found = find_trained(model, choices)
    spec, num = find_gpu(gpu, gpus) if gpu is not None else (None, 1 if gpus is None else gpus)
    setup = make_setup(found, num, choices)
    target = find_target(setup, target_batch, target_tokens)
    if target is not None:
        setup = reach(setup, target, choices.get("accumulation"))
    safety = find_safety(spec, headroom, confidence)
    margin = margin_of(spec, reserve, safety)
    if isinstance(found, UserModule):
        module = _module(found, spec)
        setup = _settled(found, module, setup, choices)
        return module.estimate(setup, margin, model_type=found.model_type)[1]
    estimator = estimator_of(found, spec)
    return vouched(estimator.estimate(setup, margin=margin), as_bytes(reserve))


def estimate_grid(
    model: str | os.PathLike[str] | Model | UserModule | None = None,
    *,
    micro_batch: ArrayLike,
    seq_len: ArrayLike,
    gpu: str | None = None,
    gpus: int | None = None,
    **choices: Any,
) -> Grid:
    """The bytes of many micro-batches and lengths at once: a million points take about a second.

    Args as for `estimate`; `micro_batch` and `seq_len` are numbers or arrays that broadcast against each other.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: the model cannot be read or modelled.
    """
    from memplan.estimation.grid import estimate_grid as evaluate

    found = find_trained(model, choices)
    spec, num = find_gpu(gpu, gpus) if gpu is not None else (None, 1 if gpus is None else gpus)
    if isinstance(found, UserModule):
        raise UsageError(f"{found.name} is not described: there is no grid of it.", "Ask for one size at a time.")
    return evaluate(
        estimator_of(found, spec, remembers=False),
        make_setup(found, num, {**choices, "seq_len": 1}),
        micro_batch,
        seq_len,
    )


def sweep(
    model: str | os.PathLike[str] | Model | UserModule | None = None,
    *,
    micro_batches: Sequence[int] | None = None,
    seq_lens: Sequence[int] | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    reserve: str | int | None = None,
    headroom: float | None = None,
    confidence: float | None = None,
    notify: Callable[[str], None] | None = None,
    **choices: Any,
) -> Sweep:
    """The bytes of all pairs of some micro-batches and lengths, and which of them fit.

    Everything is named as for `estimate`; `notify` is told what is being replayed.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: the model cannot be read or modelled.
    """
    from memplan.estimation.sweep import sweep as evaluate

    found = find_trained(model, choices)
    if isinstance(found, UserModule):
        raise UsageError(
            f"{shown(found.name)} has no formula, only traces of one size at a time: there is no sweep of it.",
            "Ask memplan trace for one size, or memplan suggest for a plan.",
        )
    spec, num = find_gpu(gpu, gpus) if gpu is not None else (None, 1 if gpus is None else gpus)
    lengths = default_seq_lens(found) if seq_lens is None else seq_lens
    return evaluate(
        estimator_of(found, spec),
        make_setup(found, num, {**choices, "micro_batch": 1, "seq_len": min(lengths)}),
        DEFAULT_SWEEP[0] if micro_batches is None else micro_batches,
        lengths,
        margin=margin_of(spec, reserve, find_safety(spec, headroom, confidence)),
        notify=notify,
    )


def default_seq_lens(model: Model) -> tuple[int, ...]:
    """512, 1024, 2048 and so on, as far as the model has positions; three doublings up to these where they are few."""
    most = model.architecture.max_positions or model.architecture.usual_positions
    if most is None:
        return DEFAULT_SWEEP[1]
    if most < 2 * DEFAULT_SWEEP[1][0]:
        return tuple(length for length in (most // 8, most // 4, most // 2, most) if length)
    return tuple(length for length in DEFAULT_SWEEP[1] if length <= most)


def suggest(
    model: str | os.PathLike[str] | Model | UserModule | None = None,
    *,
    gpu: str,
    target_batch: int | None = None,
    target_tokens: int | str | None = None,
    gpus: int | None = None,
    reserve: str | int | None = None,
    headroom: float | None = None,
    confidence: float | None = None,
    **choices: Unpack[Choices],
) -> Plan:
    """The fastest configuration that fits and keeps the batch; what is None is free or takes its default.

    Everything is named as for `estimate`; micro-batch, accumulation and checkpointing are chosen where they are not
    given.  One of `target_batch` and `target_tokens` is needed.

    Raises:
        UsageError: a value or a combination has no meaning, or the target cannot be divided exactly.
        MemplanError: the model cannot be read or modelled.
    """
    found = find_trained(model, choices)
    goal, spec = goal_of(
        found,
        gpu=gpu,
        target_batch=target_batch,
        target_tokens=target_tokens,
        gpus=gpus,
        reserve=reserve,
        headroom=headroom,
        confidence=confidence,
        **choices,
    )
    return plan_of(found, goal, spec, choices)


def goal_of(
    found: Model | UserModule,
    *,
    gpu: str,
    target_batch: int | None = None,
    target_tokens: int | str | None = None,
    gpus: int | None = None,
    reserve: str | int | None = None,
    headroom: float | None = None,
    confidence: float | None = None,
    **choices: Any,
) -> tuple[Goal, GpuSpec]:
    """What is wanted, and of which card; arguments as for `suggest`.

    Raises:
        UsageError: a value or a combination has no meaning, or the target cannot be divided exactly.
    """
    from memplan.planner.goal import Goal

    if target_batch is None and target_tokens is None:
        raise UsageError(
            "A plan needs one target: --target-batch or --target-tokens.", "Say for example --target-batch 32."
        )
    spec, num = find_gpu(gpu, gpus)
    micro_batch, accumulation = choices.pop("micro_batch", None), choices.pop("accumulation", None)
    checkpointing = choices.get("checkpointing")
    placeholder = "full" if choices.get("offload") is not None else None  # it is about checkpointed layers
    setup = make_setup(found, num, {**choices, "checkpointing": checkpointing or placeholder})
    target = find_target(setup, target_batch, target_tokens)
    assert target is not None
    safety = find_safety(spec, headroom, confidence)
    goal = Goal(
        setup=setup,
        target=target,
        usable_bytes=spec.usable_bytes,
        reserve_bytes=as_bytes(reserve),
        headroom_percent=safety.headroom_percent,
        bound_ratio=safety.ratio,
        micro_batch_size=None if micro_batch is None else as_count("micro_batch", micro_batch),
        gradient_accumulation_steps=None if accumulation is None else as_count("accumulation", accumulation),
        activation_checkpointing=checkpointing,
    )
    return goal, spec


def plan_of(found: Model | UserModule, goal: Goal, spec: GpuSpec, choices: Mapping[str, object]) -> Plan:
    """The plan for a goal; `choices`: what the user said about the setup.

    Raises:
        MemplanError: the model cannot be modelled like this.
    """
    from memplan.planner.search import search

    speed = find_speed(spec)
    if isinstance(found, UserModule):
        return _plan_of_module(found, goal, choices, spec, speed)
    plan = search(estimator_of(found, spec, speed), goal, spec, speed.label)
    return replace(plan, estimate=vouched(plan.estimate, goal.reserve_bytes))


def trace(
    model: str | os.PathLike[str] | UserModule | None = None,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    reserve: str | None = None,
    headroom: float | None = None,
    confidence: float | None = None,
    target_batch: int | None = None,
    target_tokens: int | str | None = None,
    sdpa_kernel: str | None = None,
    diff: bool = False,
    notify: Callable[[str], None] | None = None,
    **choices: Unpack[Choices],
) -> Traced:
    """The bytes of one configuration from a run of the real module on PyTorch's meta device.

    Everything is named as for `estimate`; `model` may also be a model that transformers can build and memplan does not
    describe.

    Args beside those:
        sdpa_kernel: flash, efficient, cudnn or math, in place of the kernel that CUDA would choose.
        diff: compare the formula with the trace.
        notify: is told what is being traced.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: a library is not installed, or the module cannot be traced.
    """
    asked, origin, described = _find_traced(model, choices, diff=diff)
    teacher = find_teacher(choices)
    asked = asked._replace(teacher=teacher)
    described = None if described is None else described._replace(teacher=teacher)
    spec, num = find_gpu(gpu, gpus) if gpu is not None else (None, 1 if gpus is None else gpus)
    setup = make_setup(described or asked, num, choices)
    target = find_target(setup, target_batch, target_tokens)
    if target is not None:
        setup = reach(setup, target, choices.get("accumulation"))
    margin = margin_of(spec, reserve, find_safety(spec, headroom, confidence))
    if described is not None:
        described.architecture.check_length(setup.seq_len, described.name)
    if diff and setup.compile:
        raise UsageError("Formula and trace are compared without a compiler.", "Leave --diff or --compile out.")
    module = _traced_module(asked, spec, sdpa_kernel, notify)
    if described is None:
        setup = _settled(asked, module, setup, choices)
    found, answer = module.estimate(setup, margin, model_type=asked.model_type)
    if not diff:
        return Traced(found, answer, None, origin)
    from memplan.probes.differences import difference

    assert described is not None
    formula = estimator_of(described, spec, remembers=False)
    return Traced(found, answer, difference(formula, found, answer, setup), origin)


def _find_traced(
    model: str | os.PathLike[str] | UserModule | None, choices: Mapping[str, Any], *, diff: bool
) -> tuple[UserModule, str, Model | None]:
    """What is run; why it is this one; memplan's description, if it has one."""
    if isinstance(model, UserModule):
        asked, origin = model.name, model.origin
    else:
        asked, origin = (os.fspath(model), "as asked for") if model is not None else find_default_model()
    if isinstance(model, UserModule) or names_factory(asked):
        if diff:
            raise UsageError(f"memplan has no formula for {asked}.", "Leave --diff out, or name a described model.")
        return model if isinstance(model, UserModule) else UserModule(asked, origin), origin, None
    values, name = read_config(asked)
    own = UserModule(name, origin, values=values)
    objective = choices.get("objective")
    if objective in TRACED:
        if diff:
            raise UsageError(f"memplan has no formula for --objective {objective}.", "Leave --diff out.")
        return own, origin, None
    try:
        architecture = read_architecture(values, name, dropout=dropout_of(choices))
    except MemplanError as error:
        if diff:
            if isinstance(error, UnknownModelError):  # its cure is this very command
                cure = "Leave --diff out: the trace answers without a formula."
                raise UnknownModelError(error.cause, cure) from error
            raise
        return own, origin, None
    return own, origin, Model(architecture, name, values, origin, dropout_of(choices))


def _settled(found: UserModule, module: TracedModule, setup: Setup, choices: Mapping[str, object]) -> Setup:
    """The setup with an attention that the model has, where none was asked for."""
    if choices.get("seq_len") is not None:
        found.check_length(setup.seq_len)
    if found.values is None or choices.get("attention") is not None:
        return setup
    from memplan.probes.modules import fallback_attention

    return replace(setup, attention=fallback_attention(module.model, setup))


def _traced_module(
    asked: UserModule,
    gpu: GpuSpec | None,
    sdpa_kernel: str | None,
    notify: Callable[[str], None] | None,
) -> TracedModule:
    """What is to be run.

    Raises:
        MissingLibraryError: torch, or for a config transformers, is not installed.
    """
    from memplan.probes.faults import require

    if notify is not None:
        notify("starting PyTorch")
    require("torch")
    from memplan.probes.models import model_of
    from memplan.probes.modules import TracedModule, own_module

    model = own_module(asked.name) if asked.values is None else model_of(asked.values, asked.name)
    if asked.teacher is not None:
        model = replace(model, teacher=model_of(asked.teacher.values, asked.teacher.name))
    return TracedModule(model, gpu=gpu, sdpa_kernel=sdpa_kernel, notify=notify)


def _module(found: UserModule, gpu: GpuSpec | None) -> TracedModule:
    return _traced_module(found, gpu, None, found.notify)


def _plan_of_module(found: UserModule, goal: Goal, choices: Mapping[str, object], gpu: GpuSpec, speed: GpuSpec) -> Plan:
    """The plan for a module that only traces tell about; what it chooses is traced at its real size."""
    from memplan.catalog.programs import RememberedPrograms
    from memplan.planner.search import search
    from memplan.probes.modules import check_is_of_one_rank, confirm

    check_is_of_one_rank(goal.setup)
    module = _module(found, gpu)
    goal = replace(goal, setup=_settled(found, module, goal.setup, choices))
    goal = replace(goal, checkpointings=module.checkpointings(goal.setup))
    estimator = module.estimator(speed, RememberedPrograms(os.environ))
    return confirm(search(estimator, goal, gpu, speed.label), module, goal)
