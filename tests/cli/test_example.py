"""`reports/example.html` is what the command in `reports/README.md` writes, wherever it is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "reports" / "example.html"
LARGEST = 500_000
"""Bytes of a normal page."""


def command() -> list[str]:
    """The arguments that the README of the folder names."""
    (line,) = re.findall(r"`memplan (report .*)`", (ROOT / "reports" / "README.md").read_text(encoding="utf-8"))
    *words, flag, path = line.split()
    assert (flag, path) == ("--output", "reports/example.html")
    return words


def pinned(package: str) -> set[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return set(re.findall(rf"^{package}==([0-9.]+)", lines, re.MULTILINE))


def embedded(page: str):
    return json.loads(re.search(r'<script type="application/json" id="document">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture
def written(run, tmp_path) -> str:
    assert run(*command(), "--output", "page.html", "--quiet").status == 0
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_example_page_is_up_to_date(written: str) -> None:
    """Byte for byte with the newest matplotlib that is pinned; another release may draw otherwise."""
    if os.environ.get("MEMPLAN_UPDATE_GOLDEN"):
        PAGE.write_text(written, encoding="utf-8")
    there = PAGE.read_text(encoding="utf-8")
    assert embedded(there) == embedded(written)
    newest = max(pinned("matplotlib"), key=lambda release: tuple(map(int, release.split("."))))
    if matplotlib.__version__ == newest:
        assert there == written


def test_a_page_is_small(written: str) -> None:
    assert len(written.encode()) <= LARGEST


MATPLOTLIBRC = (
    "font.family: serif\nsvg.fonttype: path\naxes.formatter.use_locale: True\naxes.facecolor: red\nhatch.linewidth: 9\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1"])
def test_a_page_does_not_depend_on_the_machine(written: str, tmp_path, seed: str) -> None:
    """Sets in another order, another backend, locale and time zone, none of the system's fonts, a user's settings."""
    settings = tmp_path / "matplotlib"
    settings.mkdir()
    (settings / "matplotlibrc").write_text(MATPLOTLIBRC, encoding="utf-8")
    fonts = tmp_path / "fonts.conf"
    fonts.write_text('<?xml version="1.0"?><fontconfig></fontconfig>', encoding="utf-8")
    other = {
        "PYTHONHASHSEED": seed,
        "MPLBACKEND": "pdf",
        "MPLCONFIGDIR": str(settings),
        "FONTCONFIG_FILE": str(fonts),
        "LC_ALL": "C.UTF-8" if seed == "0" else "C",
        "TZ": "Asia/Tokyo",
        "PYTHONPATH": str(ROOT),
    }
    program = [sys.executable, "-m", "memplan", *command(), "--output", "other.html"]
    subprocess.run(program, cwd=tmp_path, env={**os.environ, **other}, check=True, capture_output=True)
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == written
