"""The error that all optima of a joint surface share, which resampling cells cannot show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raysweep.scaling.cells import CellTrials
from raysweep.scaling.optimum import surface_of, surface_optima

REFITS = 16
OWN = 3
"""Coefficients that a cell has of its own: its level and where its optimum lies."""


def shared_error(trials: Sequence[CellTrials], *, seed: int = 0) -> np.ndarray:
    """Variance [2] of (ln learning rate, ln batch) common to all optima of one surface.

    The cells lend each other the valley's shape, so an error in it moves all optima together. The
    wild bootstrap (Wu 1986): the departures of the trials from the surface change sign at random,
    and the mean optimum is read again; what its variance has beyond the cells' own is shared.
    """
    if not trials:
        return np.zeros(2)
    surface = surface_of(trials)
    full = surface_optima(surface, trials)
    used = [k for k, o in enumerate(full) if o.interior]
    if len(used) < 2:
        return np.zeros(2)
    rng = np.random.default_rng(seed)
    fitted = [surface.predict(t.name, t.learning_rate, t.batch_tokens)[0] for t in trials]
    means = []
    for _ in range(REFITS):
        drawn = [_redrawn(t, f, rng) for t, f in zip(trials, fitted, strict=True)]
        optima = surface_optima(surface_of(drawn), drawn)
        means.append(np.mean([optima[k].own for k in used], axis=0))
    own = sum(np.diag(full[k].own_covariance) for k in used) / len(used) ** 2
    return np.maximum(np.var(means, axis=0, ddof=1) - own, 0.0)


def _redrawn(trials: CellTrials, fitted: np.ndarray, rng: np.random.Generator) -> CellTrials:
    n = len(trials.loss)
    departure = np.log(trials.loss / fitted) * np.sqrt(n / max(n - OWN, 1))
    return replace(trials, loss=fitted * np.exp(departure * rng.choice([-1.0, 1.0], n)))
