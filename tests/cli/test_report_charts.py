"""`memplan report`: its page with the sections beside the plan, and `--chart`."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from memplan.report.beside import CHART_NAMES

if TYPE_CHECKING:
    from pathlib import Path

ASKED = "report gpt2 --gpu 12GB --target-batch 8"
OF_DATA = " --data data.jsonl"
"""For the one chart that is of data."""


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(f'{{"num_tokens": {n}}}\n' for n in range(1, 400)))


AT_ONCE = ("timeline", "lengths")
"""The other charts are drawn where nothing fits, and by themselves among the slow tests."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in AT_ONCE else pytest.mark.slow) for name in CHART_NAMES]
)
def test_a_chart_as_a_file(run, tmp_path: Path, name: str) -> None:
    """A PNG or an SVG by its suffix, and nothing on stdout."""
    ran = run(f"{ASKED}{OF_DATA if name == 'lengths' else ''} --chart {name} -o chart.svg")
    assert (ran.status, ran.out) == (0, "")
    assert "chart written to chart.svg" in ran.err
    root = ET.fromstring((tmp_path / "chart.svg").read_text())
    assert root.tag.endswith("svg")


def test_lengths_are_of_data(run, tmp_path: Path) -> None:
    ran = run(f"{ASKED} --chart lengths -o chart.svg")
    assert ran.status == 1
    assert "There is no lengths chart of this plan: it was made without data, --data." in ran.err
    assert "Others: breakdown, timeline" in ran.err
    assert not (tmp_path / "chart.svg").exists()


def test_the_chart_of_lengths_marks_the_maximum(run, tmp_path: Path) -> None:
    """Beside the other candidates, in the legend and in words."""
    assert run(f"{ASKED}{OF_DATA} --seq-len 300 --chart lengths -o chart.svg").status == 0
    drawn = (tmp_path / "chart.svg").read_text()
    for said in ("the plan's maximum", ">256<", ">300<", ">399<", "The plan cuts at 300."):
        assert said in drawn, said


def test_png_by_its_suffix(run, tmp_path: Path) -> None:
    assert run(f"{ASKED} --chart breakdown -o CHART.PNG -q").err == ""
    assert (tmp_path / "CHART.PNG").read_bytes().startswith(b"\x89PNG")


def test_without_a_file_it_goes_to_one_of_its_name(run, tmp_path: Path) -> None:
    assert run(f"{ASKED} --chart schedule").status == 0
    assert (tmp_path / "memplan-schedule.svg").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--chart pie", "Known: breakdown, timeline, map, length, micro-batch, frontier, levers, schedule, lengths."),
        ("--chart frontir", "Did you mean frontier?"),
        ("--chart map -o map.pdf", "A chart cannot be written as pdf."),
        ("--chart map -o map", "A chart cannot be written as a file without a suffix."),
    ],
)
def test_faults(run, tmp_path: Path, asked: str, said: str) -> None:
    """Said before anything is worked out; nothing is written."""
    ran = run(f"{ASKED} {asked}")
    assert ran.status == 2
    assert said in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.slow
def test_where_nothing_fits_there_are_charts_too(run, tmp_path: Path) -> None:
    for name in CHART_NAMES:
        more = f"{OF_DATA} --seq-len 1024" if name == "lengths" else ""
        assert run(f"report gpt2 --gpu 2GB --target-batch 8{more} --chart {name} -o {name}.svg").status == 3
        assert (tmp_path / f"{name}.svg").exists()


def test_the_page_has_the_sections_with_their_numbers(run, tmp_path: Path) -> None:
    assert run(f"{ASKED} -o page.html").status == 0
    page = (tmp_path / "page.html").read_text()
    for heading in ("What else fits", "How memory grows", "Memory against time", "One optimizer step"):
        assert heading in page
    assert "·b·s" in page
    assert page.count('role="img"') >= 7
    assert 'class="fits own"' in page or 'class="tight own"' in page
    assert "+ fits</small>" in page
    assert len(page) < 500_000
    assert run(f"{ASKED} -o again.html").status == 0
    assert (tmp_path / "again.html").read_text() == page.replace("page.html", "again.html")
