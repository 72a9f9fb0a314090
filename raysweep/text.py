"""Numbers with units, written and read in one place: 125M, 2m 30s, 1.2 (95 %: 1.1 to 1.3)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Protocol

from raysweep.errors import UserError

NOTHING = "–"
"""Stands where there is no number."""

_LETTERS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


class Interval(Protocol):
    """A number with its 95 % interval, such as `raysweep.scaling.estimate.Estimate`."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


# --- writing -----------------------------------------------------------------------------------


def short(value: float, digits: int = 3, full: bool = False) -> str:
    """A count as people say it: 16.4k, 125M, 1.4T; `full` keeps trailing zeros, as in 1.40T."""
    if not math.isfinite(value):
        return NOTHING
    for letter, limit in reversed(_LETTERS.items()):
        # 999.6k rounds to 1000k: the next letter then
        if abs(value) >= limit * (1 - 0.5 * 10.0**-digits):
            return _digits(value / limit, digits, full) + letter
    return _digits(value, digits, full)


def scientific(value: float, digits: int = 3, full: bool = False) -> str:
    """A learning rate or a number of FLOPs: 2.4e-3; plain between 0.01 and 1000."""
    if not math.isfinite(value):
        return NOTHING
    if value == 0 or 1e-2 <= abs(value) < 1e3:
        return _digits(value, digits, full)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa and not full:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Seconds as people say them, in two units at most: 0.4s, 42s, 2m 30s, 5h 07m, 3d 11h, 12d."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 0.95:
        return f"{seconds:.1g}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24}h" if hours < 10 * 24 else f"{round(hours / 24)}d"


def size(count: float) -> str:
    """Bytes in decimal units: 640 bytes, 1.2 kB, 50 MB, 141 GB."""
    for unit, limit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= limit * 0.9995:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} bytes"


def dollars(value: float) -> str:
    """A price: $0.0123, $2.50, $1.2M."""
    if not 0.1 <= abs(value) < 1000:
        return f"${short(value)}"
    return f"${value:.2f}"


def _digits(value: float, digits: int, full: bool) -> str:
    rounded = float(f"{value:.{digits}g}")
    if 10**digits <= abs(rounded) < 1000:  # 180 to two digits, not 1.8e+02
        return f"{rounded:.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if full else f"{value:.{digits}g}"


STYLES: dict[str, Callable[[float], str]] = {
    "rate": lambda v: scientific(v, 3, full=True),
    "batch": lambda v: short(v, 3, full=True),
    "tokens": short,
    "params": short,
    "flops": scientific,
    "loss": lambda v: f"{v:.4f}",
    "exponent": lambda v: f"{v:+.3f}".replace("-", "\N{MINUS SIGN}"),
    "ratio": lambda v: f"{v:.2f}" if 0.1 <= abs(v) < 10 else f"{v:.3g}",
    "number": lambda v: f"{v:.4g}",
    "coefficient": lambda v: scientific(v, 4),
    "percent": lambda v: f"{100 * v:.2g}\N{NO-BREAK SPACE}%",
    "share": lambda v: f"{100 * v:.0f}\N{NO-BREAK SPACE}%",
    "count": lambda v: f"{v:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}"),
    "seconds": duration,
    "bytes": size,
    "dollars": dollars,
}
"""How each kind of number is written."""


def written(value: float | None, style: str) -> str:
    """A number in one of `STYLES`; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return STYLES[style](value)


def between(low: float, high: float, style: str) -> str:
    """`1.1 to 1.3`, or `no interval` where an end is not known."""
    if not math.isfinite(low + high):
        return "no interval"
    return f"{written(low, style)} to {written(high, style)}"


def estimated(
    value: float | Interval,
    low: float = math.nan,
    high: float = math.nan,
    *,
    style: str,
    unit: str = "",
) -> str:
    """`1.2 (95 %: 1.1 to 1.3)`, `1.2 (no interval)`, or `unknown`; of three floats or an Estimate.

    `unit` is a word put behind the number.
    """
    if not isinstance(value, float | int):
        value, low, high = value.value, value.low, value.high
    if not math.isfinite(value):
        return "unknown"
    span = between(low, high, style)
    unit = unit and f" {unit}"
    return f"{written(value, style)}{unit} ({'95 %: ' if span != 'no interval' else ''}{span})"


def spanned(value: float, low: float, high: float, style: str) -> str:
    """`1.2 (1.1 to 1.3)` for a table that says what its intervals are; `1.2`, `not determined`."""
    if not math.isfinite(value):
        return "not determined"
    known = math.isfinite(low + high)
    return written(value, style) + (f" ({between(low, high, style)})" if known else "")


# --- reading -----------------------------------------------------------------------------------

NUMBER = (
    r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+|[0-9]{1,3}([,_][0-9]{3})+(\.[0-9]+)?)"
    r"([eE][-+]?[0-9]+)? ?[kKmMbBtT]?"
)
"""What `read_number` takes, as a pattern that JSON schemas understand too."""

MIN_SIZE = 1000
"""Parameters and tokens of a run: whoever gives fewer has left out the letter."""


def read_number(given: str | float, what: str = "") -> float:
    """A number as people write it: 20B, 1.4T, 1e9, 1,400,000, 1_400_000, or one that is one.

    Raises UserError, which begins with `what` was asked for, where the text is none; 1,4T is none.
    """
    name = f"{what} {given}".strip() if what else repr(given)
    if not isinstance(given, str):
        try:
            return float(given)
        except OverflowError:
            raise UserError(f"{name} is too large") from None
    text = given.strip()
    match = re.fullmatch(r"([-+]?[0-9]+),([0-9]+) ?([kmbt]?)", text, re.IGNORECASE)
    if match and (match[3] or len(match[2]) != 3):
        raise UserError(f"{name}: write {match[1]}.{match[2]}{match[3]}")
    if not re.fullmatch(NUMBER, text):
        raise UserError(f"{name} is no number: write 7e9 or 7B")
    plain = re.sub("[,_ ]", "", text)
    letter = plain[-1] if plain[-1].isalpha() else ""
    factor = {"": 1.0, **{k.lower(): v for k, v in _LETTERS.items()}}[letter.lower()]
    value = float(plain.removesuffix(letter)) * factor
    if math.isinf(value):
        raise UserError(f"{name} is too large")
    return value


def read_size(given: str | float, what: str = "") -> float:
    """Parameters or tokens of a run, as `read_number`; UserError for 7 where 7B must be meant."""
    value = read_number(given, what)
    if 0 < value < MIN_SIZE:
        asked = f"{value:g}"
        letter = "T" if what == "tokens" and value < 10 else "B"
        raise UserError(f"{what or 'a size of'} {asked}: did you mean {asked}{letter}?")
    return value
