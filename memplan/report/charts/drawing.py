"""How charts are drawn: once, for the inside of a page, for a file of their own and for a notebook.

A chart is a figure of matplotlib with a title and its conclusion in words.  It is drawn in the colours of a `Palette`:
`SCREEN` has real ones, those of `PAGE` are stand-ins (`#0a0001`) which `svg_of` replaces by CSS variables, so that one
drawing follows the reader's light or dark theme.  Colour is never alone: areas have a hatch, marks a shape.  The same
chart gives the same bytes, whatever the reader's own settings of matplotlib are.

Every text is escaped, by matplotlib or here.  Left out: pages, and what a drawing says in words besides.
"""

from __future__ import annotations

import contextlib
import re
from html import escape
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from memplan.errors import UsageError
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from matplotlib.axes import Axes

NUM_SHADES = 8


class Palette(NamedTuple):
    """The colours of a chart."""

    ink: str
    faint: str
    """Lines that are not to be seen at first sight."""
    band: str
    paper: str
    good: str
    bad: str
    gpu: str
    cpu: str
    published: str
    fits: str
    """Behind text, like the next two."""
    tight: str
    oom: str
    shades: tuple[str, ...]
    """`NUM_SHADES` of them, for areas."""


PAGE = Palette(
    ink="#0a0001",
    faint="#0a0002",
    band="#0a0003",
    paper="#0a0004",
    good="#0a0005",
    bad="#0a0006",
    gpu="#0a0011",
    cpu="#0a0012",
    published="#0a0013",
    fits="#0a0031",
    tight="#0a0032",
    oom="#0a0033",
    shades=tuple(f"#0a002{number}" for number in range(1, NUM_SHADES + 1)),
)
"""Stand-ins for what the stylesheet says."""

SCREEN = Palette(
    ink="#1a1d21",
    faint="#c9ced4",
    band="#e9f2f8",
    paper="#ffffff",
    good="#00755a",
    bad="#b3261e",
    gpu="#0072b2",
    cpu="#a85a00",
    published="#00755a",
    fits="#d8efe6",
    tight="#fff0c7",
    oom="#f9dcd8",
    shades=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#999999", "#d0a800", "#c2452d"),
)
"""The colours of Okabe and Ito (Color Universal Design, 2008), on white."""

VARIABLES = {
    **{getattr(PAGE, name): f"var(--{name})" for name in Palette._fields if name not in {"faint", "shades"}},
    PAGE.faint: "var(--line)",
    **{colour: f"var(--shade-{number})" for number, colour in enumerate(PAGE.shades, 1)},
}
"""Colour as it is drawn -> colour as the stylesheet has it."""

DOTS_PER_INCH = 72
"""Sizes of figures are meant in pixels of a page."""
DOTS_PER_INCH_OF_A_PICTURE = 200

FILE_FORMATS = ("png", "svg")


class Chart(NamedTuple):
    """A drawing, and what it shows."""

    name: str
    """Begins the ids of its parts, and is what `--chart` calls it."""
    title: str
    conclusion: str
    """What a reader who does not see it is told."""
    figure: Figure


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Settings of matplotlib under which charts are made; text stays text."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "memplan"
        yield


def canvas(width: float, height: float) -> Figure:
    """A figure of so many pixels."""
    return Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), dpi=DOTS_PER_INCH)


