"""The mode of the model and its Laplace covariance: damped Gauss-Newton from several starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from raysweep.scaling.optima.arrow import (
    BlockArrowCovariance,
    damped,
    invert,
    log_determinant,
    solve,
)
from raysweep.scaling.optima.model import (
    LEVEL_LAW,
    LINEAR,
    Point,
    Problem,
    Settings,
    VarianceComponents,
    level_terms,
    shape_bias,
)

_ITERATIONS = 60
_QUICK = 8  # iterations of every start, before the best go on
_SETTLED = 0.05  # posterior sds that the last step may still move
_LEARNED = 0.02  # relative change of learned widths that it may still make
_LAW_STEP, _LEVEL_STEP = 1.5, 0.7  # longest steps of laws and valley, and of the level
_START_SDS = 1.2  # how far along its widest axis the prior's intercept starts
_BIAS_CURVATURE = 2.0
_CLOSE = 8.0  # nats of evidence below the best from which a start is not followed further


@dataclass(frozen=True)
class MapEstimate:
    """The fitted parameters, their covariance, the learned widths, and if the search settled."""

    shared: np.ndarray  # [S]
    own: np.ndarray  # [C, 3]
    covariance: BlockArrowCovariance
    widths: VarianceComponents
    converged: bool
    evidence: float
    """ln of the marginal likelihood by Laplace's approximation, but for a constant."""


_LOST = 3.0
"""Evidence (nats) by which an early mode must beat the one that was climbed to."""


def fit_map(problem: Problem, warm: MapEstimate | None = None) -> MapEstimate:
    """The mode of highest evidence among those reached from several starts.

    The starts are the prior's mean, a ridge regression on the cells' best trials, and the prior
    moved along the widest axis of its intercepts: a level that misfits can be booked as distance
    from the optimum, in a mode of its own. With a `warm` estimate of nearly the same problem, its
    mode alone is followed.
    """
    own = np.zeros((len(problem.x), 3))
    if warm is not None and warm.shared.shape == problem.mean.shape:
        known = min(len(own), len(warm.own))
        own[:known] = warm.own[:known]
        widths = replace(warm.widths, known=problem.own_weight)
        return _climb(problem, warm.shared, own, widths, _ITERATIONS)
    widths = problem.first_widths()
    if not len(problem.observed.cell):
        return _climb(problem, problem.mean, own, widths, 1)
    quick = [_climb(problem, start, own, widths, _QUICK) for start in _starts(problem)]
    quick.sort(key=lambda found: -found.evidence)
    best = _climb(problem, quick[0].shared, quick[0].own, quick[0].widths, _ITERATIONS)
    for other in quick[1:]:
        same = np.abs(other.shared - best.shared) / np.sqrt(best.covariance.shared.diagonal())
        if other.evidence < quick[0].evidence - _CLOSE or same[problem.layout.linear].max() < 0.5:
            continue
        tried = _climb(problem, other.shared, other.own, other.widths, _ITERATIONS)
        if (tried.converged, tried.evidence) > (best.converged, best.evidence):
            best = tried
        break
    # Where trials do not enclose their optima, widths that are learned on the way can let the mode
    # drift off; it is worth less there than where it began.
    return max(best, *quick, key=lambda m: m.evidence - (_LOST if m is not best else 0.0))


