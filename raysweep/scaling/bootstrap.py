"""Resampling of cells: how uncertain a fitted law's coefficients and predictions are.

A resample draws whole cells with replacement (never the rows of one cell's plateau, which share its
errors), as multiplicities over the one set of data, so that a thousand refits are solved together.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from raysweep.errors import UserError
from raysweep.scaling import fitting
from raysweep.scaling.form import read_inputs
from raysweep.scaling.loss_fit import LossFit

# Width the refits start from, in units of the final one: wide enough to leave the kinks of the full
# sample's minimum, narrow enough to stay close to it.
WARM_WIDTH = 30.0


def cell_multiplicities(cells: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each point counts in each resample [resamples, n], drawing whole cells."""
    ids, cell = np.unique(cells, return_inverse=True)
    draws = rng.multinomial(len(ids), np.full(len(ids), 1.0 / len(ids)), size=resamples)
    return draws[:, cell].astype(float)


def bootstrap(
    fit: LossFit,
    resamples: int = 1000,
    *,
    trial_noise: float | np.ndarray = 0.0,
    seed: int = 0,
    workers: int | None = None,
) -> LossFit:
    """`fit` with `samples` from refits of resampled cells.

    `trial_noise`, a number or [n], is the sd of log loss between repeated trials; it is drawn
    afresh for every point of every resample, for losses that are the best of a noisy few. Refits
    that do not converge, or rest on fewer cells than coefficients, are left out and counted in
    `n_failed`."""
    if not fit.ok:
        return fit
    if resamples < 2:
        raise UserError(f"a bootstrap needs at least 2 resamples, not {resamples}")
    rng = np.random.default_rng(seed)
    law = fit.law
    problem = law.problem(read_inputs(law.form, fit.inputs), fit.weights, fit.fixed)
    weights = cell_multiplicities(fit.cells, resamples, rng) * fit.weights
    target = np.log(fit.loss)
    if np.any(trial_noise):
        target = target + rng.standard_normal((resamples, len(target))) * trial_noise
    start = problem.design.centre(law.form.unstate(fit.values))
    solution = fitting.minimise(
        problem.design,
        target,
        weights,
        np.tile(start, (resamples, 1)),
        problem.bounds,
        fit.huber,
        first_width=WARM_WIDTH * fit.huber,
        workers=workers,
    )
    # A draw of fewer distinct cells than coefficients has a minimum, but not only one.
    first = np.unique(fit.cells, return_index=True)[1]
    usable = solution.converged & ((weights[:, first] > 0).sum(axis=1) >= fit.n_free)
    samples = law.form.state(problem.design.uncentre(solution.theta[usable]))
    for name, value in fit.fixed.items():
        samples[:, law.names.index(name)] = value
    return replace(fit, samples=samples, n_failed=int((~usable).sum()))
