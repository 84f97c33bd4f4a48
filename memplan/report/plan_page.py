"""A plan as one page that needs no network, no JavaScript and no other file.

The answer stands first; every chart has its numbers in a table.  The same document gives the same bytes; every text
from outside is escaped by the template.  Left out: what the document does not hold.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import jinja2

from memplan.report import charts
from memplan.report.layout import plural
from memplan.report.plan import trainer_line
from memplan.report.text import choices, equation, signed, signed_seconds
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = dict[str, Any]

TEMPLATES = os.path.join(os.path.dirname(__file__), "templates")
SMALL = 0.01
"""Kinds below this share of the peak are told together."""


def render_plan_page(document: Mapping[str, Any]) -> str:
    """The page of a report document: `plan`, `ledger` and `profile` (`memplan.report.document.report_document`)."""
    plan = document["plan"]
    shown = plan["best"] or plan["nearest"]
    parts = _parts(document["ledger"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=format_bytes, seconds=format_seconds, signed=signed, signed_seconds=signed_seconds)
    page = environment.get_template("plan.html.jinja").render(
        plan=plan,
        shown=shown,
        command=document["command"],
        equation=equation(shown["setup"], plan["model"]["unit"]),
        choices=choices(shown["setup"]),
        plural=plural,
        parts=parts,
        shades={kind: charts.shade_of(kind) for kind, _ in parts},
        breakdown=charts.breakdown(parts, plan["gpu"]["usable_bytes"], shown["upper_bound_bytes"]),
        profile=document["profile"],
        step=_step(document["profile"], plan["gpu"]["usable_bytes"]),
        levers=charts.levers(plan["levers"]) if plan["levers"] else "",
        trainer=trainer_line(plan),
        json=_embedded(document),
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def _parts(ledger: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(kind, bytes at the peak), the small ones together."""
    by_kind: dict[str, int] = {}
    for row in ledger:
        by_kind[row["kind"]] = by_kind.get(row["kind"], 0) + row["bytes_at_peak"]
    whole = sum(by_kind.values())
    found = [(kind, num) for kind, num in by_kind.items() if num >= SMALL * whole]
    rest = whole - sum(num for _, num in found)
    return [*found, ("the rest", rest)] if rest else found


def _step(profile: Mapping[str, Any] | None, usable_bytes: int) -> str:
    return "" if profile is None else charts.step(profile["points"], profile["parts"], usable_bytes)


def _embedded(document: Mapping[str, Any]) -> str:
    """JSON that can stand in a <script>: nothing in it ends the element or begins a comment."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
