"""What keys of the search-space file have in common: bounds, names, strictness."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from raysweep.text import NUMBER, read_number, read_size

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""Names become folder names: no separators, no leading dot."""


def _number(value: Any) -> Any:
    """Text as a number, 20B or 1e9 (YAML reads both as text); anything else as it is."""
    return read_number(value) if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    """As `_number`, and 20e6 where a whole number is meant."""
    value = _number(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _size(value: Any) -> Any:
    """As `_number`, with a hint where the letter was left out."""
    return read_size(value) if type(value) in (str, int, float) else value


MAX_LAYERS = 2_000
MAX_TOKEN_IDS = 10_000_000

Name = Annotated[str, Field(pattern=NAME)]


def _read(read: Callable[[Any], Any], number: Any) -> BeforeValidator:
    """Reads text for a field; the schema for editors allows `number` and such text."""
    text = Annotated[str, Field(pattern=f"^({NUMBER})$")]
    return BeforeValidator(read, json_schema_input_type=number | text)


_Count = Annotated[int, Field(ge=1, le=10**18)]
_Whole = Annotated[int, Field(ge=0, le=10**18)]
_TokenIds = Annotated[int, Field(ge=1, le=MAX_TOKEN_IDS)]
_Positive = Annotated[float, Field(gt=0, le=1e30)]
_NonNegative = Annotated[float, Field(ge=0, le=1e30)]
_Params = Annotated[float, Field(ge=1, le=1e13)]

Count = Annotated[_Count, _read(_whole, _Count)]
Whole = Annotated[_Whole, _read(_whole, _Whole)]
TokenIds = Annotated[_TokenIds, _read(_whole, _TokenIds)]
Positive = Annotated[_Positive, _read(_number, _Positive)]
NonNegative = Annotated[_NonNegative, _read(_number, _NonNegative)]
Params = Annotated[_Params, _read(_number, _Params)]
Size = Annotated[_Positive, _read(_size, _Positive)]
"""Parameters or tokens of a run."""
Ratio = Annotated[float, Field(ge=1e-3, le=1e3)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the file. Unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
