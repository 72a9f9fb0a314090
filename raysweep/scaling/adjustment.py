"""Further hyperparameters (weight decay, warm-up, ...): what they add to the loss, taken off it.

    ln loss = what the surface says of the cell, learning rate and batch + sum of f_j(x_j) + noise

Each f_j is a parabola in ln x (or x, where zeros occur), or a level a value where x is no number,
fitted to what the surface leaves over, within cells: what differs only between cells tells of the
cells. Coefficients are shrunk towards none. Losses are then told at one value of each column, the
best of those that were tried, so that cells of unlike settings stand on one footing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.columns import named_column
from raysweep.scaling.cells import CellTable, cell_table
from raysweep.scaling.evidence import surface_of
from raysweep.scaling.optima.literature import OptimumPrior
from raysweep.scaling.optima.surface import Surface
from raysweep.text import written

NEAR = 0.1
"""Runs this far in ln loss above their cell's optimum tell little of anything but that."""
USUAL = 0.02
"""Prior sd of a coefficient: what one sd of a column may do to ln loss."""
FEW = 5
"""A value of a column that is no number has an effect of its own from so many runs on."""
ROUNDS = 2
"""Of fitting the surface, and then what the columns add to the loss."""
_LEVELS = 12
AS_RUN = "loss_as_run"
"""The loss of a row before it was adjusted."""


@dataclass(frozen=True)
class Effect:
    """What one column does to ln loss: `at` is its value at which losses are told, `share` how much
    of the variance within cells goes when it is taken into account beside the others."""

    column: str
    at: object
    share: float
    scale: tuple[float, float] | None
    """(middle, sd) of the number's logarithm, or of itself where `linear`; None of text."""
    linear: bool
    coefficients: np.ndarray
    levels: tuple[object, ...] = ()

    def features(self, values: pd.Series) -> np.ndarray:
        """[n, coefficients]; an unknown value is taken for the usual one."""
        if self.scale is None:
            text = values.astype(object).map(str).to_numpy()
            return np.stack([text == level for level in self.levels], -1).astype(float)
        x = _numbers(values)
        with np.errstate(divide="ignore", invalid="ignore"):
            x = x if self.linear else np.log(x)
        z = np.nan_to_num((x - self.scale[0]) / self.scale[1], posinf=0.0, neginf=0.0)
        return np.stack([z, z**2], -1)

    def offset(self, values: pd.Series) -> np.ndarray:
        """[n], ln loss above that of a run with the value `at`."""
        at = self.features(pd.Series([self.at], dtype=object))
        return (self.features(values) - at) @ self.coefficients


