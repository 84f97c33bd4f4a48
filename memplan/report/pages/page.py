"""How a page is made: a template, in which every text from outside is escaped, and what all pages have in common.

A page needs no network, no other file, and no JavaScript to be read.  Its policy (`default-src 'none'`) allows its own
styles and, by their digests, its own scripts; nothing that a name smuggles in would run.  The document it shows lies in
it as JSON.  The same document gives the same bytes.
"""

from __future__ import annotations

import base64
import json
import os
import re
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from memplan.report.charts.drawing import Chart, svg_of
from memplan.report.charts.plans import legend_of, swatch_of
from memplan.report.layout import plural
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TEMPLATES = os.path.join(os.path.dirname(__file__), "templates")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"


def render(
    template: str,
    *,
    document: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]] | None = None,
    script: str = "",
    **values: Any,
) -> str:
    """The page of a document.

    Args:
        template: Name of the template, which extends ``base.html.jinja``.
        document: What is shown, embedded as JSON.
        filters: Of the template, beside those that every page has.
        script: JavaScript of the page, one of the files beside the templates; empty: none.
        values: What else the template asks for.
    """
    code = "" if not script else "\n" + _source(script)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=format_bytes, seconds=format_seconds, svg=_svg, flags=_flags, **(filters or {}))
    environment.globals.update(plural=plural, swatch_of=swatch_of, legend_of=legend_of)
    page = environment.get_template(template).render(
        document=document,
        json=Markup(embedded(document)),
        script=Markup(code),
        policy=POLICY if not code else f"{POLICY}; script-src '{digest(code)}'",
        **values,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair, in a name from outside


def _source(name: str) -> str:
    with open(os.path.join(TEMPLATES, name), encoding="utf-8") as file:
        return file.read()


def _svg(chart: Chart) -> Markup:
    return Markup(svg_of(chart))


def _flags(text: str) -> Markup:
    """Options of a command line, each with its value; a line breaks between them, not within."""
    flags = re.split(r" (?=--)", text)
    return Markup(" ").join(Markup('<span class="flag">{}</span>').format(flag) for flag in flags)


def digest(code: str) -> str:
    """What a policy says of a script that may run."""
    return "sha256-" + base64.b64encode(sha256(code.encode()).digest()).decode()


def embedded(document: Mapping[str, Any]) -> str:
    """JSON that can stand in a <script>: nothing in it ends the element or begins a comment."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
