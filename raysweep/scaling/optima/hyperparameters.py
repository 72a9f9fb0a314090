"""Hyperparameters beside learning rate and batch: where each is best, and whether that moves.
(What such columns do to losses, so that it can be taken off them: `scaling/adjustment.py`.)

The surface explains a run's loss by its size, learning rate and batch. What it leaves is regressed
on a parabola in the (log of the) hyperparameter that all cells share, whose lowest point may move
with size:

    residual = level + a s + b s^2 + c z^2 + d z + e z s,   lowest at z = -(d + e s) / 2c

z is the hyperparameter, s = ln N, both centred and scaled to the runs. The regression is Bayesian
with a weak prior, weighted by the surface's noise, so that few runs give wide answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.results.columns import record_of
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.optima.surface import Surface
from raysweep.scaling.quantities import ANSWERS

NEAR = 0.1
"""Runs whose learning rate and batch cost more than this in ln loss tell nothing here."""
LEAST_RUNS = 8
LEAST_VALUES = 4
_PRIOR_SD = 0.1  # of each term, in ln loss over the range that was run
_DRAWS = 2000


@dataclass(frozen=True)
class Points:
    """Runs: [n] values of the hyperparameter, ln N, residuals in ln loss, their variances."""

    value: np.ndarray
    log_params: np.ndarray
    residual: np.ndarray
    variance: np.ndarray


@dataclass(frozen=True)
class HyperparameterOptimum:
    """What is known of one hyperparameter."""

    name: str
    log: bool
    low: float
    high: float
    """The range that was run."""
    params: float
    """Active non-embedding parameters at the centre of the runs."""
    runs: int
    optimum: Estimate
    """At `params`, within the range that was run."""
    exponent: Estimate
    """Of N in the optimum, where the scale is a log; else the change over a factor e of N."""
    status: str
    """`inside` the range; `edge` where the best may lie beyond it; `flat` where runs do not tell
    it from noise."""

    @property
    def moves(self) -> bool:
        """Whether the optimum is seen to move with size."""
        return self.status != "flat" and not self.exponent.low <= 0.0 <= self.exponent.high

    def to_dict(self) -> dict[str, object]:
        return {**vars(self), "moves": self.moves}


class Parabola:
    """The regression of one hyperparameter: its posterior in scaled terms."""

    def __init__(self, points: Points, log: bool, low: float, high: float) -> None:
        self._log = log
        self._ends = self._scale(low), self._scale(high)
        self._size = float(points.log_params.mean()) if len(points.log_params) else 0.0
        self._spread = max(float(points.log_params.std()), 0.5) if len(points.log_params) else 1.0
        rows = self._rows(points.value, points.log_params)
        weighted = rows / points.variance[:, None]
        precision = rows.T @ weighted + np.diag([1e-6, *[_PRIOR_SD**-2] * 5])
        self.covariance = np.linalg.inv(precision)
        self.mean = self.covariance @ (weighted.T @ points.residual)

    @property
    def params(self) -> float:
        """At the centre of the runs."""
        return float(np.exp(self._size))

    @property
    def spread(self) -> float:
        """Of ln N, that one unit of s stands for."""
        return self._spread

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """[count, 6], coefficients."""
        return rng.multivariate_normal(self.mean, self.covariance, size=count, method="cholesky")

    def lowest(self, drawn: np.ndarray, params: float) -> np.ndarray:
        """[count], where each drawn parabola is lowest within the range, at a size."""
        s = (np.log(params) - self._size) / self._spread
        slope, bend = drawn[:, 4] + drawn[:, 5] * s, drawn[:, 3]
        inside = np.clip(-slope / (2 * np.maximum(bend, 1e-12)), -1.0, 1.0)
        return np.where(bend > 0, inside, -np.sign(slope))

    def value(self, z: np.ndarray) -> np.ndarray:
        """Values of the hyperparameter at z."""
        low, high = self._ends
        at = 0.5 * (low + high) + 0.5 * (high - low) * z
        return np.exp(at) if self._log else at

    @property
    def half_range(self) -> float:
        """Of the (log of the) hyperparameter: one unit of z."""
        return 0.5 * (self._ends[1] - self._ends[0])

    def _scale(self, value: float) -> float:
        return float(np.log(value)) if self._log else value

    def _rows(self, value: np.ndarray, log_params: np.ndarray) -> np.ndarray:
        low, high = self._ends
        z = ((np.log(value) if self._log else value) - 0.5 * (low + high)) / (0.5 * (high - low))
        s = (log_params - self._size) / self._spread
        return np.column_stack([np.ones_like(z), s, s**2, z**2, z, z * s])


def points_of(
    surface: Surface,
    cell: Sequence[str],
    learning_rate: np.ndarray,
    batch_tokens: np.ndarray,
    loss: np.ndarray,
    value: np.ndarray,
) -> Points:
    """What the surface leaves unexplained of finished runs, near the bottoms of their cells."""
    names = np.asarray(cell, dtype=object)
    params = {c.name: c.params_active_non_embedding for c in surface.cells}
    parts = []
    for name in dict.fromkeys(names):
        own = (names == name) & np.isfinite(loss) & np.isfinite(value)
        if name not in params or not own.any():
            continue
        expected, _ = surface.predict(name, learning_rate[own], batch_tokens[own])
        gap = np.log(expected / surface.optimum(name).loss)
        keep = gap < NEAR
        variance = surface.noise_variance(np.maximum(gap[keep], 0.0))
        size = np.full(keep.sum(), np.log(params[name]))
        residual = np.log(loss[own] / expected)[keep]
        parts.append(np.stack([value[own][keep], size, residual, variance]))
    return Points(*(np.concatenate(parts, axis=1) if parts else np.empty((4, 0))))


def fit_optimum(name: str, points: Points) -> HyperparameterOptimum | None:
    """The optimum of a hyperparameter; None where too few runs tell of it."""
    values = points.value
    if len(values) < LEAST_RUNS or len(np.unique(values.round(12))) < LEAST_VALUES:
        return None
    low, high = float(values.min()), float(values.max())
    log = low > 0 and high / low > 3
    parabola = Parabola(points, log, low, high)
    drawn = parabola.draw(np.random.default_rng(0), _DRAWS)
    z = parabola.lowest(drawn, parabola.params)
    ends = np.quantile(z, [0.025, 0.5, 0.975])
    bend = drawn[:, 3]
    moved = -drawn[:, 5] / (2 * np.maximum(bend, 1e-3 * np.abs(bend).mean()))
    moved = np.quantile(moved * parabola.half_range / parabola.spread, [0.025, 0.5, 0.975])
    told = max(np.mean(bend > 0), np.mean(z > 0.5), np.mean(z < -0.5))
    at_edge = ends[0] <= -0.999 or ends[2] >= 0.999
    status = "flat" if told < 0.95 else "edge" if at_edge else "inside"
    best = parabola.value(ends)
    return HyperparameterOptimum(
        name=name,
        log=log,
        low=low,
        high=high,
        params=parabola.params,
        runs=len(values),
        optimum=Estimate(float(best[1]), float(best[0]), float(best[2])),
        exponent=Estimate(float(moved[1]), float(moved[0]), float(moved[2])),
        status=status,
    )


def hyperparameter_optima(
    surface: Surface, trials: pd.DataFrame, named: Collection[str] = ()
) -> dict[str, HyperparameterOptimum]:
    """Every number of the recipe that runs of one cell differ in, with its optimum, by name: of
    imported runs, which may keep anything there, those that are named.

    `trials` are rows that count, of the surface's data, with the columns of `results.schema`;
    `loss` is as it was run."""
    recipes = pd.DataFrame([_numbers(text) for text in trials["recipe"]], index=trials.index)
    imported = trials["source"].astype(str).str.startswith("import:")
    found = {}
    for name in recipes.columns:
        if name not in named and recipes[name][~imported].nunique() < LEAST_VALUES:
            continue
        value = recipes[name].astype(float)
        if value.groupby(trials["cell"]).nunique().max() < LEAST_VALUES:
            continue
        rate, batch, loss = (trials[c].to_numpy(float) for c in ANSWERS)
        cells = trials["cell"].astype(str).tolist()
        one = fit_optimum(
            str(name), points_of(surface, cells, rate, batch, loss, value.to_numpy(float))
        )
        if one is not None:
            found[str(name)] = one
    return found


def _numbers(text: object) -> Mapping[str, float]:
    return {
        key: float(v)
        for key, v in record_of(text).items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }
