"""Numbers in the page: written once, each marked with the place in the fits that it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from raysweep.text import NOTHING, written

UNKNOWN = 1e5
"""An interval whose ends lie this factor apart tells nothing."""


def pointer(*parts: object) -> str:
    """A JSON pointer (RFC 6901) to a place in the fits."""
    return "".join("/" + str(p).replace("~", "~0").replace("/", "~1") for p in parts)


class Numbers:
    """Looks numbers up in plain data and marks each with its pointer: page and data agree."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def at(self, *parts: object) -> Any:
        """The value at a place, or None. A tuple among `parts` counts as its items."""
        value: Any = self.data
        for part in _flat(parts):
            if isinstance(value, Mapping):
                value = value.get(str(part))
            elif isinstance(value, Sequence) and not isinstance(value, str):
                index = int(str(part))
                value = value[index] if -len(value) <= index < len(value) else None
            else:
                return None
        return value

    def __call__(self, style: str, *parts: object) -> Markup:
        """The number at a place, as HTML that names the place."""
        value = self.at(*parts)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return Markup(NOTHING)
        return Markup('<span class="n" data-key="{}">{}</span>').format(
            pointer(*_flat(parts)), written(float(value), style)
        )

    def interval(self, style: str, low: Sequence[object], high: Sequence[object]) -> Markup:
        """`low to high`; empty where an end is not known, and said where they tell nothing."""
        if any(not isinstance(self.at(*p), int | float) for p in (low, high)):
            return Markup("")
        ends = self.at(*low), self.at(*high)
        if ends[0] > 0 and ends[1] > ends[0] * UNKNOWN:
            return Markup("not determined")
        return Markup("{} to {}").format(self(style, *low), self(style, *high))


def _flat(parts: Sequence[object]) -> list[object]:
    return [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]