def plain_axes(axes: Axes, palette: Palette) -> None:
    """No box, no small ticks, everything in the colours of the palette."""
    axes.minorticks_off()
    axes.tick_params(color=palette.faint, labelcolor=palette.ink, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set(color=palette.faint, visible=side in {"left", "bottom"})
    axes.patch.set_visible(False)


REWRITTEN = (
    (r"<metadata>.*?</metadata>|<style.*?</style>|<title/>", ""),  # of a file of its own
    (r"\s*\n\s*", "\n"),
    (r'<g id="[^"]*"', "<g"),  # nothing refers to them
    (r"xlink:href", "href"),
    (r"font: (\d+px)[^;]*;", r"font-size: \1;"),
    (r" font-family:[^;]*;", ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
)
"""What is done to a drawing, in this order: pattern, what stands in its place."""


def svg_of(chart: Chart) -> str:
    """A chart that was drawn with `PAGE`, for the inside of a page."""
    file = StringIO()
    chart.figure.patch.set_visible(False)
    with drawing():
        chart.figure.savefig(file, format="svg", metadata=NOTHING_ABOUT)
    text = file.getvalue()
    view = text[text.index("viewBox=") :].split('"')[1]
    text = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, instead in REWRITTEN:
        text = re.sub(pattern, instead, text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", _rounded, text)
    text = re.sub(r' d="([^"]*)"', lambda path: f' d="{_shorter(path[1])}"', text)
    text = re.sub(r"<g>\n<use [^<]*(?:\n<use [^<]*)*\n</g>", _styled_once, text)
    found = re.findall(r'<[^>]* id="([^"]+)"', text)
    names = {identifier: f"{chart.name}{number}" for number, identifier in enumerate(found)}
    text = re.sub(r"<[^>]*>", lambda tag: _of_page(tag[0], names), text)
    width = float(view.split()[2])
    return (
        f'<svg class="chart" viewBox="{view}" style="--natural: {width:g}px" '
        f'role="img" aria-labelledby="{chart.name}-title {chart.name}-said">'
        f'<title id="{chart.name}-title">{escape(chart.title)}</title>'
        f'<desc id="{chart.name}-said">{escape(chart.conclusion)}</desc>{text.strip()}'
    )


def _rounded(tag: re.Match[str]) -> str:
    """A tag whose numbers have two decimals at most."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])


def _of_page(tag: str, names: Mapping[str, str]) -> str:
    """A tag with names that are the chart's alone, and the colours of the stylesheet; texts may be anybody's."""
    tag = re.sub(r'( id="|href="#|url\(#)([^")]+)', lambda name: name[1] + names.get(name[2], name[2]), tag)
    return re.sub(r"#0a00[0-9a-f]{2}", lambda colour: VARIABLES.get(colour[0], colour[0]), tag)


NOTHING_ABOUT: Any = {"Date": None, "Creator": None, "Title": ""}
"""The metadata of an SVG file: nothing that another run would have otherwise."""


def picture_of(chart: Chart, kind: str) -> bytes:
    """A chart that was drawn with `SCREEN`, as a file of its own.

    Args:
        chart: The chart.
        kind: One of `FILE_FORMATS`.

    Raises:
        UsageError: it is another one.
    """
    check_kind(kind)
    file = BytesIO()
    about = {**NOTHING_ABOUT, "Title": chart.title, "Description": chart.conclusion}
    metadata = about if kind == "svg" else {"Software": None}
    with drawing():
        chart.figure.savefig(file, format=kind, metadata=metadata, dpi=DOTS_PER_INCH_OF_A_PICTURE)
    return file.getvalue()


def check_kind(kind: str) -> str:
    """The kind of file, where charts can be written so.

    Raises:
        UsageError: they cannot.
    """
    if kind not in FILE_FORMATS:
        written = kind or "a file without a suffix"
        raise UsageError(f"A chart cannot be written as {written}.", "Name a .png or .svg file.")
    return kind


def _shorter(path: str) -> str:
    """The same path with a decimal; a line along an axis names one coordinate, and one that goes on is one line."""
    shorter: list[str] = []
    before: tuple[float, ...] = ()
    last: tuple[float, ...] = ()
    for command, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        place = tuple(round(float(number), 1) for number in numbers.split())
        along = "" if command != "L" or len(last) != 2 else "V" if place[0] == last[0] else "H" * (place[1] == last[1])
        if not along:
            shorter.append(command + " ".join(f"{number:g}" for number in place))
            before = ()
        else:
            axis = int(along == "V")
            if before and shorter[-1][0] == along and (last[axis] - before[axis]) * (place[axis] - last[axis]) >= 0:
                shorter.pop()
            else:
                before = last
            shorter.append(f"{along}{place[axis]:g}")
        last = place[-2:]
    return "".join(shorter)


def _styled_once(group: re.Match[str]) -> str:
    """Marks of one kind: their style is that of the group, their places have a decimal."""
    styles = set(re.findall(r'style="[^"]*"', group[0]))
    if len(styles) != 1:
        return group[0]
    style = styles.pop()
    return re.sub(r"(\.\d)\d+", r"\1", group[0].replace(f" {style}", "")).replace("<g>", f"<g {style}>")
