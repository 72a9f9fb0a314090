"""The mode and Laplace covariance of the surface model: damped Gauss-Newton with learned widths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from raysweep.scaling.surface_features import Covariates
from raysweep.scaling.surface_shape import DIRECTIONS, gap_derivatives

_TERMS = len(DIRECTIONS)


@dataclass(frozen=True)
class SurfaceSettings:
    """Prior widths and constants of the surface model. Logs are natural; widths are standard deviations.

    The widths marked "guess" are learned from the data: the guess counts as `guess_weight` observations.
    """

    law_intercept: float = (
        1.2  # of the optimum's (ln lr, ln batch) about the published law, mid-ladder
    )
    law_exponent: float = 0.3  # of each exponent about the published law's
    law_family: float = 0.3  # offset of an MoE family
    log_weight: float = 1.5  # of each ln weight of the valley's terms
    log_weight_mean: float = math.log(0.003)
    scale_slope: float = 0.15  # of the valley's ln depth per nat of parameters or tokens
    level_intercept: float = 3.0  # of ln loss
    level_slope: float = 0.3
    shift_guess: float = 0.1  # random effect of a cell on its optimum, in ln lr and ln batch
    level_guess: float = 0.03  # random effect of a cell on its ln loss
    noise_guess: float = 0.002  # sd of ln loss at the optimum
    growth_guess: float = 0.2  # noise sd per unit of gap
    guess_weight: float = 2.0
    far: float = 0.1  # a gap beyond this carries no more than "at least this far"
    roughness_length: float = 0.25  # runs closer than this, in ln units, share their luck
    roughness_share: float = 0.5  # of a run's deviation: what would recur at the same point
    student: float = 6.0  # degrees of freedom of the noise: outliers weigh less

    def scaled(self, factor: float) -> SurfaceSettings:
        """Every prior width and guess times `factor`: to see how much the answers lean on them."""
        from dataclasses import replace

        widths = (
            "law_intercept",
            "law_exponent",
            "law_family",
            "log_weight",
            "scale_slope",
            "level_intercept",
            "level_slope",
            "shift_guess",
            "level_guess",
            "noise_guess",
            "growth_guess",
        )
        return replace(self, **{name: getattr(self, name) * factor for name in widths})


@dataclass(frozen=True)
class Observations:
    """Trials as arrays of equal length: cell index, (ln lr, ln batch tokens), ln loss, and kind."""

    cell: np.ndarray  # [n] int
    point: np.ndarray  # [n, 2]
    log_loss: np.ndarray  # [n]; unused where `diverged`
    diverged: np.ndarray  # [n] bool: only "the gap is large here" is known
    variance: np.ndarray  # [n]: known variance of ln loss, added to the learned noise


@dataclass(frozen=True)
class Layout:
    """Where each block lies in the vector of parameters."""

    covariates: int
    cells: int

    def _at(self, block: int) -> slice:
        k, c = self.covariates, self.cells
        widths = (k, k, _TERMS, 2, k, c, c, c)
        start = sum(widths[:block])
        return slice(start, start + widths[block])

    @property
    def law(self) -> tuple[slice, slice]:
        return self._at(0), self._at(1)

    @property
    def log_weights(self) -> slice:
        return self._at(2)

    @property
    def scale(self) -> slice:
        return self._at(3)

    @property
    def level_law(self) -> slice:
        return self._at(4)

    @property
    def level(self) -> slice:
        return self._at(5)

    @property
    def shift(self) -> tuple[slice, slice]:
        return self._at(6), self._at(7)

    @property
    def size(self) -> int:
        return self._at(7).stop


@dataclass
class Hyper:
    """The learned widths."""

    level: float
    shift: np.ndarray  # [2]
    noise: float
    growth: float


@dataclass(frozen=True)
class Mode:
    """The fitted parameters: mode, covariance, learned widths, and whether the search settled."""

    theta: np.ndarray
    covariance: np.ndarray
    hyper: Hyper
    converged: bool
    variance: np.ndarray  # [n] noise variance of each observation


def prior_of(
    layout: Layout, covariates: Covariates, settings: SurfaceSettings, hyper: Hyper, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every parameter."""
    mean, sd = np.zeros(layout.size), np.ones(layout.size)
    names = covariates.names
    slopes = [
        settings.law_family if name.startswith("experts") else settings.law_exponent
        for name in names
    ]
    for block in layout.law:
        sd[block] = [settings.law_intercept, *slopes]
    mean[layout.log_weights], sd[layout.log_weights] = settings.log_weight_mean, settings.log_weight
    sd[layout.scale] = settings.scale_slope
    mean[layout.level_law.start] = level
    sd[layout.level_law] = [settings.level_intercept, *[settings.level_slope] * len(names)]
    sd[layout.level] = hyper.level
    for block, width in zip(layout.shift, hyper.shift, strict=True):
        sd[block] = width
    return mean, sd