def _climb(
    problem: Problem,
    shared: np.ndarray,
    own: np.ndarray,
    widths: VarianceComponents,
    iterations: int,
) -> MapEstimate:
    """Damped Gauss-Newton from a start, the widths re-estimated at each step."""
    point = problem.at(shared, own)
    gaps, damping, converged = problem.noise_gap(point), 1e-2, False
    bias = np.zeros(problem.layout.size)
    for _ in range(iterations):
        # The noise follows the gap: half a step at a time, or mode and noise can chase each other.
        gaps = 0.5 * (gaps + problem.noise_gap(point))
        variance = problem.variance(widths, gaps)
        blocks, (shared_pull, own_pull) = problem.normal_equations(point, widths, variance)
        bias = 0.5 * (bias + shape_bias(problem, point, variance, blocks[2]))
        before, start = widths, point
        gradient = shared_pull - bias, own_pull
        point, damping = _step(problem, point, widths, variance, blocks, gradient, bias, damping)
        covariance = invert(*blocks)
        widths = _learn(problem, widths, point, covariance)
        spread = np.sqrt(covariance.shared.diagonal()), np.sqrt(_diagonals(covariance.own))
        moved = max(
            float((np.abs(point.shared - start.shared) / spread[0]).max()),
            float((np.abs(point.own - start.own) / spread[1]).max()),
        )
        converged = moved < _SETTLED and widths.change(before) < _LEARNED
        if converged:
            break
    variance = problem.variance(widths, problem.noise_gap(point))
    blocks, _ = problem.normal_equations(point, widths, variance)
    cost = problem.cost(point, widths, variance) + problem.width_cost(point, widths, variance)
    return MapEstimate(
        point.shared,
        point.own,
        invert(*blocks),
        widths,
        converged,
        -cost - 0.5 * log_determinant(*blocks),
    )


def _step(
    problem: Problem,
    point: Point,
    widths: VarianceComponents,
    variance: np.ndarray,
    blocks: tuple[np.ndarray, np.ndarray, np.ndarray],
    gradient: tuple[np.ndarray, np.ndarray],
    bias: np.ndarray,
    damping: float,
) -> tuple[Point, float]:
    """The next point, damped until it is no worse, and the damping to begin with there.

    `bias` [S] is the slope of what `Problem.cost` lacks (`shape_bias`)."""
    head, cross, tail = blocks
    layout = problem.layout
    # A cell's ln determinant saturates: at most so much does the bias change with a ln weight.
    head = head + np.diag(_BIAS_CURVATURE * np.maximum(bias, 0.0))
    level = layout.level.start + np.arange(LEVEL_LAW)
    now = problem.cost(point, widths, variance)
    for _ in range(8):
        shared, own = solve(damped(head, damping), cross, damped(tail, damping), *gradient)
        size = max(
            1.0,
            np.abs(shared[layout.linear]).max() / _LAW_STEP,
            np.abs(shared[layout.valley]).max() / _LAW_STEP,
            np.abs(shared[level]).max() / _LEVEL_STEP,
        )
        tried = problem.at(point.shared + shared / size, point.own + own / size)
        if problem.cost(tried, widths, variance) + bias @ (shared / size) <= now:
            return tried, max(damping / 10, 1e-8)
        damping *= 10
    return point, damping


def _starts(problem: Problem) -> list[np.ndarray]:
    """Shared parameters [S] to climb from."""
    layout, observed = problem.layout, problem.observed
    base = problem.mean.copy()
    finished = np.flatnonzero(~observed.diverged)
    order = finished[np.lexsort((observed.log_loss[finished], observed.cell[finished]))]
    seen, first = np.unique(observed.cell[order], return_index=True)
    best = order[first]
    starts = [base]
    if len(best):
        base[layout.level] = _level_start(problem, seen, observed.log_loss[best])
        x = problem.x[seen, :LINEAR]
        rows = np.kron(np.eye(2), x)  # ln lr of every cell, then ln batch
        tried = observed.point[best].T.ravel()
        law = np.linalg.solve(
            rows.T @ rows / 0.4**2 + problem.law_precision,
            rows.T @ tried / 0.4**2 + problem.law_precision @ problem.law_mean,
        )
        ridge = base.copy()
        ridge[layout.linear] = law
        starts.append(ridge)
    intercepts = [0, LINEAR]
    covariance = problem.law_covariance[np.ix_(intercepts, intercepts)]
    size, axes = np.linalg.eigh(covariance)
    along = problem.law_covariance[:, intercepts] @ np.linalg.solve(
        covariance, _START_SDS * np.sqrt(size[-1]) * axes[:, -1]
    )
    for sign in (1.0, -1.0):
        moved = base.copy()
        moved[layout.linear] = problem.law_mean + sign * along
        starts.append(moved)
    return starts


