"""A cell's optimum as read off its trials: by the model, and by other ways, as checks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from raysweep.scaling.cells import CellTrials
from raysweep.scaling.optima.surface import Surface

INTERIOR, FLAT, TOO_FEW = "interior", "flat", "too few trials"
ONE_RATE = "one learning rate"


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where one cell's loss is least.

    `covariance` [2, 2] is that of (ln learning_rate, ln batch_tokens), NaN where the trials do not
    identify it. `status` is `interior`, `flat`, `too few trials`, `one learning rate` (where that
    was not varied, while the batch was), or `edge: ` with the sides, as in
    `edge: learning_rate high, batch low`. Batch in tokens, loss in nats a token.
    """

    cell: str
    learning_rate: float
    batch_tokens: float
    loss: float
    covariance: np.ndarray
    loss_se: float
    status: str
    method: str
    n_trials: int

    @property
    def interior(self) -> bool:
        return self.status == INTERIOR


def log_trials(trials: CellTrials) -> tuple[np.ndarray, np.ndarray]:
    """(ln learning rate, ln batch) [n, 2] and ln loss [n]."""
    point = np.column_stack([np.log(trials.learning_rate), np.log(trials.batch_tokens)])
    return point, np.log(trials.loss)


def searched_range(trials: CellTrials) -> tuple[np.ndarray, np.ndarray]:
    """The searched range in logs; a diverged trial bounds it as well as a finished one."""
    rate = np.concatenate([trials.learning_rate, trials.failed_learning_rate])
    batch = np.concatenate([trials.batch_tokens, trials.failed_batch_tokens])
    return (
        np.log([rate.min(), batch.min()]),
        np.log([rate.max(), batch.max()]),
    )


