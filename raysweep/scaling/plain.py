"""Plain JSON values of anything that a fit holds: what is not a finite number becomes null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd


def plain_dict(value: object) -> dict[str, Any]:
    """`to_json` of a mapping or a dataclass."""
    found = to_json(value)
    assert isinstance(found, dict)
    return found


def to_json(value: object) -> object:
    """`value` as nested dicts, lists, strings, finite numbers, booleans and None.

    A dataclass becomes its fields, unless it has a `to_dict` of its own."""
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(v) for v in value]
    if isinstance(value, pd.DataFrame):
        records = value.reset_index().astype(object).to_dict("records")
        return [to_json(record) for record in records]
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is pd.NA or value is pd.NaT:
        return None
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):
        return to_json(to_dict())
    assert is_dataclass(value), f"no plain form of {type(value)}"
    return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
