"""Answers that can be looked at as tables.

The one place outside the edges that knows pandas, and only when somebody asks for a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class Tabular:
    """Something with rows."""

    def records(self) -> list[dict[str, Any]]:
        """The rows, as plain values."""
        raise NotImplementedError

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a table, one column a value."""
        return self.frame(self.records())

    @staticmethod
    def frame(rows_or_columns: Any) -> pd.DataFrame:
        """A table of rows (a list of dicts) or of columns (a dict of arrays)."""
        import pandas as pd  # only a table needs it, and it takes a third of a second to import

        return pd.DataFrame(rows_or_columns)
