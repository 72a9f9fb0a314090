"""The loss of each cell over learning rate and batch: trials, fitted surface, optimum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from raysweep.report.style import LIGHT, Drawing, finish, log_axis, new_figure, settings
from raysweep.scaling.cells import CellTable, CellTrials
from raysweep.scaling.fits import Fits
from raysweep.scaling.optimum import Optimum
from raysweep.scaling.surface import Surface
from raysweep.text import scientific, short

GAPS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Borders between the six shades: loss above the cell's best, relative."""

SHADES = tuple(LIGHT[f"h{i}"] for i in range(len(GAPS) + 1))

MOST = 36
"""Cells drawn; of more, this many spread evenly over compute."""

MOST_DOTS = 8000
"""Trials drawn in all cells together; of more, each cell's are thinned evenly by loss."""

TIPS = 3000
"""Trials with a hover text; beyond this many in the page none has one."""

REGION = 5.991
"""Chi-squared of two degrees of freedom at 95 %."""


@dataclass(frozen=True)
class CellFigure:
    """One cell's drawing."""

    cell: str
    architecture: str
    drawing: Drawing


def chosen_cells(fits: Fits) -> list[str]:
    """The cells to draw, smallest compute first: all, or `MOST` of them spread evenly."""
    names = [str(c) for c in fits.cells.index[(fits.cells["n_searched"] > 0).to_numpy()]]
    if len(names) <= MOST:
        return names
    spread = np.unique(np.linspace(0, len(names) - 1, MOST).round().astype(int))
    return [names[i] for i in spread]


