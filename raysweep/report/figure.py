"""Figures as data (points, lines, bands, contours, with units), and the one function that draws
them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from raysweep.report.style import (
    ARCHITECTURE_COLOURS,
    LIGHT,
    MARKERS,
    Drawing,
    add_key,
    finish,
    log_axis,
    new_figure,
    settings,
    spread,
)
from raysweep.scaling.quantities import QUANTITIES, TARGETS
from raysweep.scaling.runs import AXES
from raysweep.text import written

MAX_COLOURS = len(ARCHITECTURE_COLOURS)

ROW_INCHES = 0.27
"""Height of a row of a panel whose y-axis lists names."""

MANY = 60
"""Cells of an architecture from which their dots are small."""

WHISKER = 0.7
SEEN = 2.5
"""An axis goes this many times as far as its outermost estimate to show whiskers; one of a list
twice as far again, and in logs at least by `WHISKER`."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows. `style` is of `text.STYLES`; `names` make it a list, first on top."""

    label: str
    style: str = "tokens"
    log: bool = True
    reverse: bool = False
    names: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None

    @classmethod
    def of(cls, quantity: str, *, best: bool = False, **rest: Any) -> Axis:
        """That of one of `QUANTITIES`; where `best`, of the optimum of what cells have one of."""
        one = QUANTITIES[quantity]
        optimal = "optimal " if best and quantity in TARGETS else ""
        return cls(optimal + one.axis, one.style, **rest)


@dataclass(frozen=True, eq=False)
class Points:
    """Dots at (x, y) [n]; `low` and `high` are the ends of their intervals, along x on a list.

    Those not `full` are hollow. `tips` are their hover texts, `names` what they are."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = "c0"
    marker: str = "o"
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    full: np.ndarray | None = None
    tips: Sequence[str] = ()
    names: Sequence[str] = ()
    size: float = 26
    fills: Sequence[str] = ()
    """Colour roles of the single dots, in place of `colour`."""
    legend: str = ""
    """What the page's legend has it under; by default the name as far as its first comma."""
    keys: Sequence[str] = ()
    """Keys of the trials that the dots are: the page opens them, and knows them when brushed."""
    shades: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Sizes by which the page can colour the dots: N and D [n]."""


@dataclass(frozen=True, eq=False)
class Line:
    """A curve with its band; `end` is written at its right end."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = "c0"
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    dashed: bool = False
    thin: bool = False
    end: str = ""
    legend: str = ""


@dataclass(frozen=True, eq=False)
class Contours:
    """Values [y, x] over a grid, in shades `h0`, `h1`, ... between the borders `levels`."""

    name: str
    x: np.ndarray
    y: np.ndarray
    values: np.ndarray
    levels: tuple[float, ...]


Series = Points | Line | Contours


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `neutral` draws a line where nothing differs: x of a list, else y."""

    x: Axis
    y: Axis
    series: tuple[Series, ...]
    neutral: float | None = None
    fit_lines: bool = True
    """Whether lines count for the limits, or only points."""


@dataclass(frozen=True)
class PlotFigure:
    """A figure: its panels, side by side, and what it says. `names` are the architectures."""

    name: str
    caption: str
    panels: tuple[Panel, ...]
    names: tuple[str, ...] = ()
    width: float = 10.2
    height: float = 3.1
    key: tuple[str, ...] = ()
    """Words on what marks mean, beside the architectures' colours."""
    ratios: tuple[float, ...] = ()
    choose: tuple[str, ...] = ()
    """Names of the panels where the page shows one at a time, larger."""
    fixed: bool = False
    """Whether margins are those of a cell's figure, not fitted to its labels: quicker by half."""

    def draw(self, png: bool = False) -> Drawing:
        """As SVG for the page, and as PNG where asked for."""
        with settings():
            figure, tips = _figure(self)
            return finish(figure, self.name, self.caption, tips, png, self.names)

    def to_matplotlib(self) -> Figure:
        """As a matplotlib Figure."""
        with settings():
            drawn = _figure(self)[0]
            if len(self.names) > 1:
                add_key(drawn, self.names)
        return drawn

    def to_pandas(self) -> pd.DataFrame:
        """Its data: one row a point."""
        rows = [row for panel in self.panels for row in _rows(panel)]
        return pd.DataFrame(rows)


