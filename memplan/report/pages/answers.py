"""The page of any answer, by the kind of its document: of `--format html`, and of `memplan report FILE`.

page_of(json.loads(text_of("memplan sweep gpt2 --gpu 24GB --json")))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

from memplan.errors import MemplanError
from memplan.report.pages import tables
from memplan.report.pages.accuracy import render_accuracy_page
from memplan.report.pages.comparison import render_comparison_page
from memplan.report.pages.estimate import render_estimate_page
from memplan.report.pages.lengths import lengths_page
from memplan.report.pages.plan import render_plan_page
from memplan.report.pages.same_update import same_update_page
from memplan.report.pages.sweep import render_sweep_page

if TYPE_CHECKING:
    from collections.abc import Callable

    Document = dict[str, Any]


def _of_tables(page: Callable[[Document], tables.Page]) -> Callable[[Document], str]:
    return lambda document: tables.render_tables_page(document, page(document))


PAGE_BY_KIND: dict[str, Callable[[Document], str]] = {
    "estimate": render_estimate_page,
    "trace": render_estimate_page,
    "trace-diff": _of_tables(tables.difference_page),
    "sweep": render_sweep_page,
    "lengths": _of_tables(lengths_page),
    "probe": _of_tables(tables.probe_page),
    "probes": _of_tables(tables.probes_page),
    "accuracy": render_accuracy_page,
    "calibrations": _of_tables(tables.calibrations_page),
    "models": _of_tables(tables.models_page),
    "gpus": _of_tables(tables.gpus_page),
    "same-update": _of_tables(same_update_page),
    "report": render_plan_page,
    "comparison": render_comparison_page,
}
"""Kind of a document -> its page; that of a plan takes more than the plan (`memplan.studies`)."""

MISFITS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, jinja2.TemplateError)
"""What comes of a document that lacks something, or has something else in its place."""


def page_of(document: Document) -> str:
    """The page of a document that this version of memplan made."""
    return PAGE_BY_KIND[document["kind"]](document)


def page_of_foreign(document: Document, path: str) -> str:
    """The page of a document from a file.

    Raises:
        MemplanError: something in it is missing, or is not what it should be.
    """
    try:
        return page_of(document)
    except MISFITS as fault:
        raise damaged(document, path) from fault


def damaged(document: Document, path: str) -> MemplanError:
    """What there is to say of a file whose content is not that of its kind."""
    version = document.get("memplan_version")
    written = f", which memplan {version:.20} wrote," if isinstance(version, str) else ""
    return MemplanError(
        f"{path}{written} is no complete {document['kind']} document.",
        "Write it again: the same command with --json --output FILE.",
    )
