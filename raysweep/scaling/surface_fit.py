"""The mode and Laplace covariance of the surface model: damped Gauss-Newton with learned widths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from raysweep.scaling.surface_arrow import ArrowInverse, Grouping, damped, invert, solve
from raysweep.scaling.surface_features import Covariates
from raysweep.scaling.surface_parameters import (
    Layout,
    Observations,
    SurfaceSettings,
    predict_rows,
    prior_of,
)
from raysweep.scaling.surface_shape import TERMS

_ITERATIONS = 30
_SETTLED = 0.1  # posterior sds that the last step may still move
_LEARNED = 0.03  # relative change of learned widths that it may still make


@dataclass(frozen=True)
class Widths:
    """What is learned about spread: of the cells' own effects, and of a run's noise."""

    own: np.ndarray  # [3]: sd of a cell's level, shift in ln lr, shift in ln batch
    known: np.ndarray  # [3]: how many effects, the guess's weight included, each is learned from
    noise: float
    growth: float

    def change(self, other: Widths) -> float:
        """The largest relative change between two."""
        both = [np.array([*w.own, w.noise, w.growth]) for w in (self, other)]
        return float(np.abs(np.log(both[0] / both[1])).max())


@dataclass(frozen=True)
class Mode:
    """The fitted parameters, their covariance, the learned widths, and if the search settled."""

    shared: np.ndarray  # [S]
    own: np.ndarray  # [C, 3]
    covariance: ArrowInverse
    widths: Widths
    converged: bool


@dataclass(frozen=True)
class _Point:
    """The model at some parameters: what the trials leave unexplained, and how that would change.

    Of a trial that is only known to be far, the residual is what it lacks in distance.
    """

    shared: np.ndarray  # [S]
    own: np.ndarray  # [C, 3]
    residual: np.ndarray  # [n]
    gap: np.ndarray  # [n]
    by_shared: np.ndarray  # [n, S]
    by_own: np.ndarray  # [n, 3]


class _Problem:
    """One fit's data and prior."""

    def __init__(
        self,
        observed: Observations,
        far: np.ndarray,
        covariates: Covariates,
        design: np.ndarray,
        law_prior: np.ndarray,
        settings: SurfaceSettings,
    ) -> None:
        self.observed, self.far, self.settings = observed, far, settings
        self.near = ~far
        self.layout = Layout(design.shape[1])
        self.trials_of = Grouping(observed.cell, len(design))
        self.regressors = design[observed.cell]
        self.offset = observed.point - law_prior[observed.cell]
        level = float(observed.log_loss[self.near].mean()) if self.near.any() else 0.0
        self.mean, self.sd = prior_of(covariates, settings, level)
        self.repeats = _repeats(observed, settings.roughness_length)

    def at(self, shared: np.ndarray, own: np.ndarray) -> _Point:
        """The model at these parameters."""
        observed, settings = self.observed, self.settings
        lost, high = observed.diverged, self.far & ~observed.diverged
        each = own[observed.cell]
        predicted, gap, by_shared, by_own = predict_rows(shared, each, self.regressors, self.offset)
        residual = observed.log_loss - predicted
        if high.any():
            residual[high] = np.maximum(settings.far - gap[high], 0)
            by_shared[high, self.layout.level] = 0.0
            by_own[high, 0] = 0.0
        if lost.any():
            rows, law = self.regressors[lost], self.layout.law[0]
            above = self.offset[lost, 0] - rows @ shared[law] - each[lost, 1]
            residual[lost] = np.maximum(settings.diverged_distance - above, 0)
            by_shared[lost] = 0.0
            by_shared[lost, law] = -rows
            by_own[lost] = [0.0, -1.0, 0.0]
        enough = self.far & (residual <= 0)
        by_shared[enough] = 0.0
        by_own[enough] = 0.0
        return _Point(shared, own, residual, gap, by_shared, by_own)

    def noise_gap(self, point: _Point) -> np.ndarray:
        """[n], the gap that the noise of each trial goes by."""
        return np.where(self.far, self.settings.far, point.gap)

    def variance(self, widths: Widths, gaps: np.ndarray) -> np.ndarray:
        """[n], squared scale of each residual."""
        noise = widths.noise**2 + (widths.growth * gaps) ** 2 + self.observed.variance
        diverged = self.settings.diverged_sd**2
        return np.where(self.observed.diverged, diverged, noise * self.repeats)

    def cost(self, point: _Point, widths: Widths, variance: np.ndarray) -> float:
        """Minus the log posterior, but for a constant; residuals are Student's t."""
        nu = self.settings.student
        misfit = (nu + 1) * np.log1p(point.residual**2 / (nu * variance)).sum()
        prior = (((point.shared - self.mean) / self.sd) ** 2).sum()
        return 0.5 * float(misfit + prior + ((point.own / widths.own) ** 2).sum())

    def normal_equations(
        self, point: _Point, widths: Widths, variance: np.ndarray
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, np.ndarray]]:
        """Blocks (head, cross, tail) of the precision, and the downhill gradient (shared, own)."""
        nu = self.settings.student
        weight = (nu + 1) / (nu + point.residual**2 / variance) / variance
        weighted = point.by_own * weight[:, None]
        head = (point.by_shared * weight[:, None]).T @ point.by_shared
        cross = self.trials_of.outer(point.by_shared, weighted)
        tail = self.trials_of.outer(point.by_own, weighted)
        head[np.diag_indices_from(head)] += self.sd**-2
        tail[:, range(3), range(3)] += widths.own**-2
        pull = point.by_shared.T @ (weight * point.residual)
        # Gauss-Newton leaves out second derivatives; that in a ln weight is known: keep what is
        # safe.
        terms = np.arange(TERMS) + self.layout.valley.start
        head[terms, terms] += np.maximum(-pull[terms], 0)
        shared = pull - (point.shared - self.mean) / self.sd**2
        own = self.trials_of.sum(weighted * point.residual[:, None]) - point.own / widths.own**2
        return (head, cross, tail), (shared, own)


