"""What keys of the search-space file have in common: bounds, names, strictness."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""Names become folder names: no separators, no leading dot."""


def _whole(value: Any) -> Any:
    """Accept 20e6 and '1e9' where a whole number is meant (YAML reads the latter as text)."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


MOST_LAYERS = 2_000
MOST_TOKEN_IDS = 10_000_000

Name = Annotated[str, Field(pattern=NAME)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**18)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**18)]
TokenIds = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_TOKEN_IDS)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
NonNegative = Annotated[float, Field(ge=0, le=1e30)]
Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the file. Unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
