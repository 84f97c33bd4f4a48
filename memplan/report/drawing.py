"""Charts for the inside of a page: SVG by matplotlib, without header, size, script or fonts of its own.

Colours are drawn as stand-ins (`#0a0001`) and replaced by CSS variables, so that one drawing follows the reader's light
or dark theme.  Every drawing has a title and its conclusion as a description, and ids that no other one has.  The same
drawing gives the same bytes, whatever the reader's own settings of matplotlib are.

Every text is escaped, by matplotlib or here.  Left out: pages, and what a drawing says in words besides.
"""

from __future__ import annotations

import contextlib
import re
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

import matplotlib

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BAND, PAPER = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
GPU, CPU, PUBLISHED = "#0a0011", "#0a0012", "#0a0013"
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--line)",
    BAND: "var(--band)",
    PAPER: "var(--paper)",
    GPU: "var(--gpu)",
    CPU: "var(--cpu)",
    PUBLISHED: "var(--published)",
    **{f"#0a002{number}": f"var(--shade-{number})" for number in range(1, 9)},
}
"""Colour as it is drawn -> colour as the stylesheet has it."""


class Shade(NamedTuple):
    """How an area looks: its colour, which the stylesheet has as ``--shade-N``, and its hatch."""

    colour: str
    """``#0a0021`` is ``var(--shade-1)``, and so on."""
    hatch: str


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Settings of matplotlib under which charts are made; text stays text."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "memplan"
        yield


def plain_axes(axes: Axes) -> None:
    """No box, no small ticks, everything in the colours of the page."""
    axes.minorticks_off()
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set(color=FAINT, visible=side in {"left", "bottom"})
    axes.patch.set_visible(False)


REWRITTEN = (
    (r"<metadata>.*?</metadata>|<style.*?</style>|<title/>", ""),  # of a file of its own
    (r"\s*\n\s*", "\n"),
    (r'<g id="[^"]*"', "<g"),  # nothing refers to them
    (r"xlink:href", "href"),
    (r"(\d\.\d\d)\d+", r"\1"),
    (r"font: (\d+px)[^;]*;", r"font-size: \1;"),
    (r" font-family:[^;]*;", ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
)
"""What is done to a drawing, in this order: pattern, what stands in its place."""


def svg_of(figure: Figure, name: str, title: str, description: str) -> str:
    """The drawing for the inside of a page; `name` begins its ids, `title` and `description` are texts, not HTML."""
    file = StringIO()
    figure.patch.set_visible(False)
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": ""})
    text = file.getvalue()
    view = text[text.index("viewBox=") :].split('"')[1]
    text = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, instead in REWRITTEN:
        text = re.sub(pattern, instead, text, flags=re.DOTALL)
    text = re.sub(r"<g>\n<use [^<]*(?:\n<use [^<]*)*\n</g>", _styled_once, text)
    for number, identifier in enumerate(re.findall(r' id="([^"]+)"', text)):
        text = re.sub(rf'( id="|href="#|url\(#){identifier}\b', rf"\g<1>{name}{number}", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return (
        f'<svg class="chart" viewBox="{view}" role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>{text.strip()}'
    )


def _styled_once(group: re.Match[str]) -> str:
    """Marks of one kind: their style is that of the group, their places have a decimal."""
    styles = set(re.findall(r'style="[^"]*"', group[0]))
    if len(styles) != 1:
        return group[0]
    style = styles.pop()
    return re.sub(r"(\.\d)\d+", r"\1", group[0].replace(f" {style}", "")).replace("<g>", f"<g {style}>")