def edges_met(where: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """`edge: ...` where a point lies on or beyond the border of the searched range, else ""."""
    sides = []
    for k, name in enumerate(("learning_rate", "batch")):
        slack = 1e-6 * (high[k] - low[k])
        if high[k] <= low[k]:
            continue  # one value only: nothing was searched, so there is no border to meet
        if where[k] <= low[k] + slack:
            sides.append(f"{name} low")
        elif where[k] >= high[k] - slack:
            sides.append(f"{name} high")
    return "edge: " + ", ".join(sides) if sides else ""


def optimum_at(
    trials: CellTrials,
    method: str,
    where: np.ndarray,
    log_loss: float,
    covariance: np.ndarray,
    log_loss_sd: float,
    unclipped: np.ndarray | None = None,
) -> Optimum:
    """An optimum with its status: flat before edge before one rate before interior."""
    low, high = searched_range(trials)
    edge = edges_met(where if unclipped is None else unclipped, low, high)
    width = high - low
    searched = width > 0
    covariance = np.array(covariance, dtype=float)
    sd = np.sqrt(np.diag(covariance))
    blind = bool((sd[searched] > width[searched] / 2).all()) if searched.any() else True
    same = float(np.ptp(np.log(trials.loss))) < 1e-9
    status = FLAT if same or blind else edge or (INTERIOR if searched[0] else ONE_RATE)
    for k, name in enumerate(("learning_rate", "batch")):
        if not searched[k] or status == FLAT or f"{name} low" in status or f"{name} high" in status:
            covariance[k, :] = covariance[:, k] = np.nan
    loss = float(np.exp(log_loss))
    return Optimum(
        cell=trials.name,
        learning_rate=float(np.exp(where[0])),
        batch_tokens=float(np.exp(where[1])),
        loss=loss,
        covariance=covariance,
        loss_se=loss * float(log_loss_sd),
        status=status,
        method=method,
        n_trials=len(trials.loss),
    )


def best_trial(trials: CellTrials, method: str, status: str) -> Optimum:
    """The best trial, with nothing known about how near the optimum it is."""
    best = int(trials.loss.argmin())
    return Optimum(
        cell=trials.name,
        learning_rate=float(trials.learning_rate[best]),
        batch_tokens=float(trials.batch_tokens[best]),
        loss=float(trials.loss[best]),
        covariance=np.full((2, 2), np.nan),
        loss_se=float("nan"),
        status=status,
        method=method,
        n_trials=len(trials.loss),
    )


# ---------------------------------------------------------------------- one cell alone


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
    return replace(optimum, status=edge) if edge and optimum.status != FLAT else optimum


def quadratic(trials: CellTrials) -> Optimum:
    """A convex quadratic in the logs, held together by a weak prior where trials are few."""
    point, log_loss = log_trials(trials)
    if _too_few(point, log_loss, 3):
        return best_trial(trials, "quadratic", TOO_FEW)
    low, high = searched_range(trials)
    parabola = _fit_parabola(point, log_loss, noise=NOISE)
    free = high > low
    where = parabola.minimum_within(low, high)
    return optimum_at(
        trials,
        "quadratic",
        where,
        parabola.value(where),
        parabola.optimum_covariance,
        parabola.value_sd,
        unclipped=np.where(free, parabola.optimum, where),
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


# Prior of the curvature of ln loss at the optimum, per nat squared, in (lr lr, batch batch, lr
# batch), and of the slope at the best trial. Medians over the public dense Step Law grids are
# .014, .014, -.005; the widths let any cell with a handful of trials speak for itself.
CURVATURE_MEAN = np.array([0.014, 0.014, -0.005])
CURVATURE_SD = np.array([0.02, 0.02, 0.01])
SLOPE_SD = 0.02
MIN_CURVATURE = 5e-4
"""Eigenvalues of the Hessian are kept above this: a parabola has a bottom."""

# A quadratic holds near the optimum only: a trial whose ln loss lies `gap` above the best one
# counts as if it had a noise of this share of the gap.
MISFIT = 1.0


@dataclass(frozen=True)
class _Parabola:
    """ln loss = floor + slope x + x H x / 2, with x = point - origin."""

    origin: np.ndarray  # [2]
    floor: float
    slope: np.ndarray  # [2]
    hessian: np.ndarray  # [2, 2], positive definite
    covariance: np.ndarray  # [6, 6] of (floor, slope, H00, H11, H01)

    @property
    def optimum(self) -> np.ndarray:
        """The unconstrained minimum, as (ln learning rate, ln batch)."""
        return self.origin - np.linalg.solve(self.hessian, self.slope)

    @property
    def optimum_covariance(self) -> np.ndarray:
        """Of the unconstrained minimum, by the delta method."""
        x = self.optimum - self.origin
        inverse = np.linalg.inv(self.hessian)
        # d x = -H^-1 (d slope + dH x)
        by_hessian = np.array([[x[0], 0.0, x[1]], [0.0, x[1], x[0]]])
        jacobian = -inverse @ np.hstack([np.zeros((2, 1)), np.eye(2), by_hessian])
        return jacobian @ self.covariance @ jacobian.T

    @property
    def value_sd(self) -> float:
        """Of ln loss at the minimum."""
        x = self.optimum - self.origin
        gradient = _features(x[None])[0]
        return float(np.sqrt(gradient @ self.covariance @ gradient))

    def value(self, point: np.ndarray) -> float:
        """ln loss at one point [2]."""
        x = point - self.origin
        return float(self.floor + self.slope @ x + x @ self.hessian @ x / 2)

    def minimum_within(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The least point of the box [low, high]: the minimum, or the least on the four sides."""
        best = self.optimum
        if ((best >= low) & (best <= high)).all():
            return best
        candidates = []
        for k, j in ((0, 1), (1, 0)):
            for side in (low[k], high[k]):
                point = np.empty(2)
                point[k] = side
                along = self.slope[j] + self.hessian[j, k] * (side - self.origin[k])
                free = self.origin[j] - along / self.hessian[j, j]
                point[j] = np.clip(free, low[j], high[j])
                candidates.append(point)
        return min(candidates, key=self.value)


def _fit_parabola(point: np.ndarray, log_loss: np.ndarray, noise: float) -> _Parabola:
    """Fit a parabola to trials: `point` [n, 2] in logs, `log_loss` [n], any n of at least 1.

    Bayesian least squares: the noise of a trial grows with its gap, so that trials far up the walls
    say little about the bottom; the residuals rescale the covariance, weakly at small n. A
    direction in which the data want no positive curvature gets `MIN_CURVATURE` and the slope is
    fitted again.
    """
    best = int(log_loss.argmin())
    origin, floor = point[best], float(log_loss[best])
    x = _features(point - origin)
    y = log_loss - floor
    weight = 1 / (noise + MISFIT * y) ** 2
    mean = np.concatenate([np.zeros(3), CURVATURE_MEAN])
    precision = np.concatenate([[1.0], np.full(2, SLOPE_SD**-2), CURVATURE_SD**-2])
    normal = (x.T * weight) @ x + np.diag(precision)
    theta = np.linalg.solve(normal, (x.T * weight) @ y + precision * mean)
    hessian = np.array([[theta[3], theta[5]], [theta[5], theta[4]]])
    values, vectors = np.linalg.eigh(hessian)
    if values[0] < MIN_CURVATURE:
        hessian = (vectors * np.maximum(values, MIN_CURVATURE)) @ vectors.T
        fixed = np.array([hessian[0, 0], hessian[1, 1], hessian[0, 1]])
        rest = y - x[:, 3:] @ fixed
        part = (x[:, :3].T * weight) @ x[:, :3] + np.diag(precision[:3])
        theta = np.concatenate([np.linalg.solve(part, (x[:, :3].T * weight) @ rest), fixed])
    residual = weight * (y - x @ theta) ** 2
    used = float(np.einsum("ij,ji->", np.linalg.inv(normal), (x.T * weight) @ x))
    scale = (residual.sum() + 4) / (
        max(len(y) - used, 0) + 4
    )  # as if 4 residuals of the stated size
    return _Parabola(origin, floor + theta[0], theta[1:3], hessian, np.linalg.inv(normal) * scale)


def _features(x: np.ndarray) -> np.ndarray:
    """[n, 2] -> [n, 6]: 1, u, v, u^2/2, v^2/2, uv."""
    u, v = x[:, 0], x[:, 1]
    return np.stack([np.ones_like(u), u, v, u * u / 2, v * v / 2, u * v], axis=1)


# ---------------------------------------------------------------------- all ways together


MIN_TRIALS = 4
"""Fewer trials than this and a cell's optimum by the model is mostly that of the other cells."""


def by_model(surface: Surface, trials: CellTrials) -> Optimum:
    """The model's: each cell borrows the valley's shape and the law from the others."""
    posterior = surface.optimum(trials.name)
    low, high = searched_range(trials)
    optimum = optimum_at(
        trials,
        "model",
        np.clip(posterior.mean, low, high),
        posterior.log_loss,
        posterior.covariance,
        posterior.log_loss_sd,
        unclipped=posterior.mean,
    )
    return replace(optimum, status=TOO_FEW) if len(trials.loss) < MIN_TRIALS else optimum


@dataclass(frozen=True)
class Reading:
    """A way to read an optimum off one cell's trials alone."""

    summary: str
    source: str
    find: Callable[[CellTrials], Optimum]


READINGS: dict[str, Reading] = {
    "quadratic": Reading(
        "convex quadratic in ln lr and ln batch",
        "as Bjorck 2409.19913 and Marin, robust",
        quadratic,
    ),
    "mean_within": Reading(
        "geometric mean of the settings within 0.25 % of the best",
        "DeepSeek LLM 2401.02954, Step Law 2503.04715, Ling 2507.17702",
        mean_within,
    ),
    "argmin": Reading("the best trial", "", argmin),
}
"""Checks of the model, by name; none of them answers."""


def all_readings(surface: Surface, cells: Sequence[CellTrials]) -> dict[str, dict[str, Optimum]]:
    """The optimum of each cell by the model, then by every reading: [way][cell]."""
    found = {"model": {t.name: by_model(surface, t) for t in cells}}
    for name, reading in READINGS.items():
        found[name] = {t.name: reading.find(t) for t in cells}
    return found


def readings_table(
    optima: Mapping[str, Mapping[str, Optimum]], sizes: pd.DataFrame
) -> pd.DataFrame:
    """One row a way of reading: over how many interior cells, how far from the model, what law.

    `sizes` holds `params_active_non_embedding` and `tokens` by cell. Columns: `interior` cells; the
    median |ln| difference from the model of `learning_rate` and `batch_tokens`, over cells that are
    interior by both; and the exponents in N and D of a least-squares power law through its interior
    optima (`learning_rate_params`, ...), NaN where the cells do not tell them apart.
    """
    rows = []
    for way, found in optima.items():
        interior = [n for n, o in found.items() if o.interior]
        both = [n for n in interior if optima["model"][n].interior]
        point = {n: np.log([found[n].learning_rate, found[n].batch_tokens]) for n in interior}
        off = [np.abs(point[n] - _logs(optima["model"][n])) for n in both]
        median = np.median(off, axis=0) if off else np.full(2, np.nan)
        exponents = np.full((2, 2), np.nan)
        if len(interior) > 3:
            n, d = np.log(
                sizes.loc[interior, ["params_active_non_embedding", "tokens"]].to_numpy(float)
            ).T
            design = np.column_stack([np.ones(len(n)), n, d])
            if np.linalg.svd(design - design.mean(0) * [0, 1, 1])[1][-1] > 0.3:
                law = np.linalg.lstsq(design, np.array([point[c] for c in interior]), rcond=None)[0]
                exponents = law[1:].T
        rows.append(
            {
                "reading": way,
                "interior": len(interior),
                "learning_rate": median[0],
                "batch_tokens": median[1],
                "learning_rate_params": exponents[0, 0],
                "learning_rate_tokens": exponents[0, 1],
                "batch_tokens_params": exponents[1, 0],
                "batch_tokens_tokens": exponents[1, 1],
            }
        )
    return pd.DataFrame(rows).set_index("reading")


def _logs(optimum: Optimum) -> np.ndarray:
    return np.log([optimum.learning_rate, optimum.batch_tokens])
