"""Text in columns: nothing is lost and nothing is too wide."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.report.ansi import Line, join, wants_colour
from memplan.report.layout import bar, clip, columns, plural, wrap
from memplan.report.tables import render_csv, render_markdown

WORDS = st.lists(st.text("abcdefgh-,.", min_size=1, max_size=30), min_size=1, max_size=20)


@given(WORDS, st.integers(min_value=12, max_value=90))
def test_wrapping_loses_nothing(words: list[str], width: int) -> None:
    """No line is wider than asked for, and the letters are those of the text."""
    lines = wrap(" ".join(words), first="> ", width=width)
    assert all(len(line) <= width for line in lines)
    assert "".join(line[2:] for line in lines).replace(" ", "") == "".join(words)


def test_wrapping() -> None:
    assert wrap("one two three", first="  - ", width=11) == ["  - one two", "    three"]
    assert wrap("one two three", first="- ", rest=" ", width=9) == ["- one two", " three"]
    assert wrap("", first="label") == ["label"]
    assert wrap("abcdefgh", first="- ", width=6) == ["- abcd", "  efgh"]


@pytest.mark.parametrize(
    ("share", "text"), [(0, "░░░░"), (0.001, "█░░░"), (0.5, "██░░"), (0.999, "███░"), (1, "████"), (7, "████")]
)
def test_bar(share: float, text: str) -> None:
    """Something never looks like nothing, nor less than all like all."""
    assert bar(share, 4) == text


def test_columns() -> None:
    assert columns([("a", "1"), ("bcd", "1000")], gap=1) == ["  a      1", "  bcd 1000"]


def test_columns_that_are_too_wide_are_cut_in_the_middle() -> None:
    lines = columns([("x" * 50 + "y" * 50, "12")])
    assert len(lines[0]) == 80
    assert lines[0].startswith("  xxx")
    assert "x..y" in lines[0]
    assert lines[0].endswith("yyy  12")


@pytest.mark.parametrize(("width", "text"), [(9, "abcdefghi"), (8, "abc..ghi"), (7, "abc..hi")])
def test_clip(width: int, text: str) -> None:
    assert clip("abcdefghi", width) == text


def test_plural() -> None:
    assert [plural(number, "GPU") for number in (1, 2, 4096)] == ["1 GPU", "2 GPUs", "4,096 GPUs"]


def test_lines_and_colours() -> None:
    lines = [Line("a", "title"), Line("b"), Line("", "title")]
    assert join(lines, colour=False) == "a\nb\n\n"
    assert join(lines, colour=True) == "\x1b[1ma\x1b[0m\nb\n\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (io.StringIO(), {}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (Terminal(), {}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_who_wants_colours(stream: io.StringIO, environment: dict[str, str], wanted: bool) -> None:
    assert wants_colour(stream, environment) is wanted


ROWS = [{"name": "a|b", "shape": ("b", "s", 8), "bytes": 12}, {"name": "c,d", "shape": None, "bytes": 3}]


def test_csv() -> None:
    assert render_csv(ROWS) == 'name,shape,bytes\na|b,b x s x 8,12\n"c,d",,3\n'
    assert render_csv([]) == ""


def test_markdown() -> None:
    assert render_markdown(ROWS).splitlines() == [
        "| name | shape | bytes |",
        "| --- | --- | ---: |",
        "| a\\|b | b x s x 8 | 12 |",
        "| c,d |  | 3 |",
    ]
    assert render_markdown([]) == ""
