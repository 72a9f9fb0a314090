"""The optimum of a cell: where in (learning rate, batch) its loss is least, by named methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raysweep.errors import UserError
from raysweep.scaling.cells import CellTrials
from raysweep.scaling.quadratic import Valley, fit_valley
from raysweep.scaling.surface import fit_surface
from raysweep.scaling.unpooled import unpooled_optimum

INTERIOR, FLAT, TOO_FEW = "interior", "flat", "too few trials"

NOISE = 0.0005
"""Least sd of ln loss between runs that differ by their seed only, where a cell cannot tell."""

SURFACE_TRIALS = 4
"""Fewer trials than this and a cell's optimum on the surface is mostly that of the other cells."""

SURFACE_WITHIN, SURFACE_AT_LEAST = 0.01, 12
"""The surface is fitted to the trials within this share of their cell's best loss, but at least
so many a cell. On the public dense grids, whole grids give a law whose mean gap is twice as
large."""

DRAWS = 64
"""Resamples of the trial noise behind the covariance of the methods that have no formula for it."""


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where one cell's loss is least.

    `covariance` [2, 2] is that of (ln learning_rate, ln batch_tokens), NaN where the trials do not
    identify it. `own` [2] and `own_covariance` [2, 2], in the same logs, are what the cell's own
    trials say of its place, for laws over cells: where cells borrow from each other's law, the
    optimum leans on that law, and a law fitted to such optima would confirm itself. `status` is
    `interior`, `flat`, `too few trials`, or `edge: ` with the sides, as in
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
    own: np.ndarray
    own_covariance: np.ndarray

    @property
    def interior(self) -> bool:
        return self.status == INTERIOR

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "cell": self.cell,
            "learning_rate": self.learning_rate,
            "batch_tokens": self.batch_tokens,
            "loss": self.loss,
            "loss_se": self.loss_se,
            "covariance": self.covariance.tolist(),
            "status": self.status,
            "method": self.method,
            "n_trials": self.n_trials,
        }


@dataclass(frozen=True)
class OptimumMethod:
    """A way to read optima off trials: all cells in, one optimum a cell out, in their order."""

    name: str
    summary: str
    source: str
    find: Callable[[Sequence[CellTrials]], list[Optimum]]


def find_optima(cells: Sequence[CellTrials], method: str = "surface") -> list[Optimum]:
    """The optimum of each cell by a method of `OPTIMUM_METHODS`. UserError for an unknown name."""
    if method not in OPTIMUM_METHODS:
        known = ", ".join(OPTIMUM_METHODS)
        raise UserError(f"unknown optimum method {method!r}; known: {known}")
    return OPTIMUM_METHODS[method].find(cells) if cells else []


# --- one cell at a time ------------------------------------------------------------------------


def argmin(trials: CellTrials) -> Optimum:
    """The best trial. Its covariance adds the step between neighbouring settings to the noise."""
    point, log_loss = _logs(trials)
    if _too_few(point, log_loss, 3):
        return _best_trial(trials, "argmin", TOO_FEW)
    noisy = _resample(point, log_loss)
    chosen = point[noisy.argmin(1)]
    steps = np.array([_typical_step(point[:, k]) for k in range(2)])
    covariance = np.cov(chosen.T) + np.diag(steps**2 / 12)
    best = int(log_loss.argmin())
    return _result(trials, "argmin", point[best], log_loss[best], covariance, noisy.min(1).std())


def mean_within(trials: CellTrials, tolerance: float = 0.0025) -> Optimum:
    """The geometric mean of the settings whose loss is within `tolerance` of the best.

    As DeepSeek LLM (2401.02954), Step Law (2503.04715) and Ling (2507.17702) read their optima."""
    point, log_loss = _logs(trials)
    if _too_few(point, log_loss, 3):
        return _best_trial(trials, "mean_within", TOO_FEW)
    good = np.log1p(tolerance)

    def means(losses: np.ndarray) -> np.ndarray:  # [draws, n] -> [draws, 2]
        near = losses <= losses.min(1, keepdims=True) + good
        return (near @ point) / near.sum(1, keepdims=True)

    noisy = _resample(point, log_loss)
    steps = np.array([_typical_step(point[:, k]) for k in range(2)])
    near = log_loss <= log_loss.min() + good
    covariance = np.cov(means(noisy).T) + np.diag(steps**2 / 12) / near.sum()
    optimum = _result(
        trials,
        "mean_within",
        means(log_loss[None])[0],
        float(log_loss.min()),
        covariance,
        noisy.min(1).std(),
    )
    # A mean lies inside; the best trial tells whether the grid ended too early.
    edge = _edges(point[log_loss.argmin()], *_box(trials))
    return replace(optimum, status=edge or INTERIOR) if optimum.status != FLAT else optimum


def interpolate(trials: CellTrials) -> Optimum:
    """Interpolation in ln lr at each batch, then in ln batch (Porian 2406.19146).

    Needs three batches with three learning rates each."""
    from scipy.interpolate import Akima1DInterpolator

    point, log_loss = _logs(trials)
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
        return _best_trial(trials, "interpolate", TOO_FEW)
    b = np.array(batches)
    where, low = minima(b, np.stack(lows))
    rate = np.array([np.interp(w, b, r) for w, r in zip(where, np.stack(rates).T, strict=True)])
    found = np.column_stack([rate, where])
    return _result(
        trials, "interpolate", found[0], low[0], np.cov(found[1:].T), float(low[1:].std())
    )


