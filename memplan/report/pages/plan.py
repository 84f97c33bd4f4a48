"""A plan as one page: the answer first; every chart has its numbers in a table.

Left out: what the document does not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.charts import plans as charts
from memplan.report.charts.drawing import PAGE, Chart
from memplan.report.charts.named import parts_of
from memplan.report.pages.beside import beside_values
from memplan.report.pages.page import render
from memplan.report.plan import trainer_line
from memplan.report.text import choices, equation, signed, signed_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    Document = dict[str, Any]


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
        breakdown=charts.breakdown(parts, plan["gpu"]["usable_bytes"], shown["upper_bound_bytes"], PAGE),
        timeline=_timeline(document["profile"], plan["gpu"]["usable_bytes"]),
        levers=charts.levers(plan["levers"], PAGE) if plan["levers"] else None,
        trainer=trainer_line(plan),
        **beside_values(document),
    )


def _timeline(profile: Mapping[str, Any] | None, usable_bytes: int) -> Chart | None:
    return (
        None
        if profile is None
        else charts.timeline(profile["kinds"], profile["points"], profile["parts"], usable_bytes, PAGE)
    )