def predict_rows(
    theta: np.ndarray,
    layout: Layout,
    law_prior: np.ndarray,
    design: np.ndarray,
    cell: np.ndarray,
    point: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln loss, gap, and the Jacobian of ln loss at points [n, 2] of cells [n]."""
    z = design[cell]
    rows = np.arange(len(cell))
    optimum = law_prior[cell] + np.column_stack(
        [
            z @ theta[law] + theta[shift][cell]
            for law, shift in zip(layout.law, layout.shift, strict=True)
        ]
    )
    u, v = (point - optimum).T
    value, by_point, by_weight = gap_derivatives(u, v, theta[layout.log_weights])
    scale = np.exp(z[:, 1:3] @ theta[layout.scale])
    value, by_point, by_weight = (
        value * scale,
        by_point * scale[:, None],
        by_weight * scale[:, None],
    )
    jacobian = np.zeros((len(cell), layout.size))
    for axis in range(2):
        jacobian[:, layout.law[axis]] = -by_point[:, axis, None] * z
        jacobian[rows, layout.shift[axis].start + cell] = -by_point[:, axis]
    jacobian[:, layout.log_weights] = by_weight
    jacobian[:, layout.scale] = value[:, None] * z[:, 1:3]
    level = z @ theta[layout.level_law] + theta[layout.level][cell]
    jacobian[:, layout.level_law] = z
    jacobian[rows, layout.level.start + cell] = 1.0
    return level + value, value, jacobian


def fit_mode(
    observed: Observations,
    design: np.ndarray,
    law_prior: np.ndarray,
    covariates: Covariates,
    settings: SurfaceSettings,
    iterations: int = 40,
) -> Mode:
    """The mode by damped Gauss-Newton, the widths re-estimated at each step."""
    layout = Layout(design.shape[1], design.shape[0])
    guess = settings.shift_guess
    hyper = Hyper(
        settings.level_guess, np.array([guess, guess]), settings.noise_guess, settings.growth_guess
    )
    finished = ~observed.diverged
    level = float(observed.log_loss[finished].min()) if finished.any() else 0.0
    lowest = np.full(layout.cells, np.inf)
    np.minimum.at(lowest, observed.cell[finished], observed.log_loss[finished])
    # A finished run far above its cell's best tells what a diverged one does.
    far = observed.diverged | (observed.log_loss > lowest[observed.cell] + settings.far)
    theta, _ = prior_of(layout, covariates, settings, hyper, level)
    damping, converged = 1e-2, False
    covariance = np.empty(0)
    variance = np.empty(0)
    repeats = _repeats(observed, settings.roughness_length)
    for _ in range(iterations):
        mean, sd = prior_of(layout, covariates, settings, hyper, level)

        def residuals(at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            predicted, value, jacobian = predict_rows(
                at, layout, law_prior, design, observed.cell, observed.point
            )
            residual = np.where(far, 0.0, observed.log_loss - predicted)
            if far.any():
                jacobian[far, layout.level_law] = 0.0
                jacobian[far, layout.level] = 0.0
                short = far & (value < settings.far)
                residual[short] = settings.far - value[short]
                jacobian[far & ~short] = 0.0
            return residual, value, jacobian

        residual, value, jacobian = residuals(theta)
        variance = hyper.noise**2 + (hyper.growth * np.where(far, settings.far, value)) ** 2
        variance = repeats * (variance + observed.variance)
        weight = (settings.student + 1) / (settings.student + residual**2 / variance) / variance

        def objective(at: np.ndarray, residual: np.ndarray) -> float:
            return 0.5 * float(weight @ residual**2 + (((at - mean) / sd) ** 2).sum())

        gradient = jacobian.T @ (weight * residual) - (theta - mean) / sd**2
        precision = (jacobian * weight[:, None]).T @ jacobian
        diagonal = precision.diagonal() + sd**-2
        np.fill_diagonal(precision, diagonal)
        now = objective(theta, residual)
        step = np.zeros(layout.size)
        for _ in range(8):
            damped = precision.copy()
            np.fill_diagonal(damped, diagonal * (1 + damping))
            step = linalg.cho_solve(linalg.cho_factor(damped), gradient)
            if objective(theta + step, residuals(theta + step)[0]) <= now:
                damping = max(damping / 10, 1e-8)
                break
            damping *= 10
            step = np.zeros(layout.size)
        theta = theta + step
        covariance = linalg.cho_solve(linalg.cho_factor(precision), np.eye(layout.size))
        before = np.array([hyper.level, *hyper.shift, hyper.noise, hyper.growth])
        residual, value, jacobian = residuals(theta)
        hyper = _learn(
            hyper, settings, layout, theta, covariance, residual, value, jacobian, ~far, observed
        )
        after = np.array([hyper.level, *hyper.shift, hyper.noise, hyper.growth])
        moved = np.abs(step) / np.sqrt(covariance.diagonal())
        if moved.max() < 0.02 and np.abs(np.log(after / before)).max() < 0.02:
            converged = True
            break
    return Mode(theta, covariance, hyper, converged, variance)


def _repeats(observed: Observations, length: float) -> np.ndarray:
    """[n], how many runs of its cell each run shares its luck with, itself counted."""
    repeats = np.ones(len(observed.cell))
    for cell in np.unique(observed.cell):
        rows = np.flatnonzero(observed.cell == cell)
        square = ((observed.point[rows, None] - observed.point[rows]) ** 2).sum(-1)
        repeats[rows] = np.exp(-0.5 * square / length**2).sum(1)
    return repeats


def _learn(
    hyper: Hyper,
    settings: SurfaceSettings,
    layout: Layout,
    theta: np.ndarray,
    covariance: np.ndarray,
    residual: np.ndarray,
    value: np.ndarray,
    jacobian: np.ndarray,
    near: np.ndarray,
    observed: Observations,
) -> Hyper:
    """One step towards the widths of highest marginal likelihood (MacKay 1992 for the random effects)."""
    spread = covariance.diagonal()

    def width(block: slice, sd: float, guess: float) -> float:
        known = np.clip(1 - spread[block] / sd**2, 0.0, 1.0).sum()  # effects the data determine
        total = (theta[block] ** 2).sum() + settings.guess_weight * guess**2
        return math.sqrt(total / (settings.guess_weight + known))

    shift = np.array(
        [
            width(block, sd, settings.shift_guess)
            for block, sd in zip(layout.shift, hyper.shift, strict=True)
        ]
    )
    level = width(layout.level, hyper.level, settings.level_guess)
    noise, growth = hyper.noise, hyper.growth
    if near.any():
        rows = jacobian[near]
        square = residual[near] ** 2 + np.einsum("ij,ij->i", rows @ covariance, rows)
        noise, growth = _learn_noise(square, value[near], observed.variance[near], settings)
    return Hyper(level, shift, noise, growth)


def _learn_noise(
    square: np.ndarray, value: np.ndarray, known: np.ndarray, settings: SurfaceSettings
) -> tuple[float, float]:
    """(floor, growth) of highest likelihood of the expected squared residuals, by a grid refined twice."""
    centre = np.log([settings.noise_guess, settings.growth_guess])
    span = np.array([3.0, 2.0])
    best = centre
    for _ in range(3):
        axes = [np.linspace(c - s, c + s, 7) for c, s in zip(best, span, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
        variance = np.exp(2 * grid[:, :1]) + np.exp(2 * grid[:, 1:]) * value**2 + known
        cost = 0.5 * (np.log(variance) + square / variance).sum(1)
        cost += settings.guess_weight * 0.5 * ((grid - centre) ** 2).sum(1)
        best = grid[cost.argmin()]
        span = span / 3
    return float(np.exp(best[0])), float(np.exp(best[1]))