def colours(names: Sequence[str]) -> dict[str, str]:
    """The colour role of each architecture: c0 to c5, in order, then again from the first."""
    return {n: ARCHITECTURE_COLOURS[i % MAX_COLOURS] for i, n in enumerate(names)}


class Look(NamedTuple):
    """What tells an architecture apart in every figure."""

    colour: str
    marker: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """The colour role and the marker of each architecture."""
    return {
        name: Look(colour, MARKERS[i % len(MARKERS)])
        for i, (name, colour) in enumerate(colours(names).items())
    }


def cell_points(
    name: str,
    cells: pd.DataFrame,
    x: str,
    y: np.ndarray,
    look: Look,
    say: Callable[[float], str],
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    full: np.ndarray | None = None,
    *,
    shaded: bool = False,
) -> Points:
    """Dots of an architecture's cells at their column `x` and at `y` [n], each with its name and
    what `say` makes of its y in its hover text; those without x or y are left out. The page can
    colour and open them where they are `shaded`."""
    at = cells[x].to_numpy(float)
    known = np.isfinite(at) & np.isfinite(y)
    own = cells[known]
    low, high, full = (None if v is None else v[known] for v in (low, high, full))
    return Points(
        f"{name}, cells", at[known], y[known], *look, low, high, full,
        tips=[f"{cell}: {say(v)}" for cell, v in zip(own.index, y[known], strict=True)],
        names=[str(cell) for cell in own.index],
        size=26 if len(own) < MANY else 13,
        shades={a: own[AXES[a]].to_numpy(float) for a in "ND"} if shaded else {},
    )  # fmt: skip


def listed_height(rows: int) -> float:
    """Inches for a panel that lists so many names."""
    return 0.62 + ROW_INCHES * max(rows, 2)


# ---------------------------------------------------------------------- data


def _rows(panel: Panel) -> Iterator[dict[str, Any]]:
    for s in panel.series:
        said = {"x_is": panel.x.label, "y_is": panel.y.label, "what": s.name}
        if isinstance(s, Contours):
            x, y = np.meshgrid(s.x, s.y)
            for a, b, c in zip(x.ravel(), y.ravel(), s.values.ravel(), strict=True):
                yield {**said, "x": a, "y": b, "value": c}
            continue
        nothing = np.full(len(s.x), math.nan)
        low, high = (nothing if v is None else v for v in (s.low, s.high))
        names = list(s.names) if isinstance(s, Points) and s.names else [""] * len(s.x)
        for name, a, b, c, d in zip(names, s.x, s.y, low, high, strict=True):
            at = panel.y.names[int(b)] if panel.y.names else b
            yield {**said, "name": name, "x": a, "y": at, "low": c, "high": d}


# ---------------------------------------------------------------------- drawing


def _figure(figure: PlotFigure) -> tuple[Figure, dict[str, list[str]]]:
    drawn = new_figure(figure.width, figure.height, None if figure.fixed else "constrained")
    if figure.fixed:
        drawn.subplots_adjust(0.62 / figure.width, 0.135, 0.995, 0.985, 0.26)
    n = len(figure.panels)
    grid = drawn.subplots(1, n, squeeze=False, width_ratios=figure.ratios or [1] * n)[0]
    tips: dict[str, list[str]] = {}
    for k, (axes, one) in enumerate(zip(grid, figure.panels, strict=True)):
        tips |= panel(axes, one, f"p{k}")
        if k and one.y.label == figure.panels[k - 1].y.label:
            axes.set_ylabel("")
    return drawn, tips


