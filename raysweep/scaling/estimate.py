"""Estimate: a number with its interval, or the word for why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass

NOT_DETERMINED = "not determined"
"""The status of a number that the data do not tell."""


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval, and how it stands.

    `low` and `high` are NaN where no interval is known. `status` is `ok`, or the reason in one
    word or two why the number is missing (NaN) or not to be relied on; `why` says it in a sentence.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    status: str = "ok"
    why: str = ""

    @classmethod
    def missing(cls, why: str, status: str = NOT_DETERMINED) -> Estimate:
        """No number, with the reason."""
        return cls(math.nan, status=status, why=why)

    @property
    def known(self) -> bool:
        """Whether there is a number at all."""
        return math.isfinite(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return math.isfinite(self.low + self.high)

    def covers(self, value: float) -> bool:
        """Whether the interval contains `value`."""
        return self.low <= value <= self.high
