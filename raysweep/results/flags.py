"""Columns of other people's tables that say yes or no, in whatever way."""

from __future__ import annotations

import pandas as pd

_NO = ("", "false", "f", "no", "n", "none", "nan", "na", "null", "<na>", "-")


def flags(column: pd.Series) -> pd.Series:
    """Whether each value says yes: anything but empty, false, no, none and zero."""
    text = column.astype(object).where(column.notna(), "").astype(str).str.strip().str.lower()
    return ~(text.isin(_NO) | (pd.to_numeric(text, errors="coerce") == 0))