def dots_of(cells: int) -> int:
    """The most trials drawn in each of so many cells."""
    return max(MOST_DOTS // max(cells, 1), 40)


def cell_figures(fits: Fits, table: CellTable, *, png: bool = False) -> list[CellFigure]:
    """One small figure a cell; all cells of an architecture share their axes."""
    searched = {t.name: t for t in table.searched()}
    names = [n for n in chosen_cells(fits) if n in searched]
    tips = sum(len(searched[n].loss) for n in names) <= TIPS
    dots = dots_of(len(names))
    figures = []
    boxes: dict[str, np.ndarray] = {}
    for name in names:
        architecture = str(fits.cells.loc[name, "architecture"])
        if architecture not in boxes:
            same = fits.cells.index[fits.cells["architecture"] == architecture]
            boxes[architecture] = _box([searched[n] for n in same if n in searched])
        figures.append(
            _cell_figure(searched[name], fits, boxes[architecture], len(figures), dots, tips, png)
        )
    return figures


def _cell_figure(
    trials: CellTrials,
    fits: Fits,
    box: np.ndarray,
    number: int,
    dots: int,
    tips: bool,
    png: bool,
) -> CellFigure:
    row = fits.cells.loc[[trials.name]].to_dict("records")[0]
    optimum = fits.optima[fits.method].get(trials.name)
    best = float(row["loss"]) if math.isfinite(row["loss"]) else float(trials.loss.min())
    gap = trials.loss / best - 1
    with settings():
        figure = new_figure(2.42, 2.0, layout=None)
        axes = figure.add_axes((0.225, 0.19, 0.755, 0.79))
        axes.set_xlim(*np.exp(box[:, 0]))
        axes.set_ylim(*np.exp(box[:, 1]))
        if fits.surface is not None and fits.surface.status == "converged":
            _contours(axes, fits.surface, trials, best)
        order = np.argsort(-gap, kind="stable")
        if len(order) > dots:
            order = order[np.linspace(0, len(order) - 1, dots).round().astype(int)]
        shade = np.searchsorted(GAPS, gap[order], side="right")
        axes.scatter(
            trials.learning_rate[order],
            trials.batch_tokens[order],
            c=[SHADES[i] for i in shade],
            s=_size(len(gap)),
            edgecolors=[LIGHT["paper" if i < 4 else "faint"] for i in shade],
            linewidths=[0.7 if i < 4 else 0.4 for i in shade],
            zorder=3,
            gid="trials",
            clip_on=False,
        )
        if len(trials.failed_learning_rate):
            axes.scatter(
                trials.failed_learning_rate,
                trials.failed_batch_tokens,
                marker="x",
                c=LIGHT["bad"],
                s=16,
                linewidths=1.1,
                zorder=3,
                gid="diverged",
            )
        if optimum is not None:
            _mark_optimum(axes, optimum, _box([trials]))
        axes.set_xlabel("learning rate", labelpad=2)
        axes.set_ylabel("batch, tokens", labelpad=2)
        log_axis(axes, "x", "rate", 4)
        log_axis(axes, "y", "count", 4)
        texts = [
            f"lr {scientific(r)}, batch {short(b)}, loss {loss:.4f} ({100 * g:+.2f} %)"
            for r, b, loss, g in zip(
                trials.learning_rate[order],
                trials.batch_tokens[order],
                trials.loss[order],
                gap[order],
                strict=True,
            )
        ]
        lost = [
            f"diverged: lr {scientific(r)}, batch {short(b)}"
            for r, b in zip(trials.failed_learning_rate, trials.failed_batch_tokens, strict=True)
        ]
        drawing = finish(
            figure,
            f"cell{number}",
            f"Loss of the trials of {trials.name} over learning rate and batch",
            {"trials": texts, "diverged": lost} if tips else {},
            png,
        )
    return CellFigure(trials.name, str(row["architecture"]), drawing)


def _size(trials: int) -> float:
    return float(np.clip(400 / max(trials, 1), 9, 30))


def _box(cells: list[CellTrials]) -> np.ndarray:
    """[[low lr, low batch], [high lr, high batch]] in logs, with a margin."""
    rates = np.log(np.concatenate([np.r_[t.learning_rate, t.failed_learning_rate] for t in cells]))
    batches = np.log(np.concatenate([np.r_[t.batch_tokens, t.failed_batch_tokens] for t in cells]))
    low, high = np.array([rates.min(), batches.min()]), np.array([rates.max(), batches.max()])
    margin = np.where(high - low < 0.02, 0.7, 0.08 * (high - low))
    return np.stack([low - margin, high + margin])


def _contours(axes: Axes, surface: Surface, trials: CellTrials, best: float) -> None:
    """The surface within the searched range of the cell, in the shades of the trials."""
    box = _box([trials])
    rate, batch = (np.exp(np.linspace(box[0, k], box[1, k], 41)) for k in range(2))
    x, y = np.meshgrid(rate, batch)
    loss, _ = surface.predict(trials.name, x, y)
    gap = np.clip(loss / best - 1, 0, 1e3)
    axes.contourf(x, y, gap, levels=[-1, *GAPS, 1e4], colors=SHADES, alpha=0.55, zorder=1)
    axes.contour(x, y, gap, levels=GAPS[:3], colors=LIGHT["paper"], linewidths=0.5, zorder=2)


def _mark_optimum(axes: Axes, optimum: Optimum, box: np.ndarray) -> None:
    """The optimum with its 95 % region; a side of the range that it runs into is marked."""
    interior = optimum.interior
    axes.scatter(
        [optimum.learning_rate],
        [optimum.batch_tokens],
        marker="P" if interior else "o",
        s=46,
        c=LIGHT["c1"] if interior else "none",
        edgecolors=LIGHT["paper"] if interior else LIGHT["bad"],
        linewidths=0.9 if interior else 1.4,
        zorder=5,
    )
    if interior and np.isfinite(optimum.covariance).all():
        values, vectors = np.linalg.eigh(optimum.covariance)
        turn = np.linspace(0, 2 * np.pi, 60)
        circle = np.stack([np.cos(turn), np.sin(turn)]) * np.sqrt(REGION)
        ring = (vectors * np.sqrt(np.maximum(values, 0))) @ circle
        axes.plot(
            optimum.learning_rate * np.exp(ring[0]),
            optimum.batch_tokens * np.exp(ring[1]),
            color=LIGHT["c1"],
            linewidth=1.1,
            zorder=4,
        )
    (left, bottom), (right, top) = np.exp(box)
    sides = {
        "learning_rate low": ((left, left), (bottom, top)),
        "learning_rate high": ((right, right), (bottom, top)),
        "batch low": ((left, right), (bottom, bottom)),
        "batch high": ((left, right), (top, top)),
    }
    for words, (x, y) in sides.items():
        if words in optimum.status:
            axes.plot(x, y, color=LIGHT["bad"], linewidth=2, solid_capstyle="butt", zorder=4)
