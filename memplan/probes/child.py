"""The process in which one trial is measured: `python -m memplan.probes.child`.

It reads one order after the other from stdin, one JSON object a line, forks for each, and passes on what the fork
reports, one JSON object a line.  Libraries are imported once, before any fork; nothing that touches a device is done
here, so that every trial begins with a device nobody has used.  An order may ask for no fork: then the process ends
with it.  When stdin ends, whoever gave the orders is gone: the process ends, and the fork with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import select
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, TextIO

from memplan.specs.measurement import FAILED, PROBE_VERSION
from memplan.specs.records import parse_trial
from memplan.specs.training import LIBRARY_BY_PART

if TYPE_CHECKING:
    from memplan.probes.devices import Device
    from memplan.probes.nvml import Nvml
    from memplan.specs.measurement import Trial


def main() -> int:
    """Serve orders until there are no more."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no report
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a card must not start CUDA
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for line in sys.stdin:
        order = json.loads(line)
        if not order["fork"]:
            _end_with_parent()
            _carry_out(order, reports)
            return 0
        with contextlib.suppress(ImportError):
            importlib.import_module("memplan.probes.steps")
            _import_model(order)
        _say(reports, _in_a_fork(order, reports))
    return 0


def _import_model(order: dict[str, Any]) -> None:
    """The Python of the model, so that the forks of later trials have it."""
    model_type = order.get("trial", {}).get("config", {}).get("model_type", "")
    if isinstance(model_type, str) and model_type.isidentifier():
        importlib.import_module("transformers")
        importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def _in_a_fork(order: dict[str, Any], reports: TextIO) -> dict[str, Any]:
    """Carry out an order in a process of its own; how that ended."""
    reports.flush()
    pid = os.fork()
    if pid == 0:
        _end_with_parent()
        status = 1
        try:
            _carry_out(order, reports)
            status = 0
        finally:
            with contextlib.suppress(Exception):
                reports.flush()
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return {"exited": os.waitstatus_to_exitcode(status)}


def _end_with_parent() -> None:
    """Leave no fork behind: it ends when the process that made it is gone, or whoever gave the orders."""
    parent = os.getppid()
    orders = select.poll()
    orders.register(0, select.POLLHUP)

    def watch() -> None:
        while os.getppid() == parent:
            if any(event & select.POLLHUP for _, event in orders.poll(500)):
                break
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _carry_out(order: dict[str, Any], reports: TextIO) -> None:
    def report(found: dict[str, Any]) -> None:
        _say(reports, found)

    try:
        import torch
    except ImportError as error:
        report({"end": FAILED, "message": f"PyTorch cannot be imported ({error}).", "library": "torch"})
        return
    from memplan.errors import MemplanError
    from memplan.probes.nvml import open_nvml, visible_card

    report({"versions": versions(torch)})
    index = int(os.environ.get("LOCAL_RANK", "0"))
    card = visible_card(index, os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        with open_nvml(card) if order["device"] == "cuda" else contextlib.nullcontext() as nvml:
            if order["ask"] == "describe":
                found = _device(order, index, nvml).open(None)
                report({"card": found._asdict(), "end": "done"})
            else:
                _measure(order, parse_trial(order["trial"]), index, nvml, report)
    except MemplanError as fault:
        report({"end": FAILED, "message": fault.cause, "cure": fault.cure})
    except Exception as error:  # noqa: BLE001 -- whoever gave the order is told, whatever it is
        text = " ".join(str(error).split())
        report({"end": FAILED, "message": f"{type(error).__name__}: {text[:600]}"})


def _measure(order: dict[str, Any], trial: Trial, index: int, nvml: Nvml | None, report: Any) -> None:
    from memplan.probes.faults import require
    from memplan.probes.steps import run_trial

    require("transformers")
    device = _device(order, index, nvml)
    with _ranks(order, index) as ranks:
        run_trial(trial, device, report, ranks=ranks, snapshot=order.get("snapshot"), limit_bytes=trial.limit_bytes)


def _device(order: dict[str, Any], index: int, nvml: Nvml | None) -> Device:
    from memplan.probes.devices import CpuDevice, CudaDevice, DeviceError

    if order["device"] == "cpu":
        return CpuDevice(has_padding=bool(order.get("trial", {}).get("setup", {}).get("padding")))
    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        raise DeviceError(
            f"PyTorch {torch.__version__} is built without CUDA.", "Install a CUDA build of PyTorch, or --device cpu."
        )
    return CudaDevice(index, nvml, alloc_conf=order.get("trial", {}).get("alloc_conf", ""))


@contextlib.contextmanager
def _ranks(order: dict[str, Any], index: int) -> Any:
    """This process's part of a data-parallel run, if torchrun started it."""
    from memplan.probes.steps import Ranks

    if order["world_size"] == 1:
        yield Ranks()
        return
    from memplan.probes.ranks import data_parallel

    with data_parallel(order["rank"], order["world_size"], order["device"], index) as wrap:
        yield Ranks(order["rank"], order["world_size"], wrap)


def versions(torch: Any) -> dict[str, str]:
    """Library -> version, of all that a measurement depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "memplan-probe": PROBE_VERSION,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for library in dict.fromkeys(("memplan", "transformers", "peft", *LIBRARY_BY_PART.values())):
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _say(reports: TextIO, found: dict[str, Any]) -> None:
    reports.write("\n" + json.dumps(found) + "\n")  # on a line of its own, whatever a fork that died has left
    reports.flush()


if __name__ == "__main__":
    sys.exit(main())