def quadratic(trials: CellTrials) -> Optimum:
    """A convex quadratic in the logs, held together by a weak prior where trials are few."""
    point, log_loss = _logs(trials)
    if _too_few(point, log_loss, 3):
        return _best_trial(trials, "quadratic", TOO_FEW)
    low, high = _box(trials)
    valley: Valley = fit_valley(point, log_loss, noise=NOISE)
    free = high > low
    where = valley.minimum_within(low, high)
    return _result(
        trials,
        "quadratic",
        where,
        valley.value(where),
        valley.optimum_covariance,
        valley.value_sd,
        unclipped=np.where(free, valley.optimum, where),
    )


# --- all cells at once -------------------------------------------------------------------------


def surface(cells: Sequence[CellTrials]) -> list[Optimum]:
    """The joint surface: each cell borrows the valley's shape and the law from the others."""
    near = [_near(trials) for trials in cells]
    sizes = [int(n.sum()) + len(t.failed_learning_rate) for n, t in zip(near, cells, strict=True)]
    pairs = list(zip(near, cells, strict=True))
    fitted = fit_surface(
        [trials.features for trials in cells],
        np.repeat(np.arange(len(cells)), sizes),
        np.concatenate([np.r_[t.learning_rate[n], t.failed_learning_rate] for n, t in pairs]),
        np.concatenate([np.r_[t.batch_tokens[n], t.failed_batch_tokens] for n, t in pairs]),
        np.concatenate(
            [np.r_[t.loss[n], np.full_like(t.failed_learning_rate, np.nan)] for n, t in pairs]
        ),
    )
    optima = []
    for trials in cells:
        posterior = fitted.optimum(trials.name)
        low, high = _box(trials)
        optimum = _result(
            trials,
            "surface",
            np.clip(posterior.mean, low, high),
            posterior.log_loss,
            posterior.covariance,
            posterior.log_loss_sd,
            unclipped=posterior.mean,
        )
        own, own_covariance = unpooled_optimum(fitted, trials.name)
        few = len(trials.loss) < SURFACE_TRIALS
        optima.append(
            replace(
                optimum,
                status=TOO_FEW if few else optimum.status,
                own=own,
                own_covariance=np.where(np.isnan(optimum.covariance), np.nan, own_covariance),
            )
        )
    return optima


def _near(trials: CellTrials) -> np.ndarray:
    """[n] bool: the trials near the bottom; far up the walls a valley tells little of it."""
    enough = np.sort(trials.loss)[:SURFACE_AT_LEAST][-1]
    return trials.loss <= max(enough, trials.loss.min() * (1 + SURFACE_WITHIN))


def _each(find: Callable[[CellTrials], Optimum]) -> Callable[[Sequence[CellTrials]], list[Optimum]]:
    return lambda cells: [find(trials) for trials in cells]


OPTIMUM_METHODS: dict[str, OptimumMethod] = {
    m.name: m
    for m in (
        OptimumMethod("surface", "joint surface model of all cells", "raysweep", surface),
        OptimumMethod(
            "quadratic",
            "convex quadratic in ln lr and ln batch",
            "as Bjorck 2409.19913 and Marin, robust",
            _each(quadratic),
        ),
        OptimumMethod(
            "interpolate",
            "Akima interpolation in ln lr, then ln batch",
            "Porian 2406.19146",
            _each(interpolate),
        ),
        OptimumMethod(
            "mean_within",
            "geometric mean of the settings within 0.25 % of the best",
            "DeepSeek LLM 2401.02954, Step Law 2503.04715, Ling 2507.17702",
            _each(mean_within),
        ),
        OptimumMethod("argmin", "the best trial", "", _each(argmin)),
    )
}
"""By name; the first is the default."""


# --- shared ------------------------------------------------------------------------------------


def _logs(trials: CellTrials) -> tuple[np.ndarray, np.ndarray]:
    """(ln learning rate, ln batch) [n, 2] and ln loss [n]."""
    point = np.column_stack([np.log(trials.learning_rate), np.log(trials.batch_tokens)])
    return point, np.log(trials.loss)


def _box(trials: CellTrials) -> tuple[np.ndarray, np.ndarray]:
    """The searched range in logs; a diverged trial bounds it as well as a finished one."""
    rate = np.concatenate([trials.learning_rate, trials.failed_learning_rate])
    batch = np.concatenate([trials.batch_tokens, trials.failed_batch_tokens])
    return (
        np.log([rate.min(), batch.min()]),
        np.log([rate.max(), batch.max()]),
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


def _edges(where: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
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


def _result(
    trials: CellTrials,
    method: str,
    where: np.ndarray,
    log_loss: float,
    covariance: np.ndarray,
    log_loss_sd: float,
    unclipped: np.ndarray | None = None,
) -> Optimum:
    """An optimum with its status: flat before edge before interior."""
    low, high = _box(trials)
    edge = _edges(where if unclipped is None else unclipped, low, high)
    width = high - low
    searched = width > 0
    covariance = np.array(covariance, dtype=float)
    sd = np.sqrt(np.diag(covariance))
    blind = bool((sd[searched] > width[searched] / 2).all()) if searched.any() else True
    same = float(np.ptp(np.log(trials.loss))) < 1e-9
    status = FLAT if same or blind else edge or INTERIOR
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
        own=np.array(where, dtype=float),
        own_covariance=covariance,
    )


def _best_trial(trials: CellTrials, method: str, status: str) -> Optimum:
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
        own=np.log([trials.learning_rate[best], trials.batch_tokens[best]]),
        own_covariance=np.full((2, 2), np.nan),
    )