def panel(axes: Axes, one: Panel, tag: str) -> dict[str, list[str]]:
    """Draw one panel on matplotlib axes; returns its hover texts by gid."""
    tips: dict[str, list[str]] = {}
    _scale(axes, one)
    for k, s in enumerate(one.series):
        if isinstance(s, Line):
            _draw_line(axes, s)
        elif isinstance(s, Contours):
            _draw_contours(axes, s)
        else:
            gid = f"{tag}-{k}"
            _draw_points(axes, s, bool(one.y.names), gid)
            tips[gid] = list(s.tips)
    if one.neutral is not None:
        line = axes.axvline if one.y.names else axes.axhline
        line(one.neutral, color=LIGHT["faint"], linewidth=0.9, zorder=1)
    axes.set_xlabel(one.x.label)
    if not one.y.names:
        axes.set_ylabel(one.y.label)
        axes.grid(True)
    else:
        axes.grid(True, axis="x")
        axes.set_yticks(range(len(one.y.names)), one.y.names)
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
    _label_ends(axes, [s for s in one.series if isinstance(s, Line) and s.end])
    return tips


def _draw_line(axes: Axes, s: Line) -> None:
    colour = LIGHT[s.colour]
    width = 0.8 if s.thin else 1.0 if s.dashed else 1.6
    axes.plot(
        s.x, s.y, color=colour, linewidth=width, ls=(0, (4, 2)) if s.dashed else "-",
        zorder=1.5 if s.thin else 2,
    )  # fmt: skip
    if s.low is not None and s.high is not None and np.isfinite(s.low).any():
        # A band may reach to where no axis goes, and an SVG cannot hold such numbers.
        low, high = (np.clip(v, *_drawable(axes)) for v in (s.low, s.high))
        axes.fill_between(s.x, low, high, color=colour, alpha=0.13, lw=0, zorder=1)


def _draw_points(axes: Axes, s: Points, listed: bool, gid: str) -> None:
    colour = LIGHT[s.colour]
    full = np.ones(len(s.x), bool) if s.full is None else np.asarray(s.full, bool)
    if s.low is not None and s.high is not None:
        # One path with gaps: hundreds of cells would make hundreds of elements.
        ends = np.clip([s.low, s.high], *_drawable(axes, "x" if listed else "y"))
        place = np.asarray(s.y if listed else s.x, float)
        gap = np.full(len(place), np.nan)
        along, across = np.stack([*ends, gap], -1).ravel(), np.repeat(place, 3)
        at = (along, across) if listed else (across, along)
        axes.plot(*at, color=colour, linewidth=1.3, alpha=0.75, zorder=3)
    fills = [LIGHT[c] for c in s.fills] or [colour] * len(full)
    if s.marker == "x":
        axes.scatter(s.x, s.y, s=s.size, c=colour, marker="x", linewidths=1.1, zorder=3, gid=gid)
        return
    light = s.size > 60 or bool(s.fills)
    axes.scatter(
        s.x,
        s.y,
        s=s.size,
        marker=s.marker,
        facecolors=[c if k else LIGHT["paper"] for c, k in zip(fills, full, strict=True)],
        edgecolors=[LIGHT["paper"] if k else c for c, k in zip(fills, full, strict=True)],
        linewidths=[(0.8 if light else 0.6) if k else 1.2 for k in full],
        zorder=6 if s.marker == "*" else 4,
        gid=gid,
        clip_on=s.marker != "*",
    )


def _draw_contours(axes: Axes, s: Contours) -> None:
    shades = [LIGHT[f"h{i}"] for i in range(len(s.levels) + 1)]
    values = np.clip(s.values, 0, 1e3)
    axes.contourf(
        s.x, s.y, values, levels=[-1, *s.levels, 1e4], colors=shades, alpha=0.55, zorder=1
    )
    axes.contour(
        s.x, s.y, values, levels=s.levels[:3], colors=LIGHT["paper"], linewidths=0.5, zorder=2
    )


