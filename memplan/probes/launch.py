"""Runs trials in processes of their own, and makes a measurement of whatever came of each.

A measurement is made of what was reported before the end, and how the process ended: by itself, over its time limit, by
a signal.  Nothing is left behind: the process group is killed when the time is up, when the caller is interrupted and
when the launcher is closed, and the child ends by itself when its stdin does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.specs.measurement import FAILED, KILLED, TIMED_OUT, Card, Measurement
from memplan.specs.records import parse_card, parse_step, trial_record
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import IO

    from memplan.specs.measurement import Trial

CHILD = (sys.executable, "-m", "memplan.probes.child")
DESCRIBE_LIMIT_S = 180.0
"""Importing PyTorch and making a context can take this long on a machine that has just started."""

LEAVING_S = 20.0
"""Seconds that a process may take to end after its last report."""

CLEARED = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
)
"""Variables that change what is measured; a trial says itself how the allocator is set."""

HEARING_S = 0.3
"""Seconds that are waited for the last words of a process."""

COUNTED = (
    "num_parameters",
    "num_trainable_parameters",
    "parameter_bytes",
    "gradient_bytes",
    "optimizer_state_bytes",
    "kept_activation_bytes",
    "context_bytes",
    "workspace_bytes",
    "process_basis",
)
"""Fields of a measurement that the child reports under their names."""

FORK_TEXT = "forked subprocess"
"""What PyTorch says where CUDA was started before a fork."""

NOT_DESCRIBED = Card(device="", name="unknown", total_bytes=0)


class ProbeError(MemplanError):
    """There is nothing to measure on, or with."""


class Place(NamedTuple):
    """Where trials run."""

    card: Card
    versions: Mapping[str, str]


class Launcher:
    """Starts one process for each trial."""

    def __init__(
        self,
        device: str = "cuda",
        *,
        time_limit_s: float = 600.0,
        command: tuple[str, ...] = CHILD,
        environment: Mapping[str, str] | None = None,
        ranks: tuple[int, int] = (0, 1),
    ) -> None:
        """`device`: ``cuda`` or ``cpu``; `time_limit_s`: of one trial; `ranks`: (this rank, their number)."""
        self.device = device
        self.time_limit_s = time_limit_s
        self.rank, self.world_size = ranks
        self._command = command
        self._environment = dict(os.environ if environment is None else environment)
        self._place = Place(NOT_DESCRIBED, {})
        self._fork = True
        self._limit_s = time_limit_s
        self._exit = 0
        self._listener: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: deque[str] = deque(maxlen=20)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> Place:
        """The device and the versions that trials run with.

        Raises:
            ProbeError: there is no such device, or PyTorch cannot use it.
        """
        reports, ended = self._order({"ask": "describe"}, DESCRIBE_LIMIT_S)
        found = _merged(reports)
        if FORK_TEXT in found.get("message", ""):  # a library has touched the card while it was imported
            self._fork = False
            self.close()
            reports, ended = self._order({"ask": "describe"}, DESCRIBE_LIMIT_S)
            found = _merged(reports)
        if found.get("end") != "done":
            cause = found.get("message") or f"The device could not be looked at: {self._why(ended)}."
            raise ProbeError(cause, found.get("cure") or "Check that PyTorch works: python -c 'import torch'.")
        self._place = Place(parse_card(found["card"]), found["versions"])
        return self._place

    def measure(self, trial: Trial, *, snapshot: str | None = None) -> Measurement:
        """Run a trial; running out of memory, hanging and dying are outcomes."""
        begun = time.monotonic()
        order = {"ask": "measure", "trial": trial_record(trial), "snapshot": snapshot}
        reports, ended = self._order(order, self.time_limit_s)
        if FORK_TEXT in _merged(reports).get("message", ""):
            self._fork = False
            self.close()
            reports, ended = self._order(order, self.time_limit_s)
        found = _merged(reports)
        outcome, message = found.get("end"), found.get("message", "")
        if outcome is None:
            outcome, message = ended, self._why(ended)
        card, libraries = self._place
        if "card" in found:
            card = parse_card({**found["card"], "clocks": _clocks(found)})
        return Measurement(
            trial=trial,
            outcome=outcome,
            message=message,
            phase=found.get("phase", ""),
            rank=self.rank,
            measured_at=now(),
            card=card,
            versions=found.get("versions", libraries),
            steps=tuple(parse_step(report["step"]) for report in reports if "step" in report),
            step_times_s=tuple(found.get("timed", ())),
            wall_s=round(time.monotonic() - begun, 3),
            **{name: found[name] for name in COUNTED if name in found},
        )

    def close(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    # -- orders --------------------------------------------------------------------------------------------------------

    def _order(self, order: dict[str, Any], limit_s: float) -> tuple[list[dict[str, Any]], str]:
        """What was reported, and where no end was reported how it ended: an outcome."""
        order |= {"fork": self._fork, "device": self.device, "rank": self.rank, "world_size": self.world_size}
        reports: list[dict[str, Any]] = []
        deadline = time.monotonic() + min(limit_s, threading.TIMEOUT_MAX)
        self._limit_s = limit_s
        self._errors.clear()
        try:
            self._send(order)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise queue.Empty
                line = self._lines.get(timeout=left)
                if line is None:  # it has ended: after its only order, or before it was done
                    self._exit = self._end_of_process()
                    self.close()
                    return reports, KILLED if self._exit < 0 else FAILED
                report = _parsed(line)
                if report is None:
                    continue
                if "exited" in report:
                    self._exit = report["exited"]
                    return reports, KILLED if report["exited"] < 0 else FAILED
                reports.append(report)
                if "end" in report:  # all is said; what is left is the end of its process
                    deadline = min(deadline, time.monotonic() + LEAVING_S)
        except queue.Empty:
            self.close()
            return reports, TIMED_OUT
        except BaseException:
            self.close()
            raise

    def _end_of_process(self) -> int:
        """The exit status of a process that has closed its output; below 0 the signal that ended it."""
        assert self._process is not None
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return 0

    def _send(self, order: dict[str, Any]) -> None:
        text = json.dumps(order) + "\n"
        for _ in range(2):  # a process that has died since the last trial is started anew
            process = self._process or self._start()
            assert process.stdin is not None
            if process.poll() is None:
                threading.Thread(target=_feed, args=(process.stdin, text), daemon=True).start()
                return
            self.close()
        raise ProbeError(f"The process for the trials does not start: {self._why(KILLED)}.", "Check python -c pass.")

    def _start(self) -> subprocess.Popen[str]:
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, (package, self._environment.get("PYTHONPATH"))))
        self._exit = 0
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**{k: v for k, v in self._environment.items() if k not in CLEARED}, "PYTHONPATH": path},
            start_new_session=True,
        )
        self._process, lines = process, queue.Queue[str | None]()
        self._lines = lines
        assert process.stdout is not None
        assert process.stderr is not None
        threading.Thread(target=_pump, args=(process.stdout, lines.put, True), daemon=True).start()
        self._listener = threading.Thread(target=_pump, args=(process.stderr, self._errors.append, False), daemon=True)
        self._listener.start()
        return process

    def _hear(self) -> None:
        """Give what was written to stderr before the end the time to arrive."""
        if self._listener is not None:
            self._listener.join(timeout=HEARING_S)

    def _why(self, ended: str) -> str:
        if ended == TIMED_OUT:
            return f"it was not done after {self._limit_s:g} s"
        self._hear()
        last = next((line.strip() for line in reversed(self._errors) if line.strip()), "")
        how = f"it exited with status {self._exit}"
        if self._exit < 0:
            how = f"it was ended by signal {-self._exit}"
            if -self._exit == signal.SIGKILL:
                how += ", as the host does when its own memory runs out"
        return f"{how}{f' ({last[:300]})' if last else ''}"


def _pump(stream: IO[str], put: Callable[[Any], None], tell_end: bool) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in stream:
            put(line)
    if tell_end:
        put(None)


def _feed(stream: IO[str], text: str) -> None:
    """Write an order; one that nobody reads blocks here and not the caller."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(text)
        stream.flush()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) else None


def _merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for report in reports:
        found |= report
    return found


def _clocks(found: dict[str, Any]) -> dict[str, int]:
    clocks = dict(found["card"].get("clocks") or {})
    later = found.get("clocks") or {}
    return clocks | ({"sm_loaded": later["sm"]} if "sm" in later else {})


def now() -> str:
    """The time, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
