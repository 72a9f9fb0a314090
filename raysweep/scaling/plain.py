"""Plain JSON values of anything that a fit holds: what is not a finite number becomes null."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd


def plain(value: object) -> object:
    """`value` as nested dicts, lists, strings, finite numbers, booleans and None."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, pd.DataFrame):
        records = value.reset_index().astype(object).to_dict("records")
        return [plain(record) for record in records]
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is pd.NA or value is pd.NaT:
        return None
    to_dict = getattr(value, "to_dict", None)
    assert callable(to_dict), f"no plain form of {type(value)}"
    return plain(to_dict())
