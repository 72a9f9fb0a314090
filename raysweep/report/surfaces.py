"""The loss of each cell over learning rate and batch: its trials, the fitted surface, slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raysweep.report.figure import Axis, Contours, Line, Panel, PlotFigure, Points, Series
from raysweep.scaling.cells import CellTrials
from raysweep.scaling.evidence import Evidence
from raysweep.scaling.fits import Fits
from raysweep.scaling.optima.readings import Optimum
from raysweep.text import short, written

GAPS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Borders between the six shades: loss above the cell's best, relative."""

MAX_CELLS = 24
"""Cells drawn; of more, this many spread evenly over compute."""

MAX_DOTS = 8000
"""Trials drawn in all cells together; of more, each cell's are thinned evenly by loss."""

REGION = 5.991
"""Chi-squared of two degrees of freedom at 95 %."""

GRID = 25

SURFACE_INCHES = 3.9
"""Width of the picture of a surface alone."""


@dataclass(frozen=True)
class CellFigure:
    """One cell's figure, and whether its optimum lies inside its trials."""

    cell: str
    architecture: str
    params: float
    tokens: float
    optimum: Optimum
    figure: PlotFigure


def cell_figures(fits: Fits) -> list[CellFigure]:
    """One figure a searched cell, smallest compute first; all of an architecture share axes."""
    searched = {t.name: t for t in fits.table.searched()}
    every = [str(c) for c in fits.cells.index if str(c) in searched]
    names = every
    if len(every) > MAX_CELLS:
        spread = np.unique(np.linspace(0, len(every) - 1, MAX_CELLS).round().astype(int))
        names = [every[i] for i in spread]
    dots = max(MAX_DOTS // max(len(names), 1), 40)
    keys = _keys(fits)
    return [
        _one(fits, searched, name, k, dots, keys.get(name, ([], [])))
        for k, name in enumerate(names)
    ]


def cell_figure(fits: Fits, name: str) -> CellFigure:
    """The figure of one searched cell, with all its trials."""
    searched = {t.name: t for t in fits.table.searched()}
    return _one(fits, searched, name, 0, len(searched[name].loss))


def picture(cell: CellFigure, whole: bool) -> PlotFigure:
    """What stands in the page without scripts: the surface, and its slices where `whole`."""
    if whole:
        return cell.figure
    return replace(cell.figure, panels=cell.figure.panels[:1], ratios=(), width=SURFACE_INCHES)


def _keys(fits: Fits) -> dict[str, tuple[list[str], list[str]]]:
    """Of each searched cell the keys of its trials that count and of those that diverged."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    trials, failed = fits.table.trials, fits.table.failed
    known = trials[(trials["learning_rate"] > 0) & (trials["batch_tokens"] > 0)]
    for k, rows in enumerate((known, failed)):
        for name, own in rows.groupby("cell", sort=False)["trial_key"]:
            found.setdefault(str(name), ([], []))[k].extend(own.astype(str))
    return found


def _one(
    fits: Fits,
    searched: Mapping[str, CellTrials],
    name: str,
    number: int,
    dots: int,
    keys: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> CellFigure:
    row = fits.cells.loc[[name]].to_dict("records")[0]
    architecture = str(row["architecture"])
    same = fits.cells_of(architecture).index
    box = _box([searched[str(n)] for n in same if str(n) in searched])
    evidence = fits.evidence_of(architecture)
    optimum = fits.optima["model"][name]
    best = float(row["loss"])
    figure = _figure(searched[name], evidence, optimum, best, box, number, dots, keys)
    n, d = float(row["params_active_non_embedding"]), float(row["tokens"])
    return CellFigure(name, architecture, n, d, optimum, figure)


def _figure(
    trials: CellTrials,
    evidence: Evidence,
    optimum: Optimum,
    best: float,
    box: np.ndarray,
    number: int,
    dots: int,
    keys: tuple[Sequence[str], Sequence[str]],
) -> PlotFigure:
    gap = trials.loss / best - 1
    order = np.argsort(-gap, kind="stable")
    if len(order) > dots:
        order = order[np.linspace(0, len(order) - 1, dots).round().astype(int)]
    rate, batch, above = (a[order] for a in (trials.learning_rate, trials.batch_tokens, gap))
    fills = [f"h{i}" for i in np.searchsorted(GAPS, above, side="right")]
    size = float(np.clip(600 / max(len(gap), 1), 10, 38))
    series: list[Series] = _contours(trials, evidence, best)
    series.append(
        Points("trials", rate, batch, "h0", size=size, fills=fills,
               keys=np.asarray(keys[0])[order].tolist() if keys[0] else ())
    )  # fmt: skip
    if len(trials.failed_learning_rate):
        series.append(
            Points("diverged", trials.failed_learning_rate, trials.failed_batch_tokens, "bad", "x",
                   size=20, keys=keys[1])
        )  # fmt: skip
    series += _optimum(optimum)
    low, high = np.exp(box)
    x = Axis.of("learning_rate", limits=(low[0], high[0]))
    y = Axis.of("batch_tokens", limits=(low[1], high[1]))
    panels = [
        Panel(x, y, tuple(series)),
        *_slices(trials, evidence, optimum, best, (x, y), keys[0]),
    ]
    return PlotFigure(
        f"cell{number}",
        f"Loss of the trials of {trials.name} over learning rate and batch",
        tuple(panels),
        width=8.6 if len(panels) > 1 else 5.0,
        height=2.8,
        ratios=(1.35, 1, 1)[: len(panels)],
        fixed=True,
    )


def _contours(trials: CellTrials, evidence: Evidence, best: float) -> list[Series]:
    """The surface within the searched range of the cell; nothing where it did not converge."""
    surface = evidence.surface
    if surface is None or surface.status != "converged" or surface.batch_rule is not None:
        return []
    box = _box([trials])
    rate, batch = (np.exp(np.linspace(box[0, k], box[1, k], GRID)) for k in range(2))
    x, y = np.meshgrid(rate, batch)
    return [
        Contours("surface", rate, batch, surface.predict(trials.name, x, y)[0] / best - 1, GAPS)
    ]


def _optimum(optimum: Optimum) -> list[Series]:
    """The optimum with its 95 % region."""
    at = np.array([optimum.learning_rate]), np.array([optimum.batch_tokens])
    inside = optimum.interior
    tip = f"optimum: lr {written(at[0][0], 'rate')}, batch {short(at[1][0])} ({optimum.status})"
    found: list[Series] = [
        Points("optimum", *at, "c1" if inside else "bad", "P" if inside else "o",
               full=np.array([inside]), tips=[tip], size=80)
    ]  # fmt: skip
    if inside and np.isfinite(optimum.covariance).all():
        values, vectors = np.linalg.eigh(optimum.covariance)
        turn = np.linspace(0, 2 * np.pi, 60)
        ring = (vectors * np.sqrt(np.maximum(values, 0) * REGION)) @ [np.cos(turn), np.sin(turn)]
        found.append(
            Line("95 % region of the optimum", at[0] * np.exp(ring[0]), at[1] * np.exp(ring[1]),
                 "c1", legend="optimum")
        )  # fmt: skip
    return found


def _slices(
    trials: CellTrials,
    evidence: Evidence,
    optimum: Optimum,
    best: float,
    axes: Sequence[Axis],
    keys: Sequence[str],
) -> list[Panel]:
    """The loss along the learning rate at the best batch, and along the batch at the best rate,
    with every trial."""
    surface = evidence.surface
    if surface is None or surface.status != "converged":
        return []
    panels = []
    low, high = np.exp(_box([trials]))
    top = best * (1 + max(0.06, 1.3 * float(np.quantile(trials.loss / best - 1, 0.5))))
    at = optimum.learning_rate, optimum.batch_tokens
    values = trials.learning_rate, trials.batch_tokens
    for k, axis in enumerate(axes):
        if k == 1 and surface.batch_rule is not None:
            break
        if high[k] / low[k] > 1e6 or len(np.unique(values[k])) < 2:
            continue
        x = np.geomspace(low[k], high[k], 41)
        other = np.full_like(x, at[1 - k])
        loss, sd = surface.predict(trials.name, *((x, other) if k == 0 else (other, x)))
        low_end = min(best, float(trials.loss.min()))
        y = Axis("loss", "loss", limits=(low_end * 0.996, top))
        line = Line("slice", x, loss, "c0", loss - 1.96 * sd, loss + 1.96 * sd, legend="surface")
        dots = Points("trials", values[k], trials.loss, "muted", size=11, keys=keys)
        panels.append(
            Panel(Axis(axis.label, axis.style, limits=(low[k], high[k])), y, (line, dots))
        )
    return panels


def _box(cells: Sequence[CellTrials]) -> np.ndarray:
    """[[low lr, low batch], [high lr, high batch]] in logs, with a margin."""
    rates = np.log(np.concatenate([np.r_[t.learning_rate, t.failed_learning_rate] for t in cells]))
    batches = np.log(np.concatenate([np.r_[t.batch_tokens, t.failed_batch_tokens] for t in cells]))
    low, high = np.array([rates.min(), batches.min()]), np.array([rates.max(), batches.max()])
    margin = np.where(high - low < 0.02, 0.7, 0.08 * (high - low))
    return np.stack([low - margin, high + margin])


def drawn_of(fits: Fits) -> tuple[int, int]:
    """(cells drawn, cells searched)."""
    searched = int((fits.cells["n_searched"] > 0).sum())
    return min(searched, MAX_CELLS), searched