def _level_start(problem: Problem, cells: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    """The law of the level through the cells' best losses: a few damped Gauss-Newton steps."""
    level = problem.layout.level
    mean, sd = problem.mean[level], problem.sds(problem.first_widths())[level]
    q, error = mean.copy(), 0.01
    for _ in range(10):
        value, jacobian = level_terms(q, problem.x[cells])
        step = np.linalg.solve(
            jacobian.T @ jacobian / error**2 + np.diag(sd**-2),
            jacobian.T @ (log_loss - value) / error**2 - (q - mean) / sd**2,
        )
        q = q + np.clip(step, -0.5, 0.5)
    return q


def _diagonals(blocks: np.ndarray) -> np.ndarray:
    """[..., m, m] to [..., m]."""
    return np.einsum("...ii->...i", blocks)


def _learn(
    problem: Problem,
    widths: VarianceComponents,
    point: Point,
    covariance: BlockArrowCovariance,
) -> VarianceComponents:
    """One step towards the widths of highest marginal likelihood.

    For all but the noise these are MacKay's updates (Neural Computation 4, 1992): an effect that
    the data determine counts as one; one that they leave to its prior, as none.
    """
    settings, observed, near = problem.settings, problem.observed, problem.near
    guess, weight = problem.own_guess, problem.own_weight
    determined = np.clip(1 - _diagonals(covariance.own) / widths.own**2, 0.0, 1.0).sum(0)
    known = weight + determined
    own = np.sqrt((weight * guess**2 + (point.own**2).sum(0)) / known)
    if problem.batch_rule is not None:
        own[2] = guess[2]
    variances = covariance.shared.diagonal()
    shared = []
    for component, width in zip(problem.components, widths.shared, strict=True):
        told = np.clip(1 - variances[component.index] / width**2, 0.0, 1.0).sum()
        square = (point.shared[component.index] ** 2).sum()
        total = component.weight * component.guess**2 + square
        shared.append(np.sqrt(total / (component.weight + told)))
    learned = replace(widths, own=own, known=known, shared=np.array(shared))
    if not near.any():
        return learned
    cell, by_shared, by_own = observed.cell[near], point.by_shared[near], point.by_own[near]
    leverage = (
        ((by_shared @ covariance.shared) * by_shared).sum(1)
        + 2 * ((by_shared[:, None] @ covariance.cross[cell])[:, 0] * by_own).sum(1)
        + ((by_own[:, None] @ covariance.own[cell])[:, 0] * by_own).sum(1)
    )
    square = point.residual[near] ** 2 + leverage
    value = np.minimum(point.gap[near], 2 * settings.far)
    noise, growth = _learn_noise(widths, square, value, observed.variance[near], settings)
    return replace(learned, noise=noise, growth=growth)


def _learn_noise(
    widths: VarianceComponents,
    square: np.ndarray,
    value: np.ndarray,
    known: np.ndarray,
    settings: Settings,
) -> tuple[float, float]:
    """One Fisher-scoring step of the ln (floor, growth), given squared residuals of Student's t."""
    nu = settings.student
    now = np.log([widths.noise, widths.growth])
    parts = np.exp(2 * now) * np.column_stack([np.ones_like(value), value**2])
    variance = parts.sum(1) + known
    shares = parts / variance[:, None]
    excess = (nu + 1) * square / (nu * variance + square) - 1
    guess = np.log([settings.noise_guess, settings.growth_guess])
    slope = shares.T @ excess - settings.noise_weight * (now - guess)
    fisher = 2 * nu / (nu + 3) * shares.T @ shares + settings.noise_weight * np.eye(2)
    # Seven tenths of a step: whole ones can overshoot for ever.
    step = 0.7 * np.linalg.solve(fisher, slope)
    noise, growth = np.exp(now + np.clip(step, -1, 1))
    return float(noise), float(growth)
