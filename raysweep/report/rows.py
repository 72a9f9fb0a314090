"""Dots in rows: estimates with their intervals, one row a thing compared, about a neutral value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from raysweep.report.style import LIGHT

ROW_INCHES = 0.27

WHISKERS_SEEN = 2.5
"""An axis goes this many times as far as the outermost estimate to show intervals, no farther."""


@dataclass(frozen=True)
class Mark:
    """An estimate in a row; `colour` is a role of `style.LIGHT`, `tip` its hover text."""

    row: int
    value: float
    low: float
    high: float
    colour: str
    full: bool = True
    tip: str = ""


def rows_units(labels: Sequence[str], marks: Sequence[Mark]) -> list[float]:
    """The height of each row, in rows of one mark: fuller ones need more room."""
    counts = [sum(m.row == row for m in marks) for row in range(len(labels))]
    return [max(1.0, 0.5 + 0.3 * count) for count in counts]


def rows_height(units: float) -> float:
    """Inches for a panel of so many units of rows, and its axis."""
    return 0.6 + ROW_INCHES * max(units, 2)


def draw_rows(
    axes: Axes,
    labels: Sequence[str],
    marks: Sequence[Mark],
    neutral: float,
    gid: str,
    room: float = 0.0,
) -> dict[str, list[str]]:
    """Draw the marks, the first row on top, and set the axes' limits; returns hover texts by gid.

    The axis of values is logarithmic where `neutral` is 1, else linear. `room` is the height of the
    axes in units of rows, at least what these rows need."""
    ratio = neutral == 1
    low, high = _limits(marks, ratio)
    axes.axvline(neutral, color=LIGHT["faint"], linewidth=1, zorder=1)
    units = rows_units(labels, marks)
    middles = -(np.cumsum(units) - np.array(units) / 2)
    places = []
    for row, middle in enumerate(middles):
        own = [m for m in marks if m.row == row]
        reach = (units[row] - 0.45) / 2
        offsets = np.linspace(reach, -reach, len(own)) if len(own) > 1 else np.zeros(len(own))
        places += [(m, float(middle + d)) for m, d in zip(own, offsets, strict=True)]
    for mark, y in places:
        if math.isfinite(mark.low) and math.isfinite(mark.high):
            far = (low / 2, high * 2) if ratio else (2 * low - high, 2 * high - low)
            ends = np.clip([mark.low, mark.high], *far)
            axes.plot(ends, [y, y], color=LIGHT[mark.colour], linewidth=1.4, zorder=2)
    axes.scatter(
        [m.value for m, _ in places],
        [y for _, y in places],
        s=26 if len(places) < 40 else 16,
        facecolors=[LIGHT[m.colour if m.full else "paper"] for m, _ in places],
        edgecolors=[LIGHT["paper" if m.full else m.colour] for m, _ in places],
        linewidths=[0.5 if m.full else 1.2 for m, _ in places],
        zorder=3,
        gid=gid,
    )
    axes.set_yticks(middles, list(labels))
    axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-max(room, sum(units)) - 0.1, 0.1)
    axes.set_xlim(low, high)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    return {gid: [m.tip for m, _ in places]}


def _limits(marks: Sequence[Mark], ratio: bool) -> tuple[float, float]:
    """Room for every estimate and, as far as `WHISKERS_SEEN`, for the intervals."""
    ends = np.array([[m.value, m.low, m.high] for m in marks])
    if not ratio:
        return _room(ends, 0.1)
    low, high = _room(np.log(np.where(ends > 0, ends, np.nan)), 0.2)
    return math.exp(low), math.exp(high)


def _room(ends: np.ndarray, least: float) -> tuple[float, float]:
    """Of (value, low, high) [n, 3] about zero."""
    reach = WHISKERS_SEEN * max(float(np.abs(ends[:, 0]).max()), least)
    every = np.append(np.clip(ends[np.isfinite(ends)], -reach, reach), [-least, least])
    margin = 0.05 * float(np.ptp(every))
    return float(every.min()) - margin, float(every.max()) + margin
