"""Rows as CSV, as Markdown and as Parquet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd


def render_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Comma-separated, one line a row, the names of the columns first (RFC 4180 with plain line feeds)."""
    import csv
    import io

    file = io.StringIO()
    if records:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0])
        writer.writerows([[_cell(value) for value in record.values()] for record in records])
    return file.getvalue()


def render_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """A table as GitHub reads it; numbers to the right."""
    if not records:
        return ""
    columns = list(records[0])
    numeric = [all(isinstance(record[name], int | float) for record in records) for name in columns]
    lines = [_line(columns), _line(["---:" if number else "---" for number in numeric])]
    lines += [_line([_cell(record[name]).replace("|", "\\|") for name in columns]) for record in records]
    return "".join(f"{line}\n" for line in lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    """A shape as ``b x s x 4096``, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return " x ".join(str(part) for part in value)
    return str(value)


def render_parquet(frame: pd.DataFrame) -> bytes:
    """A table as Parquet; pyarrow has to be installed."""
    import io

    file = io.BytesIO()
    frame.to_parquet(file, engine="pyarrow", index=False)
    return file.getvalue()