def _scale(axes: Axes, one: Panel) -> None:
    """Limits and ticks."""
    for which, axis in (("x", one.x), ("y", one.y)):
        set_limits = axes.set_xlim if which == "x" else axes.set_ylim
        if axis.names:
            set_limits(len(axis.names) - 0.5, -0.5)
            continue
        low, high = limits(one, which, axis)
        set_limits(low, high)
        if axis.log:
            log_axis(axes, which, axis.style, 4 if axis.style == "flops" else 5)
        else:
            at = axes.xaxis if which == "x" else axes.yaxis
            style = axis.style
            at.set_major_locator(MaxNLocator(5))
            at.set_major_formatter(FuncFormatter(lambda v, _, s=style: written(v, s)))
        if axis.reverse:
            (axes.invert_xaxis if which == "x" else axes.invert_yaxis)()


def limits(one: Panel, which: str, axis: Axis) -> tuple[float, float]:
    """The limits of an axis: by points and lines, not by their intervals."""
    if axis.limits:
        return axis.limits
    values: list[np.ndarray] = []
    whiskers: list[np.ndarray] = []
    listed = bool(one.y.names)
    for s in one.series:
        counts = one.fit_lines or which == "x"
        if isinstance(s, Points) or (isinstance(s, Line) and counts and not s.thin):
            values.append(np.asarray(getattr(s, which), float))
        if isinstance(s, Points) and (which == "x") == listed and s.low is not None:
            whiskers += [np.asarray(s.low, float), np.asarray(s.high, float)]
    if one.neutral is not None and (which == "x") == listed:
        values.append(np.array([one.neutral]))
    every = np.concatenate(values) if values else np.array([1.0, 10.0])
    ends = np.concatenate(whiskers) if whiskers else np.array([])
    if axis.log:
        every = np.log(every[np.isfinite(every) & (every > 0)])
        ends = np.log(ends[np.isfinite(ends) & (ends > 0)])
    every, ends = every[np.isfinite(every)], ends[np.isfinite(ends)]
    if not len(every):
        every = np.zeros(1)
    low, high = float(every.min()), float(every.max())
    reach = (SEEN - 1) * (high - low) / 2
    if listed:
        reach = max(2 * (high - low), WHISKER if axis.log else 0.0)
    if len(ends):
        low, high = (
            min(low, float(np.clip(ends.min(), low - reach, low))),
            max(high, float(np.clip(ends.max(), high, high + reach))),
        )
    margin = max(0.06 * (high - low), 0.01 if axis.log else 0.02 * abs(high) or 0.02)
    low, high = low - margin, high + margin
    return (math.exp(low), math.exp(high)) if axis.log else (low, high)


def _drawable(axes: Axes, which: str = "y") -> tuple[float, float]:
    """(low, high): one more width of the axis on either side; nothing further out need be drawn."""
    low, high = sorted(axes.get_ylim() if which == "y" else axes.get_xlim())
    log = (axes.get_yscale() if which == "y" else axes.get_xscale()) == "log"
    return (low / 3, high * 3) if log else (2 * low - high, 2 * high - low)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Names at the right ends of lines, moved apart where they would overlap (y is logarithmic)."""
    left, right = sorted(axes.get_xlim())
    bottom, top = sorted(axes.get_ylim())
    ends = []
    for s in lines:
        seen = np.flatnonzero((s.x <= right) & (s.x >= left) & np.isfinite(s.y))
        if len(seen) and bottom < s.y[seen[-1]] < top:
            ends.append((float(s.x[seen[-1]]), float(s.y[seen[-1]]), s.end, LIGHT[s.colour]))
    if not ends:
        return
    low, high = math.log(bottom), math.log(top)
    figure = axes.get_figure(root=True)
    assert figure is not None
    points = 72 * figure.get_size_inches()[1] * 0.8  # height of the axes, nearly
    ys = np.log([y for _, y, *_ in ends])
    places = spread(ys, 9.2 * (high - low) / points)
    for (x, y, text, colour), at, place in zip(ends, ys, places, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(5, float(place - at) * points / (high - low)),
            textcoords="offset points",
            fontsize=7,
            va="center",
            color=LIGHT["muted"] if colour == LIGHT["faint"] else colour,
            annotation_clip=False,
        )


def by_name(figures: Sequence[PlotFigure | None]) -> Mapping[str, PlotFigure]:
    """The figures that are not None, by their names."""
    return {f.name: f for f in figures if f is not None}
