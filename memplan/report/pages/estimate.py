"""The bytes of one configuration as one page: `memplan estimate` and `memplan trace`.

The answer first, then what it is made of, the instants of a step, every row, and what stands behind the numbers.  Left
out: what the document does not hold; the timeline is drawn where its profile is given beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.charts import plans as charts
from memplan.report.charts.drawing import PAGE
from memplan.report.charts.named import parts_of
from memplan.report.estimate import asked_facts, time_words, total_rows, verdict_words
from memplan.report.pages.page import render
from memplan.report.pages.plan import timeline_of
from memplan.report.pages.tables import grouped, ledger_table
from memplan.report.text import compiled_facts, equation, signed
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    Document = dict[str, Any]


def render_estimate_page(document: Document, profile: Mapping[str, Any] | None = None) -> str:
    """The page of an estimate document.

    Args:
        document: Of the kind estimate or trace.
        profile: How memory goes up and down (`memplan.report.study.profile_document`); None where it is not known.
    """
    gpu = document["gpu"]
    usable_bytes = None if gpu is None else gpu["usable_bytes"]
    parts = parts_of(document["ledger"])
    bound = document["upper_bound_bytes"] if gpu is not None else None
    facts = [*asked_facts(document), ("batch", equation(document["setup"], document["model"]["unit"]))]
    return render(
        "estimate.html.jinja",
        document=document,
        filters={"signed": signed},
        name=document["model"]["name"],
        by_trace=document["kind"] == "trace",
        verdict=verdict_words(document) or f"{format_bytes(document['peak_process_bytes'])} at its highest",
        band=_band(document),
        facts=grouped([*facts, *compiled_facts(document["compiled"])]),
        totals=total_rows(document),
        time=None if document["step_time_s"] is None else time_words(document),
        parts=parts,
        breakdown=charts.breakdown(parts, usable_bytes, bound, PAGE),
        profile=profile,
        timeline=timeline_of(profile, usable_bytes),
        ledger=ledger_table(document["ledger"]),
    )


def _band(document: Document) -> str:
    """The peak and its bound against what there is, in a sentence."""
    peak, bound, gpu = document["peak_process_bytes"], document["upper_bound_bytes"], document["gpu"]
    text = f"The process takes {format_bytes(peak)} at its highest, the {document['peak_instant']}"
    if gpu is None:
        return f"{text}. No GPU was named, so nothing is said about fitting."
    usable = gpu["usable_bytes"]
    text += f": {100 * peak / usable:.0f} % of {format_bytes(usable)} usable"
    return f"{text}. Planned with is the band up to {format_bytes(bound)}." if bound > peak else f"{text}."
