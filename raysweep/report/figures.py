"""What every figure shares: its data beside its drawing, and the architectures' colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from raysweep.report.style import ARCHITECTURE_COLOURS, LIGHT, MARKERS, Drawing, spread
from raysweep.report.trends import Line
from raysweep.text import short

End = tuple[float, float, str, str]
"""Where a line ends, (x, y), what is written there, and in which colour."""


MOST_ARCHITECTURES = 6
"""Architectures told apart in one figure."""


@dataclass(frozen=True)
class PlotFigure:
    """A drawing with the data behind it, and the names of what it shows."""

    name: str
    drawing: Drawing
    data: pd.DataFrame
    shown: tuple[str, ...] = ()


def colours(names: Sequence[str]) -> dict[str, str]:
    """The colour role of each architecture: c0 to c5, in order, then again from the first."""
    return {n: ARCHITECTURE_COLOURS[i % MOST_ARCHITECTURES] for i, n in enumerate(names)}


def draw_line(axes: Axes, line: Line, colour: str, first: bool) -> None:
    """A law: the first of several solid with its band, the others dashed."""
    style = "-" if first else (0, (4, 2))
    axes.plot(line.x, line.y, color=colour, linewidth=1.5 if first else 0.9, ls=style, zorder=2)
    if first and np.isfinite(line.low).all():
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.12, lw=0, zorder=1)


def draw_cells(
    axes: Axes, x: np.ndarray, y: np.ndarray, full: np.ndarray, index: int, gid: str
) -> None:
    """The cells of the `index`-th architecture; those not `full` [n] are hollow."""
    colour = LIGHT[ARCHITECTURE_COLOURS[index]]
    axes.scatter(
        x,
        y,
        s=26,
        marker=MARKERS[index],
        facecolors=[colour if k else LIGHT["paper"] for k in full],
        edgecolors=[LIGHT["paper"] if k else colour for k in full],
        linewidths=[0.6 if k else 1.2 for k in full],
        zorder=4,
        gid=gid,
    )


def draw_star(axes: Axes, x: float, y: float, index: int) -> None:
    """The run asked about."""
    if math.isfinite(x) and math.isfinite(y):
        colour = LIGHT[ARCHITECTURE_COLOURS[index]]
        axes.scatter(
            [x], [y], marker="*", s=110, c=colour, edgecolors=LIGHT["paper"], lw=0.8, zorder=6
        )


def held_words(held: str) -> str:
    """`D=4e9` as `D 4B`."""
    symbol, value = held.split("=")
    return f"{symbol} {short(float(value))}"


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Names at the right ends of lines, moved apart where they would overlap (y is logarithmic)."""
    if not ends:
        return
    low, high = np.log(axes.get_ylim())
    figure = axes.get_figure(root=True)
    assert figure is not None
    rows = axes.get_subplotspec().get_gridspec().nrows  # type: ignore[union-attr]
    points = 72 * figure.get_size_inches()[1] / rows * 0.84  # height of the axes, nearly
    ys = np.log([y for _, y, *_ in ends])
    places = spread(ys, 9.2 * (high - low) / points)
    for (x, y, text, colour), at, place in zip(ends, ys, places, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(6, float(place - at) * points / (high - low)),
            textcoords="offset points",
            fontsize=7,
            va="center",
            color=colour,
            annotation_clip=False,
        )
