"""What does a training run of a real module allocate, event by event?

The module is built on the meta device, whole training steps run on it, and birth and death of every storage are
recorded as CUDA would allocate them.  No number is computed, so a model of eight billion parameters takes seconds.

Not modelled: the CUDA context, cuBLAS workspaces, fragmentation, scratch memory inside kernels other than attention's,
a gradient scaler, more than one rank, ``torch.autocast`` and ``torch.compile`` inside the module.  A setup that is
compiled runs as without a compiler, with the mask that compiling brings; what is kept then, `compiled` knows.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError, UsageError, did_you_mean
from memplan.probes.events import Trace
from memplan.probes.faults import TraceError, explain, require
from memplan.specs.training import OPTIMIZERS, PRECISIONS
from memplan.specs.values import replace

if TYPE_CHECKING:
    from torch import nn

    from memplan.probes.models import TracedModel
    from memplan.probes.recorder import StorageRecorder
    from memplan.probes.training import Loop
    from memplan.specs.training import Setup


def trace_training(
    model: TracedModel | Mapping[str, Any],
    setup: Setup,
    *,
    sdpa_kernel: str | None = None,
    compute_capability: tuple[int, int] | None = None,
    num_steps: int = 2,
    loop: Loop | None = None,
) -> Trace:
    """Run `num_steps` training steps on the meta device and report every allocation.

    Args:
        model: A model of `memplan.probes.models` or `memplan.probes.factories`, or the content of a config.json.
        setup: The configuration; of a module of the user's own, `attention` is what the module does.
        sdpa_kernel: Overrules the kernel that CUDA would choose: "flash", "efficient", "cudnn" or "math".
        compute_capability: Of the GPU whose choice that is; (8, 0) if None.
        num_steps: Optimizer steps; optimizer states exist from the second step's start.
        loop: What the loop around the model does differently from the Trainer.

    Raises:
        MissingLibraryError: torch or transformers is not installed.
        UsageError: the setup cannot be traced.
        FactoryError: the module cannot be made.
        TraceError: a step cannot be followed.
    """
    require("torch")
    from memplan.probes.attention import RANDOM_STATES
    from memplan.probes.kernels import SCRATCH_BY_OPERATOR
    from memplan.probes.models import transformers_model
    from memplan.probes.recorder import StorageRecorder
    from memplan.probes.training import Loop

    loop = loop or Loop()
    chosen = transformers_model(model) if isinstance(model, Mapping) else model
    _check(chosen, setup, sdpa_kernel, num_steps)
    if setup.passes_mask and chosen.accepts_padding:
        setup = replace(setup, padding=True)
    counted = setup.attention == "flash" if loop.count_random_states is None else loop.count_random_states
    recorder = StorageRecorder(
        SCRATCH_BY_OPERATOR,
        {} if counted else RANDOM_STATES,
        has_padding=setup.padding,
        has_several=setup.has_several_in_a_row,
        trust=("transformers",),
    )
    try:
        with recorder:
            return _run(chosen, setup, recorder, loop, sdpa_kernel, compute_capability, num_steps)
    except MemplanError:
        raise
    except (Exception, SystemExit) as error:
        raise explain(error, *recorder.failure(error)) from error
    finally:
        gc.unfreeze()


def _check(model: TracedModel, setup: Setup, sdpa_kernel: str | None, num_steps: int) -> None:
    from memplan.probes.attention import SDPA_KERNELS

    if setup.attention == "flash" and setup.precision == "fp32":
        raise UsageError("Flash attention has no fp32 kernel.", "Use --attention sdpa or another precision.")
    if setup.data_parallel_size != 1:
        raise UsageError("A trace is of one rank.", "Leave --gpus out.")
    _check_loss(model, setup)
    if setup.padding and not model.accepts_padding:
        raise UsageError(
            f"{model.name} makes its own inputs.", "Leave --padding out, and let inputs() return the mask."
        )
    if setup.is_flattened:
        setup.check_packing()
        _check_evaluation(setup)
        if not model.accepts_padding:
            raise UsageError(f"{model.name} makes its own inputs.", "Leave --batching out, and let inputs() make them.")
    if sdpa_kernel is not None and sdpa_kernel not in SDPA_KERNELS:
        cure = did_you_mean(sdpa_kernel, SDPA_KERNELS, otherwise=f"Known: {', '.join(SDPA_KERNELS)}.")
        raise UsageError(f"sdpa_kernel {sdpa_kernel!r} is not known.", cure)
    if num_steps < 1:
        raise UsageError(f"num_steps is {num_steps}.", "Trace at least one step, two for the steady state.")


def _check_loss(model: TracedModel, setup: Setup) -> None:
    """Raise `UsageError` for losses of language models where there is none."""
    if model.kind.has_words:
        return
    what = f"{model.name} is {model.kind.name}"
    if setup.objective != "lm":
        raise UsageError(
            f"{what}: it is trained for its own loss, not for {setup.objective}.", "Leave --objective out."
        )
    if setup.loss not in {"full", "full-kept"}:
        raise UsageError(f"{what}: --loss {setup.loss} is for language models.", "Leave --loss out.")
    if setup.supervised != 1:
        raise UsageError(f"{what}: which tokens have a label makes no difference.", "Leave --supervised out.")


def _check_evaluation(setup: Setup) -> None:
    """Raise `UsageError` where steps and evaluation are not alike in whether a row holds several sequences."""
    if setup.evaluation is None:
        return
    of_evaluation = replace(setup, micro_batch_size=setup.evaluation.batch)
    if of_evaluation.has_several_in_a_row != setup.has_several_in_a_row:
        raise UsageError(
            "Steps and evaluation are traced with several sequences in a row both, or with one.",
            f"Give an --eval-batch of 1, or of 2 or more, as --micro-batch {setup.micro_batch_size}.",
        )


def _run(
    model: TracedModel,
    setup: Setup,
    recorder: StorageRecorder,
    loop: Loop,
    sdpa_kernel: str | None,
    compute_capability: tuple[int, int] | None,
    num_steps: int,
) -> Trace:
    import torch

    from memplan.probes.autocast import CudaAutocast
    from memplan.probes.checkpointing import enable_checkpointing, host_memory, repeated_layers, selective_checkpointing
    from memplan.probes.heads import use_loss
    from memplan.probes.models import PARAMETER_DTYPES
    from memplan.probes.objectives import find_objective
    from memplan.probes.optimizers import build_optimizer
    from memplan.probes.quantised import num_elements
    from memplan.probes.semantics import cuda_semantics
    from memplan.probes.smoothing import find_smoother
    from memplan.probes.training import TrainingRun

    lower = PRECISIONS[setup.precision][1]
    autocast = CudaAutocast(PARAMETER_DTYPES[lower]) if lower else None
    gc.freeze()  # the collector need not look at libraries again and again
    with torch.device("meta"):
        built = model.build(setup)
    module = built.module.train()
    _refuse_recurrent(module)
    _load(module, recorder)
    enable_checkpointing(
        module,
        setup.activation_checkpointing,
        autocast,
        offload=setup.offload is not None,
        reentrant=setup.reentrant,
    )
    objective = find_objective(model, module, setup, autocast)
    if objective is None:
        unlabelled = setup.num_sequences - 1 if setup.is_flattened else 0
        use_loss(module, setup.loss, autocast, setup.supervised, unlabelled)
    elif objective.companion is not None:
        _label(objective.companion, recorder, f"{objective.companion_label}: ")
    optimizer = build_optimizer(module, OPTIMIZERS[setup.optimizer]) if loop.update else None
    region = autocast.region if autocast else None
    smoother = find_smoother(module, setup)
    run = TrainingRun(built, optimizer, recorder, region, loop, objective=objective, smoother=smoother)
    with (
        cuda_semantics(autocast=autocast, sdpa_kernel=sdpa_kernel, compute_capability=compute_capability),
        selective_checkpointing(module, setup.activation_checkpointing, autocast),
        host_memory(),
        recorder.trail.following(),
    ):
        for number in range(num_steps):
            run.step(number, setup)
    parameters = list(module.parameters())
    return Trace(  # made while the module and its optimizer are alive
        name=model.name,
        setup=setup,
        num_parameters=sum(num_elements(p) for p in parameters),
        num_trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        layers=tuple(repeated_layers(module)),
        events=recorder.events(),
        spans=recorder.spans(),
        assumptions=(*(f"inputs: {one}" for one in built.said), *recorder.assumptions, *_mixed(setup, recorder)),
        host_bytes=getattr(optimizer, "host_bytes", 0),
        unit=model.kind.unit,
    )


def _mixed(setup: Setup, recorder: StorageRecorder) -> tuple[str, ...]:
    """What there is to say where no mask keeps the sequences of a row apart: nobody asked for their position ids."""
    if not setup.has_several_in_a_row or setup.attention == "flash" or recorder.assumptions:
        return ()
    return ("no mask is made by position ids: the sequences of a row attend to each other",)


def _refuse_recurrent(module: nn.Module) -> None:
    """Raise `TraceError` for what CUDA runs as one operator of cuDNN, and the meta device as one for each token."""
    import torch

    for path, part in module.named_modules():
        if isinstance(part, torch.nn.RNNBase):
            raise TraceError(
                f"nn.{type(part).__name__} at {path or 'the top'} runs as one cuDNN operator on a GPU, whose buffers "
                "are not known without one.",
                "Trace a module without recurrent layers of PyTorch's own.",
            )


def _load(module: nn.Module, recorder: StorageRecorder) -> None:
    """Name parameters and buffers; what making the model needed besides is not on the device."""
    gc.collect()
    gc.freeze()
    recorder.trail.describe(module)
    _label(module, recorder)
    recorder.drop_dead()


def _label(module: nn.Module, recorder: StorageRecorder, prefix: str = "") -> None:
    from memplan.probes.quantised import constants

    for name, buffer in module.named_buffers():
        recorder.label(buffer, "buffer", prefix + name, "buffer")
    for name, parameter in module.named_parameters():
        recorder.label(parameter, "parameter", prefix + name, "parameter")
        for what, constant in constants(parameter):
            recorder.label(constant, "parameter", prefix + name, what)