def fit_mode(
    observed: Observations,
    far: np.ndarray,
    covariates: Covariates,
    design: np.ndarray,
    law_prior: np.ndarray,
    settings: SurfaceSettings,
) -> Mode:
    """The mode by damped Gauss-Newton, the widths re-estimated at each step.

    Args:
        observed: the trials.
        far: [n] bool, trials that diverged or tell no more than a gap above `settings.far`.
        covariates: the regressors' names.
        design: [cells, k], their values.
        law_prior: [cells, 2], the published law's optimum of each cell.
        settings: prior widths.
    """
    problem = _Problem(observed, far, covariates, design, law_prior, settings)
    guess = settings.shift_guess
    widths = Widths(
        own=np.array([settings.level_guess, guess, guess]),
        known=np.full(3, settings.guess_weight),
        noise=settings.noise_guess,
        growth=settings.growth_guess,
    )
    point = problem.at(problem.mean.copy(), np.zeros((len(design), 3)))
    gaps = problem.noise_gap(point)
    blocks, _ = problem.normal_equations(point, widths, problem.variance(widths, gaps))
    covariance, converged = invert(*blocks), False
    damping = 1e-2
    for _ in range(_ITERATIONS):
        # The noise follows the gap: half a step at a time, or mode and noise can chase each other.
        gaps = 0.5 * (gaps + problem.noise_gap(point))
        variance = problem.variance(widths, gaps)
        blocks, gradient = problem.normal_equations(point, widths, variance)
        before, start = widths, point
        point, damping = _step(problem, point, widths, variance, blocks, gradient, damping)
        covariance = invert(*blocks)
        widths = _learn(widths, problem, point, covariance)
        spread = np.sqrt(covariance.shared.diagonal()), np.sqrt(_diagonals(covariance.own))
        moved = max(
            float((np.abs(point.shared - start.shared) / spread[0]).max()),
            float((np.abs(point.own - start.own) / spread[1]).max()),
        )
        converged = moved < _SETTLED and widths.change(before) < _LEARNED
        if converged:
            break
    return Mode(point.shared, point.own, covariance, widths, converged)


