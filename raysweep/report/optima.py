"""The figure of the optima: learning rate and batch against N, D and C, beside published laws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from raysweep.report.figures import (
    MOST_ARCHITECTURES,
    End,
    PlotFigure,
    draw_cells,
    draw_line,
    draw_star,
    held_words,
    label_ends,
)
from raysweep.report.style import (
    ARCHITECTURE_COLOURS,
    LIGHT,
    finish,
    log_axis,
    new_figure,
    settings,
)
from raysweep.report.trends import (
    Line,
    Rule,
    apart,
    asked_of,
    lines_along,
    names_of,
    path_of,
)
from raysweep.scaling.fits import Fits
from raysweep.scaling.optimum import Optimum
from raysweep.scaling.published import PUBLISHED_LAWS, PublishedLaw, Setting
from raysweep.scaling.quantities import QUANTITIES, SEARCHED
from raysweep.scaling.recommend import Recommendation

PUBLISHED_MARGIN = 6.0
"""A published law is drawn as far as this factor beyond one's own optima and no farther."""


def optima_figure(
    fits: Fits,
    answers: Sequence[Recommendation],
    rules: Mapping[str, Mapping[str, Rule]],
    *,
    png: bool = False,
) -> PlotFigure | None:
    """lr* and batch* against N, D and C, each where it varies; None without any optimum.

    `rules` holds the laws of each architecture, by what they are of."""
    names = names_of(fits)[:MOST_ARCHITECTURES]
    optima = fits.optima[fits.method]
    cells = fits.cells[fits.cells.index.isin(optima)]
    cells = cells[cells["architecture"].isin(names)]
    if not len(cells):
        return None
    axes_shown = apart(cells)
    rows, texts = [], {}
    with settings():
        figure = new_figure(10.2, 6.0 if len(axes_shown) > 1 else 3.7)
        shape = (2, len(axes_shown)) if len(axes_shown) > 1 else (1, 2)
        grid = figure.subplots(*shape, squeeze=False)
        for q, quantity in enumerate(SEARCHED):
            for k, axis in enumerate(axes_shown):
                axes = grid[q, k] if len(axes_shown) > 1 else grid[0, q]
                data, tips = _optima_panel(
                    axes, fits, cells, names, rules, answers, quantity, axis, f"{q}{k}"
                )
                rows += data
                texts |= tips
                log_axis(axes, "x", QUANTITIES[axis].style, 5)
                log_axis(axes, "y", QUANTITIES[quantity].style, 6)
                axes.grid(True)
                axes.set_axisbelow(True)
                if axes.get_subplotspec().is_last_row():
                    axes.set_xlabel(QUANTITIES[axis].axis)
                if k == 0:
                    axes.set_ylabel(QUANTITIES[quantity].axis)
        drawing = finish(
            figure,
            "optima",
            "Optimal learning rate and batch of each cell against its size, with fitted laws",
            texts,
            png,
            names,
        )
    return PlotFigure("optima", drawing, pd.DataFrame(rows), tuple(axes_shown))


