"""Real training steps of one trial on one device, reported as they come.

Three steps are metered phase by phase, then further ones are timed with nothing read in between.  What is reported is a
list of small JSON objects, so that whatever happens later (out of memory, a time limit, a signal) what was read before
is known:

    {"card": ...}  {"num_parameters": ...}  {"step": ...} x 3  {"gradient_bytes": ...}  {"timed": [...]}
    {"end": "done"}
"""

from __future__ import annotations

import contextlib
import gc
import time
from typing import TYPE_CHECKING, Any

import torch

from memplan.errors import MemplanError, UsageError
from memplan.operators.sizes import allocated
from memplan.probes.adapters import load_libraries
from memplan.probes.checkpointing import enable_checkpointing, selective_checkpointing
from memplan.probes.devices import LimitReachedError, watching
from memplan.probes.heads import use_library_loss
from memplan.probes.meter import PhaseMeter, Unwatched
from memplan.probes.models import PARAMETER_DTYPES, transformers_model
from memplan.probes.optimizers import load_library, real_optimizer
from memplan.probes.quantised import constants, num_elements
from memplan.probes.smoothing import find_smoother
from memplan.probes.training import Loop, TrainingRun
from memplan.specs.measurement import DONE, FAILED, METERED_STEPS, OUT_OF_MEMORY
from memplan.specs.records import step_record
from memplan.specs.training import OPTIMIZERS, PRECISIONS
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from memplan.probes.devices import Device
    from memplan.specs.measurement import Trial
    from memplan.specs.training import Setup

    Report = Callable[[dict[str, Any]], None]

MAX_TIMED_STEPS = 7
LEAST_TIMED_STEPS = 3
TIMED_S = 4.0
"""Steps are timed until there are so many, or until so many seconds are over and there are three."""

SEED = 0

MOST_OF_AN_ERROR = 600
"""Characters of an error that are kept."""


class Ranks(NamedTuple):
    """Which part of a data-parallel run this process is."""

    rank: int = 0
    size: int = 1
    wrap: Callable[[Any, str], Any] | None = None
    """Module and device type -> DistributedDataParallel."""


def run_trial(
    trial: Trial,
    device: Device,
    report: Report,
    *,
    ranks: Ranks | None = None,
    snapshot: str | None = None,
    limit_bytes: int | None = None,
) -> None:
    """Measure a trial; whatever goes wrong is reported as its end."""
    ranks = ranks or Ranks()
    meter = PhaseMeter(device)
    try:
        card = device.open(limit_bytes)
    except Exception as error:  # noqa: BLE001 -- no device, no answer: also where it has no memory left
        report({"end": FAILED, "message": " ".join(str(error).split())[:MOST_OF_AN_ERROR]})
        return
    try:
        report({"card": card._asdict(), "context_bytes": device.context_bytes, "process_basis": device.process_basis})
        load_library(OPTIMIZERS[trial.setup.optimizer])
        load_libraries(trial.setup)
        with watching(device), history(snapshot, device):
            _train(trial, device, meter, report, ranks)
        report({"clocks": device.clocks(), "workspace_bytes": device.workspace_bytes()})
        report({"end": DONE})
    except Exception as error:  # noqa: BLE001 -- the end of a trial, whatever it is
        end = OUT_OF_MEMORY if _ran_out(error, device) else FAILED
        text = " ".join(str(error).split())
        named = text if isinstance(error, MemplanError) else f"{type(error).__name__}: {text}"
        report({"end": end, "message": named[:MOST_OF_AN_ERROR], "phase": meter.position})


