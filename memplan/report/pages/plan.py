"""A plan as one page: the answer first; every chart has its numbers in a table.

Left out: what the document does not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.charts import plans as charts
from memplan.report.charts.drawing import PAGE, Chart
from memplan.report.pages.page import render
from memplan.report.plan import trainer_line
from memplan.report.text import choices, equation, signed, signed_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = dict[str, Any]

SMALL = 0.01
"""Kinds below this share of the peak are told together."""


def render_plan_page(document: Mapping[str, Any]) -> str:
    """The page of a report document: `plan`, `ledger` and `profile` (`memplan.report.document.report_document`)."""
    plan = document["plan"]
    shown = plan["best"] or plan["nearest"]
    parts = parts_of(document["ledger"])
    return render(
        "plan.html.jinja",
        document=document,
        filters={"signed": signed, "signed_seconds": signed_seconds},
        plan=plan,
        shown=shown,
        command=document["command"],
        equation=equation(shown["setup"], plan["model"]["unit"]),
        choices=choices(shown["setup"]),
        parts=parts,
        breakdown=charts.breakdown(parts, plan["gpu"]["usable_bytes"], shown["upper_bound_bytes"], PAGE)
        if parts
        else None,
        timeline=timeline_of(document["profile"], plan["gpu"]["usable_bytes"]),
        levers=charts.levers(plan["levers"], PAGE) if plan["levers"] else None,
        trainer=trainer_line(plan),
    )


def parts_of(ledger: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """(kind, bytes at the peak), the small ones together."""
    by_kind: dict[str, int] = {}
    for row in ledger:
        by_kind[row["kind"]] = by_kind.get(row["kind"], 0) + row["bytes_at_peak"]
    whole = sum(by_kind.values())
    found = [(kind, num) for kind, num in by_kind.items() if num >= SMALL * whole]
    rest = whole - sum(num for _, num in found)
    return [*found, ("the rest", rest)] if rest else found


def timeline_of(profile: Mapping[str, Any] | None, usable_bytes: int | None) -> Chart | None:
    """The chart of a profile document; None without one."""
    return (
        None
        if profile is None
        else charts.timeline(profile["kinds"], profile["points"], profile["parts"], usable_bytes, PAGE)
    )