@dataclass(frozen=True)
class Adjustment:
    """The effects of further columns, and the `share` of the variance within cells, left by
    learning rate and batch, that they explain together, over `n` runs."""

    effects: tuple[Effect, ...]
    share: float
    n: int

    def offset(self, frame: pd.DataFrame) -> np.ndarray:
        """[rows], ln loss of runs above what it is at the values that losses are told at; columns
        that a table lacks are taken for those."""
        total = np.zeros(len(frame))
        for effect in self.effects:
            try:
                total += effect.offset(named_column(frame, effect.column, "--also"))
            except UserError:
                continue
        return total

    def applied(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows with their losses adjusted; as they were run in the column `AS_RUN`."""
        loss = pd.to_numeric(frame["loss"], errors="coerce")
        return frame.assign(loss=loss * np.exp(-self.offset(frame)), **{AS_RUN: loss})

    def __str__(self) -> str:
        of = "of the variance within cells that learning rate and batch leave"
        on = f"{written(self.share, 'share')} {of} ({self.n} runs)"
        if len(self.effects) == 1:
            (one,) = self.effects
            return (
                f"losses are adjusted for {one.column}, and told at {_said(one.at)}, the best "
                f"value tried; it explains {on}"
            )
        parts = [f"{e.column} {_said(e.at)} ({written(e.share, 'share')})" for e in self.effects]
        return (
            f"losses are adjusted for {', '.join(parts)}, and told at these values, the best of "
            f"those tried; together they explain {on}; in brackets, what would be lost without one"
        )


def adjusted_cells(
    frame: pd.DataFrame,
    table: CellTable,
    group: Sequence[str],
    also: str | Sequence[str],
    prior: OptimumPrior,
) -> tuple[Adjustment, CellTable]:
    """The effects of further columns on the rows of `table`, and the cells of rows with them taken
    off; `group` is what the table was made with.

    Raises:
        UserError: a column that does not exist, or that tells no two values within a cell.
    """
    names = (also,) if isinstance(also, str) else tuple(also)
    adjusted = None
    for _ in range(ROUNDS):
        trials = table.searched()
        if not trials:
            raise UserError("--also: no trial tells both learning rate and batch")
        sets = table.cells["dataset"]
        own = [[t for t in trials if sets[t.name] == label] for label in dict.fromkeys(sets)]
        surfaces = [surface_of(part, prior) for part in own if part]
        adjusted = adjust(table.trials, surfaces, names)
        table = cell_table(adjusted.applied(frame), group=group)
    assert adjusted is not None
    return adjusted, table


def adjust(trials: pd.DataFrame, surfaces: Sequence[Surface], columns: Sequence[str]) -> Adjustment:
    """The effects of columns on trials (rows of `CellTable.trials`) that surfaces were fitted to.

    Raises:
        UserError: a column that does not exist, or that tells no two values within a cell.
    """
    told = {name: named_column(trials, name, "--also") for name in columns}
    left, variance, used = _left_over(trials, surfaces)
    rows = trials[used]
    cell = pd.factorize(rows["cell"])[0]
    weight = 1 / variance[used]
    y = _within(left[used][:, None], cell, weight)[:, 0]
    shapes = [_shape(name, told[name][used]) for name in columns]
    blocks = [_within(e.features(told[e.column][used]), cell, weight) for e in shapes]
    for effect, block in zip(shapes, blocks, strict=True):
        if not np.abs(block).max(initial=0.0) > 1e-9:
            raise UserError(
                f"--also {effect.column}: it has one value in each cell, so nothing tells its "
                "effect apart from the cell's"
            )
    every = np.concatenate(blocks, 1)
    answer, misfit = _ridge(every, y, weight)
    base = float((weight * y**2).sum())
    found, at = [], 0
    for effect, block in zip(shapes, blocks, strict=True):
        size = block.shape[1]
        others = np.delete(every, range(at, at + size), 1)
        without = _ridge(others, y, weight)[1] if others.shape[1] else base
        share = max(0.0, (without - misfit) / base) if base > 0 else 0.0
        own = answer[at : at + size]
        best = _best(effect, own, told[effect.column][used])
        found.append(
            Effect(effect.column, best, share, effect.scale, effect.linear, own, effect.levels)
        )
        at += size
    share = max(0.0, 1 - misfit / base) if base > 0 else 0.0
    return Adjustment(tuple(found), share, len(rows))


def _left_over(
    trials: pd.DataFrame, surfaces: Sequence[Surface]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each trial what the surface leaves of its ln loss, the variance of that, and whether it
    lies near enough to its cell's optimum to count."""
    left, variance = np.zeros(len(trials)), np.ones(len(trials))
    used = np.zeros(len(trials), dtype=bool)
    place = {cell.name: surface for surface in surfaces for cell in surface.cells}
    position = pd.Series(np.arange(len(trials)), index=trials.index)
    for name, part in trials.groupby("cell", sort=False):
        surface = place.get(str(name))
        part = part[(part["learning_rate"] > 0) & (part["batch_tokens"] > 0)]
        if surface is None or len(part) < 2:
            continue
        rate, batch = (part[n].to_numpy(float) for n in ("learning_rate", "batch_tokens"))
        at = position[part.index].to_numpy()
        expected = np.log(surface.predict(str(name), rate, batch)[0])
        gap = np.maximum(expected - surface.optimum(str(name)).log_loss, 0.0)
        left[at] = np.log(part[AS_RUN if AS_RUN in part else "loss"].to_numpy(float)) - expected
        variance[at] = surface.noise_variance(gap)
        used[at] = gap < NEAR
    return left, variance, used


def _within(values: np.ndarray, cell: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[n, k] less their weighted mean in each cell."""
    count = int(cell.max(initial=-1)) + 1
    total = np.bincount(cell, weight, count)
    mean = np.stack([np.bincount(cell, weight * v, count) / total for v in values.T], -1)
    return values - mean[cell]


def _ridge(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients with a normal prior of sd `USUAL`, and the weighted sum of squares left.

    The noise is what is left over, not the surface's own: with the columns out of sight, that took
    their effects for noise."""
    scale = float((weight * y**2).mean()) or 1.0
    by = x.T * weight / scale
    answer = np.linalg.solve(by @ x + np.eye(x.shape[1]) / USUAL**2, by @ y)
    return answer, float((weight * (y - x @ answer) ** 2).sum())


def _shape(name: str, values: pd.Series) -> Effect:
    """An effect without coefficients: how a column's values become features."""
    x = _numbers(values)
    known = np.isfinite(x)
    if known.sum() > len(x) / 2:
        linear = bool((x[known] <= 0).any())
        z = x[known] if linear else np.log(x[known])
        scale = (float(z.mean()), float(z.std()) or 1.0)
        return Effect(name, math.nan, 0.0, scale, linear, np.zeros(2))
    counts = values.astype(object).map(str).value_counts()
    levels = tuple(counts.index[counts >= FEW][:_LEVELS])
    return Effect(name, "", 0.0, None, False, np.zeros(len(levels)), levels or ("",))


def _best(effect: Effect, coefficients: np.ndarray, values: pd.Series) -> object:
    """Of the values tried, the lowest and highest 5 % left out, the one of lowest loss."""
    if effect.scale is None:
        return effect.levels[int(coefficients.argmin())] if len(coefficients) else ""
    x = np.sort(_numbers(values))
    x = x[np.isfinite(x)]
    tried = np.unique(x[int(0.05 * len(x)) : max(1, math.ceil(0.95 * len(x)))])
    cost = effect.features(pd.Series(tried)) @ coefficients
    return float(tried[int(cost.argmin())])


def _numbers(values: pd.Series) -> np.ndarray:
    return pd.to_numeric(values, errors="coerce").to_numpy(float)


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
