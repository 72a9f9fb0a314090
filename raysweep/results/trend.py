"""Which rows of an imported table lie off the trend of loss against N and D, by kind of run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from raysweep.results.columns import record_of

BELOW = 0.1
"""A loss this far (in ln) under its kind's trend, and by more than the kind's own spread, was not
reached by a choice of hyperparameters: it is on other data, in another unit, or another run's."""
ABOVE = 0.3
"""Above it, hyperparameters may be to blame: a loss so far up is only named, and not where the
learning rate is above that of the best run of its size, as where runs diverge."""
SPREADS = 6.0
"""Robust standard deviations of its kind that a row must lie off."""
LEAST_BELOW, DEPTHS = 0.05, 3.0
"""So far below, and by so many times the depth that one row in twenty of its kind reaches, a row is
a suspect too: no choice of hyperparameters goes below the optimum, so that side is short."""
RATES_APART = 3.0
"""A learning rate so many times above or below those of all runs on the trend may be the reason why
a run lies under it: the others may all be badly tuned."""
FEWEST, FEWEST_SIZES = 12, 3
"""Rows, and different (N, D), that a kind needs to have a trend."""

_KIND = ("optimizer", "schedule")
_ROUNDS = 30


def off_trend(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that lie off the trend: `off`, by how much in ln loss, and `alone`, whether their
    learning rate is far from those of all others of their kind that do not lie below.

    The trend of a kind (architecture, data, study, optimizer, schedule) is a plane in ln N and ln D
    through the medians of equal sizes, of least absolute deviation, so that a few wrong rows do not
    bend it. `rows` are rows of the schema that count.
    """
    recipe = [record_of(text) for text in rows["recipe"]]
    kind = ["\x1f".join(str(r.get(k)) for k in _KIND) for r in recipe]
    keys = [
        rows["study"],
        rows["architecture"],
        rows["data_hash"].fillna(""),
        pd.Series(kind, rows.index),
    ]
    found = pd.DataFrame({"off": np.nan, "alone": False}, index=rows.index)
    for _, part in rows.groupby(keys, sort=False):
        size = np.log(part[["params_active_non_embedding", "tokens"]].to_numpy(float))
        loss = np.log(part["loss"].to_numpy(float))
        cell = np.unique(size.round(1), axis=0, return_inverse=True)[1].ravel()
        if len(part) < FEWEST or cell.max() + 1 < FEWEST_SIZES:
            continue
        rate = part["learning_rate"].to_numpy(float)
        off = loss - _trend(size, loss, cell)
        spread = 1.4826 * float(np.median(np.abs(off - np.median(off))))
        off -= np.median(off)
        hot = _hotter(part["learning_rate"].to_numpy(float), loss, cell)
        above = (off > max(ABOVE, SPREADS * spread)) & ~hot
        depth = -float(np.quantile(off, 0.05))
        lowest = min(max(BELOW, SPREADS * spread), max(LEAST_BELOW, DEPTHS * depth))
        below = off < -lowest
        suspect = below | above
        found.loc[part.index[suspect], "off"] = off[suspect]
        found.loc[part.index, "alone"] = _alone(rate, ~below)
    return found.dropna()


def _alone(rate: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n] bool: whether a run's learning rate is far above or below those of the others."""
    known = rate[others & (rate > 0)]
    if not len(known):
        return np.zeros(len(rate), bool)
    return (rate > known.max() * RATES_APART) | (rate < known.min() / RATES_APART)


def _hotter(rate: np.ndarray, loss: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """[n] bool: whether a run's learning rate is above that of the best run of its cell."""
    best = {k: np.flatnonzero(cell == k)[loss[cell == k].argmin()] for k in np.unique(cell)}
    return rate > rate[[best[k] for k in cell]]


def _trend(size: np.ndarray, loss: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """ln loss by the plane through the medians of `cell`, at each `size` [n, 2]."""
    at = np.stack([size[cell == k].mean(0) for k in range(cell.max() + 1)])
    middle = np.array([np.median(loss[cell == k]) for k in range(cell.max() + 1)])
    centre = at.mean(0)
    x = np.column_stack([np.ones(len(at)), at - centre])
    weight = np.ones(len(at))
    ridge = np.diag([1e-9, 1e-6, 1e-6])
    answer = np.zeros(3)
    for _ in range(_ROUNDS):
        answer = np.linalg.solve(
            (x * weight[:, None]).T @ x + ridge, (x * weight[:, None]).T @ middle
        )
        weight = 1 / np.maximum(np.abs(middle - x @ answer), 1e-4)
    return np.column_stack([np.ones(len(size)), size - centre]) @ answer