def _ran_out(error: BaseException | None, device: Device) -> bool:
    """Whether an error, or one that it was raised from, says that the device has no more memory."""
    while error is not None:
        if isinstance(error, LimitReachedError) or device.is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _train(trial: Trial, device: Device, meter: PhaseMeter, report: Report, ranks: Ranks) -> None:
    setup = trial.setup
    if setup.objective != "lm":
        raise UsageError(f"--objective {setup.objective} is not measured yet.", "Use memplan trace.")
    torch.manual_seed(SEED)
    meter.position = "building the model"
    with torch.device(device.type), kernels(setup, device.type):
        built = transformers_model(trial.config, trial.model).build(setup)
        module: Any = built.module.train()
        enable_checkpointing(
            module,
            setup.activation_checkpointing,
            None,
            offload=setup.offload is not None,
            reentrant=setup.reentrant,
        )
        use_library_loss(module, setup.loss)
        optimizer = real_optimizer(module, OPTIMIZERS[setup.optimizer])
    device.settle()
    called = module if ranks.wrap is None else ranks.wrap(module, device.type)
    report(_model(module))
    run = TrainingRun(
        built,
        optimizer,
        meter,
        _autocast(setup, device.type),
        Loop(),
        device=device.type,
        module=called,
        scaler=_scaler(setup, device.type),
        smoother=find_smoother(module, setup),
    )
    with selective_checkpointing(module, setup.activation_checkpointing, None), kernels(setup, device.type):
        for number in range(METERED_STEPS):
            meter.close()
            run.step(number, setup)
            meter.close()
            report({"step": step_record(meter.step(number))})
            _hide_counters(device, optimizer)
            device.tighten()
        states = meter.held_bytes("optimizer_state") - getattr(device, "hidden_bytes", 0)
        report(
            {
                "gradient_bytes": meter.held_bytes("gradient"),
                "optimizer_state_bytes": states,
                "kept_activation_bytes": meter.kept_activation_bytes,
            }
        )
        run.witness = Unwatched()
        meter.position = "timed steps"
        run.names_tensors = False
        report({"timed": list(_timed(run, setup, device, alone=ranks.size == 1))})


def _timed(run: TrainingRun, setup: Setup, device: Device, *, alone: bool) -> Iterator[float]:
    """Seconds of further steps; ranks that wait for each other take equally many."""
    gc.collect()
    begun = time.monotonic()
    for number in range(MAX_TIMED_STEPS if alone else LEAST_TIMED_STEPS):
        yield device.seconds(lambda: run.step(METERED_STEPS, setup))
        if alone and number + 1 >= LEAST_TIMED_STEPS and time.monotonic() - begun > TIMED_S:
            return


def _autocast(setup: Setup, device_type: str) -> Callable[[], Any] | None:
    lower = PRECISIONS[setup.precision][1]
    if lower is None:
        return None
    return lambda: torch.autocast(device_type, PARAMETER_DTYPES[lower])


def _scaler(setup: Setup, device_type: str) -> Any:
    """That of fp16 under autocast; its first scale is 1, with which no step is left out."""
    return torch.amp.GradScaler(device_type, init_scale=1.0) if setup.precision == "fp16-mixed" else None


@contextlib.contextmanager
def kernels(setup: Setup, device_type: str) -> Iterator[None]:
    """``flash`` is the flash kernel alone; ``sdpa`` what PyTorch chooses."""
    if setup.attention != "flash" or device_type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


@contextlib.contextmanager
def history(path: str | None, device: Device) -> Iterator[None]:
    """Record the allocator's history into a file that `memplan` and pytorch.org/memory_viz read.

    Raises:
        MemplanError: the device has no allocator that records one.
    """
    if path is None:
        yield
        return
    if device.type != "cuda":
        raise MemplanError("A memory snapshot is taken of a CUDA device.", "Leave --snapshot out.")
    memory: Any = torch.cuda.memory
    memory._record_memory_history(max_entries=1_000_000, stacks="python")
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, RuntimeError):  # what ended the run is the answer
            memory._dump_snapshot(path)
        raise
    else:
        memory._dump_snapshot(path)
    finally:
        memory._record_memory_history(enabled=None)


# -- what there is ---------------------------------------------------------------------------------------------------


def _model(module: Any) -> dict[str, int]:
    parameters = list(module.parameters())
    beside = [tensor for parameter in parameters for _, tensor in constants(parameter)]
    return {
        "num_parameters": sum(map(num_elements, parameters)),
        "num_trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameter_bytes": _held([*parameters, *beside]),
    }


def _held(tensors: Iterable[torch.Tensor]) -> int:
    """Allocated bytes of the storages behind some tensors, each once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(allocated(num_bytes) for num_bytes in storages.values())


def _is_counter(name: str, state: Any, optimizer: Any) -> bool:
    """Whether it is a step counter that a run on a card keeps on the host."""
    return name == "step" and isinstance(state, torch.Tensor) and not optimizer.defaults.get("fused")


def _hide_counters(device: Any, optimizer: Any) -> None:
    """On a CPU everything is on the host; counters that would be there in any case are no tensors of the device."""
    if device.type == "cpu":
        states = [item for state in optimizer.state.values() for item in state.items()]
        device.hidden_bytes = sum(
            allocated(x.untyped_storage().nbytes()) for name, x in states if _is_counter(name, x, optimizer)
        )