def _step(
    problem: _Problem,
    point: _Point,
    widths: Widths,
    variance: np.ndarray,
    blocks: tuple[np.ndarray, ...],
    gradient: tuple[np.ndarray, np.ndarray],
    damping: float,
) -> tuple[_Point, float]:
    """The next point, damped until it is no worse, and the damping to begin with there."""
    head, cross, tail = blocks
    now = problem.cost(point, widths, variance)
    for _ in range(8):
        shared, own = solve(damped(head, damping), cross, damped(tail, damping), *gradient)
        tried = problem.at(point.shared + shared, point.own + own)
        if problem.cost(tried, widths, variance) <= now:
            return tried, max(damping / 10, 1e-8)
        damping *= 10
    return point, damping


def _diagonals(blocks: np.ndarray) -> np.ndarray:
    """[..., m, m] to [..., m]."""
    return np.einsum("...ii->...i", blocks)


def kinship(point: np.ndarray, length: float) -> np.ndarray:
    """[n, n], how far runs at points [n, 2] share their luck: 1 at the same place, 0 far off."""
    square = ((point[:, None] - point) ** 2).sum(-1)
    return np.exp(-0.5 * square / length**2)


def _repeats(observed: Observations, length: float) -> np.ndarray:
    """[n], how many runs of its cell each run shares its luck with, itself counted."""
    repeats = np.ones(len(observed.cell))
    for cell in np.unique(observed.cell):
        rows = np.flatnonzero(observed.cell == cell)
        repeats[rows] = kinship(observed.point[rows], length).sum(1)
    return repeats


def _learn(widths: Widths, problem: _Problem, point: _Point, covariance: ArrowInverse) -> Widths:
    """One step towards the widths of highest marginal likelihood.

    For the cells' own effects these are MacKay's updates (Neural Computation 4, 1992).
    """
    settings, observed, near = problem.settings, problem.observed, problem.near
    guess = np.array([settings.level_guess, settings.shift_guess, settings.shift_guess])
    # An effect that the data determine counts as one; one that they leave to its prior, as none.
    determined = np.clip(1 - _diagonals(covariance.own) / widths.own**2, 0.0, 1.0).sum(0)
    known = settings.guess_weight + determined
    total = settings.guess_weight * guess**2 + (point.own**2).sum(0)
    learned = replace(widths, own=np.sqrt(total / known), known=known)
    if not near.any():
        return learned
    cell, by_shared, by_own = observed.cell[near], point.by_shared[near], point.by_own[near]
    leverage = (
        ((by_shared @ covariance.shared) * by_shared).sum(1)
        + 2 * ((by_shared[:, None] @ covariance.cross[cell])[:, 0] * by_own).sum(1)
        + ((by_own[:, None] @ covariance.own[cell])[:, 0] * by_own).sum(1)
    )
    square = point.residual[near] ** 2 + leverage
    noise, growth = _learn_noise(widths, square, point.gap[near], observed.variance[near], settings)
    return replace(learned, noise=noise, growth=growth)


def _learn_noise(
    widths: Widths,
    square: np.ndarray,
    value: np.ndarray,
    known: np.ndarray,
    settings: SurfaceSettings,
) -> tuple[float, float]:
    """One Fisher-scoring step of the ln (floor, growth), given squared residuals of Student's t."""
    nu = settings.student
    now = np.log([widths.noise, widths.growth])
    parts = np.exp(2 * now) * np.column_stack([np.ones_like(value), value**2])
    variance = parts.sum(1) + known
    shares = parts / variance[:, None]
    excess = (nu + 1) * square / (nu * variance + square) - 1
    guess = np.log([settings.noise_guess, settings.growth_guess])
    slope = shares.T @ excess - settings.guess_weight * (now - guess)
    fisher = 2 * nu / (nu + 3) * shares.T @ shares + settings.guess_weight * np.eye(2)
    # Seven tenths of a step: whole ones can overshoot for ever.
    step = 0.7 * np.linalg.solve(fisher, slope)
    noise, growth = np.exp(now + np.clip(step, -1, 1))
    return float(noise), float(growth)
