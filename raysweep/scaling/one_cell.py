"""Ways to read an optimum off the trials of one cell alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from raysweep.scaling.cells import CellTrials
from raysweep.scaling.optimum_result import (
    FLAT,
    INTERIOR,
    TOO_FEW,
    Optimum,
    best_trial,
    edges_met,
    log_trials,
    optimum_at,
    searched_range,
)
from raysweep.scaling.quadratic import fit_valley

NOISE = 0.0005
"""Least sd of ln loss between runs that differ by their seed only, where a cell cannot tell."""

DRAWS = 64
"""Resamples of the trial noise behind the covariance of the methods that have no formula for it."""


def argmin(trials: CellTrials) -> Optimum:
    """The best trial. Its covariance adds the step between neighbouring settings to the noise."""
    point, log_loss = log_trials(trials)
    if _too_few(point, log_loss, 3):
        return best_trial(trials, "argmin", TOO_FEW)
    noisy = _resample(point, log_loss)
    chosen = point[noisy.argmin(1)]
    steps = np.array([_typical_step(point[:, k]) for k in range(2)])
    covariance = np.cov(chosen.T) + np.diag(steps**2 / 12)
    best = int(log_loss.argmin())
    return optimum_at(trials, "argmin", point[best], log_loss[best], covariance, noisy.min(1).std())


def mean_within(trials: CellTrials, tolerance: float = 0.0025) -> Optimum:
    """The geometric mean of the settings whose loss is within `tolerance` of the best.

    As DeepSeek LLM (2401.02954), Step Law (2503.04715) and Ling (2507.17702) read their optima."""
    point, log_loss = log_trials(trials)
    if _too_few(point, log_loss, 3):
        return best_trial(trials, "mean_within", TOO_FEW)
    good = np.log1p(tolerance)

    def means(losses: np.ndarray) -> np.ndarray:  # [draws, n] -> [draws, 2]
        near = losses <= losses.min(1, keepdims=True) + good
        return (near @ point) / near.sum(1, keepdims=True)

    noisy = _resample(point, log_loss)
    steps = np.array([_typical_step(point[:, k]) for k in range(2)])
    near = log_loss <= log_loss.min() + good
    covariance = np.cov(means(noisy).T) + np.diag(steps**2 / 12) / near.sum()
    optimum = optimum_at(
        trials,
        "mean_within",
        means(log_loss[None])[0],
        float(log_loss.min()),
        covariance,
        noisy.min(1).std(),
    )
    # A mean lies inside; the best trial tells whether the grid ended too early.
    edge = edges_met(point[log_loss.argmin()], *searched_range(trials))
    return replace(optimum, status=edge or INTERIOR) if optimum.status != FLAT else optimum


def interpolate(trials: CellTrials) -> Optimum:
    """Interpolation in ln lr at each batch, then in ln batch (Porian 2406.19146).

    Needs three batches with three learning rates each."""
    point, log_loss = log_trials(trials)
    noisy = np.vstack([log_loss, _resample(point, log_loss)])  # the first row is the data

    def minima(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Akima's curve through y [k, draws] at x [k]: where it is least, and how low."""
        fine = np.linspace(x[0], x[-1], 40 * (len(x) - 1) + 1)
        curve = Akima1DInterpolator(x, y, axis=0, method="makima")(fine)
        at = curve.argmin(0)
        return fine[at], np.take_along_axis(curve, at[None], 0)[0]

    batches, rates, lows = [], [], []
    for batch in np.unique(point[:, 1]):
        at = point[:, 1] == batch
        rate, first = np.unique(point[at, 0], return_inverse=True)
        if len(rate) < 3:
            continue
        y = np.stack([noisy[:, at][:, first == k].mean(1) for k in range(len(rate))])
        where, low = minima(rate, y)
        batches.append(batch)
        rates.append(where)
        lows.append(low)
    if len(batches) < 3:
        return best_trial(trials, "interpolate", TOO_FEW)
    b = np.array(batches)
    where, low = minima(b, np.stack(lows))
    rate = np.array([np.interp(w, b, r) for w, r in zip(where, np.stack(rates).T, strict=True)])
    found = np.column_stack([rate, where])
    return optimum_at(
        trials, "interpolate", found[0], low[0], np.cov(found[1:].T), float(low[1:].std())
    )


def quadratic(trials: CellTrials) -> Optimum:
    """A convex quadratic in the logs, held together by a weak prior where trials are few."""
    point, log_loss = log_trials(trials)
    if _too_few(point, log_loss, 3):
        return best_trial(trials, "quadratic", TOO_FEW)
    low, high = searched_range(trials)
    valley = fit_valley(point, log_loss, noise=NOISE)
    free = high > low
    where = valley.minimum_within(low, high)
    return optimum_at(
        trials,
        "quadratic",
        where,
        valley.value(where),
        valley.optimum_covariance,
        valley.value_sd,
        unclipped=np.where(free, valley.optimum, where),
    )


def _too_few(point: np.ndarray, log_loss: np.ndarray, least: int) -> bool:
    return len(np.unique(point, axis=0)) < least


def _typical_step(values: np.ndarray) -> float:
    """The median distance between neighbouring settings of one coordinate; 0 if there is one."""
    distinct = np.unique(values)
    return float(np.median(np.diff(distinct))) if len(distinct) > 1 else 0.0


def _resample(point: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    """Losses with trial noise added, [DRAWS, n]; `_noise` says how much."""
    rng = np.random.default_rng(0)
    return log_loss + _noise(point, log_loss) * rng.standard_normal((DRAWS, len(log_loss)))


def _noise(point: np.ndarray, log_loss: np.ndarray) -> float:
    """The sd of ln loss from run to run: from repeated settings near the best, else `NOISE`."""
    near = log_loss < log_loss.min() + 0.02
    _, group, size = np.unique(point[near], axis=0, return_inverse=True, return_counts=True)
    group = group.ravel()
    repeats = int((size - 1).sum())
    if repeats < 3:
        return NOISE
    mean = np.bincount(group, log_loss[near]) / size
    return max(NOISE / 5, float(np.sqrt(((log_loss[near] - mean[group]) ** 2).sum() / repeats)))