def _optima_panel(
    axes: Axes,
    fits: Fits,
    cells: pd.DataFrame,
    names: Sequence[str],
    rules: Mapping[str, Mapping[str, Rule]],
    answers: Sequence[Recommendation],
    quantity: str,
    axis: str,
    tag: str,
) -> tuple[list[dict[str, object]], dict[str, list[str]]]:
    optima = fits.optima[fits.method]
    rows: list[dict[str, object]] = []
    tips: dict[str, list[str]] = {}
    heights: list[float] = []
    drawn: list[tuple[str, Line]] = []
    held: list[End] = []
    for i, name in enumerate(names):
        colour = LIGHT[ARCHITECTURE_COLOURS[i]]
        own = cells[cells["architecture"] == name]
        if not len(own):
            continue
        x = own[axis].to_numpy(float)
        found = [optima[c] for c in own.index]
        y = np.array([getattr(o, quantity) for o in found])
        half = np.array([_half(o, quantity) for o in found])
        inside = np.array([o.interior for o in found])
        known = inside & np.isfinite(half)
        axes.errorbar(
            x[known],
            y[known],
            yerr=np.stack([y * (1 - np.exp(-half)), y * (np.exp(half) - 1)])[:, known],
            fmt="none",
            ecolor=colour,
            elinewidth=0.9,
            alpha=0.7,
            zorder=3,
        )
        gid = f"points{tag}-{i}"
        draw_cells(axes, x, y, inside, i, gid)
        tips[gid] = [
            f"{c}: {QUANTITIES[quantity].name} {QUANTITIES[quantity].write(v)} ({o.status})"
            for c, v, o in zip(own.index, y, found, strict=True)
        ]
        heights += [*y]
        rows += [
            {"what": "cell", "architecture": name, "cell": c, "quantity": quantity, "axis": axis,
             "x": a, "y": b, "low": b * math.exp(-h), "high": b * math.exp(h), "status": o.status}
            for c, a, b, h, o in zip(own.index, x, y, half, found, strict=True)
        ]  # fmt: skip
        asked = asked_of(answers, name, own)
        targets = [target for _, target in asked]
        lines = lines_along(
            own, rules[name].get(quantity), quantity, axis, targets, len(names) == 1
        )
        for k, line in enumerate(lines):
            draw_line(axes, line, colour, first=k == 0)
            if line.held:
                held.append((line.x[-1], line.y[-1], held_words(line.held), colour))
            heights += [*line.y[np.isfinite(line.y)]]
            rows += [
                {"what": "law", "architecture": name, "cell": line.held, "quantity": quantity,
                 "axis": axis, "x": a, "y": b, "low": lo, "high": hi, "status": ""}
                for a, b, lo, hi in zip(line.x, line.y, line.low, line.high, strict=True)
            ]  # fmt: skip
        drawn += [(name, line) for line in lines[:1]]
        for answer, target in asked:
            rate = quantity == "learning_rate"
            star = answer.learning_rate if rate else answer.batch_tokens_exact
            draw_star(axes, target.inputs[axis], star, i)
            heights.append(star)
        if not lines:  # published laws need a path even where there is no law of one's own
            drawn.append((name, path_of(own, axis, targets)))
    finite = np.array([h for h in heights if math.isfinite(h) and h > 0])
    low, high = finite.min() / 1.6, finite.max() * 1.6
    published, ends, low, high = _draw_published(axes, drawn, quantity, axis, low, high)
    rows += published
    axes.set_ylim(low, high)
    label_ends(axes, [*ends, *held])
    lo, hi = axes.get_xlim()
    x_all = cells[axis].to_numpy(float)
    lo = min(x_all.min(), *(line.x[0] for _, line in drawn)) if drawn else x_all.min()
    hi = max(x_all.max(), *(line.x[-1] for _, line in drawn)) if drawn else x_all.max()
    margin = max((hi / lo) ** 0.05, 1.05)
    axes.set_xlim(lo / margin, hi * margin)
    return rows, tips


def _half(optimum: Optimum, quantity: str) -> float:
    k = 0 if quantity == "learning_rate" else 1
    return 1.96 * math.sqrt(optimum.covariance[k, k])


def _draw_published(
    axes: Axes,
    drawn: Sequence[tuple[str, Line]],
    quantity: str,
    axis: str,
    low: float,
    high: float,
) -> tuple[list[dict[str, object]], list[End], float, float]:
    """Thin lines of published laws along the same paths, named at their right end.

    Returns their rows, their ends, and the range of y widened to hold those."""
    rows: list[dict[str, object]] = []
    ends: list[End] = []
    floor, ceiling = low * 1.6 / PUBLISHED_MARGIN, high / 1.6 * PUBLISHED_MARGIN
    for law in PUBLISHED_LAWS.values():
        path = next((line for _, line in drawn if law.covers(line.settings[0])), None)
        if path is None:
            continue
        y = np.array([_published(law, quantity, s) for s in path.settings])
        seen = np.isfinite(y) & (y > floor) & (y < ceiling)
        if not seen[-1] or seen.sum() < 2:
            continue
        axes.plot(
            path.x[seen], y[seen], color=LIGHT["faint"], linewidth=0.8, zorder=1.5,
            linestyle="-" if law.verified else ":",
        )  # fmt: skip
        name = law.source.split(",")[0].replace(" et al.", "")
        ends.append((path.x[-1], y[-1], name, LIGHT["muted"]))
        rows += [
            {"what": "published", "architecture": law.key, "cell": "", "quantity": quantity,
             "axis": axis, "x": a, "y": b, "low": math.nan, "high": math.nan, "status": ""}
            for a, b in zip(path.x, y, strict=True)
        ]  # fmt: skip
    if ends:
        low = min(low, *(y / 1.2 for _, y, *_ in ends))
        high = max(high, *(y * 1.2 for _, y, *_ in ends))
    return rows, ends, low, high


def _published(law: PublishedLaw, quantity: str, setting: Setting) -> float:
    answer = (
        law.learning_rate(setting) if quantity == "learning_rate" else law.batch_tokens(setting)
    )
    return math.nan if answer is None else answer
