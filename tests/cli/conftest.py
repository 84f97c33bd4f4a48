"""A fresh place and environment for every run of the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from memplan.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Ran(NamedTuple):
    """What one run printed."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def fresh_place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no network, no colours asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMPLAN_OFFLINE", "1")
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("MEMPLAN_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    for name in ("NO_COLOR", "FORCE_COLOR", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the program in this process: ``run("suggest", "--gpu", "24GB")`` or ``run("suggest --gpu 24GB")``."""

    def program(*args: str) -> Ran:
        given = args[0].split() if len(args) == 1 else list(args)
        status = main(given)
        printed = capsys.readouterr()
        return Ran(status, printed.out, printed.err)

    return program
