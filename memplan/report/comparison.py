"""Some plans side by side, as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.document import envelope

if TYPE_CHECKING:
    from collections.abc import Sequence

    Document = dict[str, Any]


def comparison_document(reports: Sequence[Document], names: Sequence[str]) -> Document:
    """Plans side by side.

    Args:
        reports: The report document of each (`memplan.report.study.study_document`).
        names: What each was asked for as: a model and a GPU, or a file.
    """
    return {
        **envelope("comparison"),
        "sides": [
            {
                "name": name,
                "command": report["command"],
                "notes": report["notes"],
                "by_kind": by_kind(report["ledger"]),
                "plan": report["plan"],
            }
            for name, report in zip(names, reports, strict=True)
        ],
    }


def by_kind(ledger: Sequence[Document]) -> dict[str, int] | None:
    """Bytes at the peak, kind by kind; None where there is no ledger."""
    if not ledger:
        return None
    found: dict[str, int] = {}
    for row in ledger:
        found[row["kind"]] = found.get(row["kind"], 0) + row["bytes_at_peak"]
    return {kind: num for kind, num in found.items() if num}
