"""Calibrations on disk: one small JSON a card and software stack, under `calibration/<card>/`.

`profiles/calibration` ships with memplan; the user's own lie in the data folder (`MEMPLAN_DATA_DIR`, `XDG_DATA_HOME`).
Of all that there are of a card the one with the newest records is taken, the user's own of two as new.
"""

from __future__ import annotations

import contextlib
import json
import os
from math import inf
from typing import TYPE_CHECKING, Any

from memplan.catalog.profiles import PACKAGE_FOLDER, profile_path
from memplan.errors import MemplanError
from memplan.specs.calibration import Calibration, Regime
from memplan.specs.values import replace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from memplan.specs.gpu import GpuSpec

FOLDER = "calibration"
SCHEMA_VERSION = 1
KIND = "calibration"

STACK = ("torch", "cuda", "transformers", "driver")
"""Versions that tell one software stack from another."""

COUNTS = ("num_fitted", "num_exceeded")
TEXTS = ("gpu", "card_name", "first", "last")

PLAIN = (
    "gpu",
    "card_name",
    "first",
    "last",
    "num_fitted",
    "num_exceeded",
    "context_bytes",
    "workspace_bytes",
    "flops_fraction",
    "bandwidth_fraction",
    "launch_s",
)


def calibration_folders(environment: Mapping[str, str]) -> list[str]:
    """Where calibrations lie, the user's own first."""
    return [*_own_folder(environment), profile_path(FOLDER)]


def _own_folder(environment: Mapping[str, str]) -> Iterator[str]:
    own = environment.get("MEMPLAN_DATA_DIR")
    base = environment.get("XDG_DATA_HOME") or os.path.join("~", ".local", "share")
    yield os.path.join(os.path.expanduser(own or os.path.join(base, "memplan")), FOLDER)


def writable_folder(environment: Mapping[str, str]) -> str:
    """Where a new calibration goes: into the checkout, else to the user's own."""
    in_checkout = os.path.isdir(os.path.join(os.path.dirname(PACKAGE_FOLDER), "profiles"))
    return profile_path(FOLDER) if in_checkout else next(_own_folder(environment))


def read_calibration(gpu: str, environment: Mapping[str, str]) -> Calibration | None:
    """The calibration of a card, by its catalogue id; None where there is none.

    Raises:
        MemplanError: the file cannot be read.
    """
    folders = [os.path.join(folder, _slug(gpu)) for folder in calibration_folders(environment)]
    found = [read_file(path) for folder in folders for path in _files(folder)]
    return max(found, key=lambda one: one.last, default=None)


def read_calibrations(environment: Mapping[str, str]) -> list[Calibration]:
    """Those of all cards, the newest of each; a file that is broken is the concern of whoever asks for its card."""
    cards: dict[str, None] = {}
    for folder in calibration_folders(environment):
        if os.path.isdir(folder):
            cards |= dict.fromkeys(sorted(os.listdir(folder)))
    found = []
    for card in cards:
        with contextlib.suppress(MemplanError):
            found.append(read_calibration(card, environment))
    return [one for one in found if one is not None]


def _files(folder: str) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [os.path.join(folder, name) for name in sorted(names) if name.endswith(".json")]


def read_file(path: str) -> Calibration:
    """One calibration.

    Raises:
        MemplanError: it is none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return parse_calibration(json.load(file))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as fault:
        raise MemplanError(
            f"{path} is no calibration ({type(fault).__name__}: {fault}).",
            "Remove it, or make it anew with memplan calibrate.",
        ) from None


def parse_calibration(record: Mapping[str, Any]) -> Calibration:
    """The calibration of a JSON object.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    if record["kind"] != KIND or record["schema_version"] > SCHEMA_VERSION:
        raise ValueError(f"kind {record['kind']!r}, schema_version {record['schema_version']!r}")
    for name in PLAIN:
        kind = str if name in TEXTS else (int, float, type(None))
        value = record[name]
        wrong = not isinstance(value, kind) or isinstance(value, bool) or (value is None and name in COUNTS)
        if wrong or (isinstance(value, (int, float)) and not 0 <= value < inf) or (name in COUNTS and value % 1):
            raise TypeError(f"its {name} is {value!r:.60}")
    if not all(-1 < score < inf for score in record["scores"]):
        raise ValueError("a score is no number")
    return Calibration(
        **{name: record[name] for name in PLAIN},
        versions=dict(record["versions"]),
        regimes=tuple(Regime(**regime) for regime in record["regimes"]),
        scores=tuple(sorted(float(score) for score in record["scores"])),
    )


def calibration_record(calibration: Calibration) -> dict[str, Any]:
    """A calibration as JSON."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        **{name: getattr(calibration, name) for name in PLAIN},
        "versions": dict(calibration.versions),
        "regimes": [regime._asdict() for regime in calibration.regimes],
        "scores": list(calibration.scores),
    }


def write_calibration(folder: str, calibration: Calibration) -> str:
    """Write it to the file of its card and stack in `folder`; the path.

    Raises:
        MemplanError: it cannot be written.
    """
    stack = [f"{name}-{calibration.versions[name]}" for name in STACK if name in calibration.versions]
    path = os.path.join(folder, _slug(calibration.gpu), f"{_slug('-'.join(stack) or 'unknown')}.json")
    text = json.dumps(calibration_record(calibration), indent=1, allow_nan=False) + "\n"
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as fault:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise MemplanError(
            f"The calibration could not be written to {path}: {fault.strerror}.", "Name another --folder."
        ) from None
    return path


def _slug(text: str) -> str:
    """A name that is a file name everywhere."""
    return "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in text.lower()).strip(".-") or "-"


def calibrated(gpu: GpuSpec, environment: Mapping[str, str]) -> GpuSpec:
    """The card with what was measured on it in place of what its datasheet says; itself where nothing was."""
    found = read_calibration(gpu.name, environment)
    return gpu if found is None else apply(gpu, found)


def apply(gpu: GpuSpec, calibration: Calibration) -> GpuSpec:
    """The card with the coefficients of a calibration."""
    flops, bandwidth = calibration.flops_fraction or 1.0, calibration.bandwidth_fraction or 1.0
    bytes_per_s = gpu.memory_bandwidth_bytes_per_s
    return replace(
        gpu,
        calibration=calibration,
        context_bytes=calibration.context_bytes or gpu.context_bytes,
        workspace_bytes=calibration.workspace_bytes or gpu.workspace_bytes,
        flops_per_s={dtype: flops * rate for dtype, rate in gpu.flops_per_s.items()},
        memory_bandwidth_bytes_per_s=None if bytes_per_s is None else bandwidth * bytes_per_s,
        launch_s=calibration.launch_s or 0.0,
    )
