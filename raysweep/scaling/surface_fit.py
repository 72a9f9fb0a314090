"""The mode and Laplace covariance of the surface model: damped Gauss-Newton with learned widths.

Parameters are shared ones (laws, valley, level law) and three of each cell (its level, and the shifts
of its optimum). A trial involves only its own cell's three, so the precision is an arrow matrix, and
its inverse is taken block by block: the cost is linear in cells and trials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from raysweep.scaling.surface_features import Covariates
from raysweep.scaling.surface_shape import PARAMETERS, TERMS, gap_derivatives

_ITERATIONS = 30
_SETTLED = 0.1  # posterior sds that the last step may still move
_LEARNED = 0.03  # relative change of learned widths that it may still make
_CONSTANTS = (
    "log_weight_mean",
    "guess_weight",
    "far",
    "roughness_length",
    "roughness_share",
    "student",
)


@dataclass(frozen=True)
class SurfaceSettings:
    """Prior widths and constants of the surface model. Logs are natural; widths are sds.

    A width called guess is learned from the data; the guess counts as `guess_weight` observations.
    """

    law_intercept: float = 1.2  # of the optimum's (ln lr, ln batch) about the published law
    law_exponent: float = 0.3  # of each exponent about the published law's
    law_family: float = 0.3  # offset of an MoE family
    log_weight: float = 1.5  # of each ln weight of the valley's terms, about log_weight_mean
    log_weight_mean: float = math.log(0.003)
    log_rate: float = 0.3  # of the ln rates that stretch the valley's axes
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
        widths = {k: v * factor for k, v in vars(self).items() if k not in _CONSTANTS}
        return replace(self, **widths)


DEFAULT = SurfaceSettings()


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
    """Where each block lies in the vector of shared parameters, for k regressors."""

    regressors: int

    @property
    def law(self) -> tuple[slice, slice]:
        """Of ln lr* and ln batch*, about the published law."""
        k = self.regressors
        return slice(0, k), slice(k, 2 * k)

    @property
    def valley(self) -> slice:
        """Of the valley's ln weights and ln rates."""
        return slice(2 * self.regressors, 2 * self.regressors + PARAMETERS)

    @property
    def scale(self) -> slice:
        """Of the valley's ln depth, per nat of parameters and of tokens."""
        start = self.valley.stop
        return slice(start, start + 2)

    @property
    def level(self) -> slice:
        """Of ln loss at the optimum."""
        return slice(self.scale.stop, self.scale.stop + self.regressors)

    @property
    def size(self) -> int:
        """Number of shared parameters."""
        return self.level.stop


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
class ArrowInverse:
    """Blocks of a covariance: shared [S, S], shared with each cell [C, S, 3], each cell [C, 3, 3]."""

    shared: np.ndarray
    cross: np.ndarray
    own: np.ndarray


@dataclass(frozen=True)
class Mode:
    """The fitted parameters, their covariance, the learned widths, and whether the search settled."""

    shared: np.ndarray  # [S]
    own: np.ndarray  # [C, 3]
    covariance: ArrowInverse
    widths: Widths
    converged: bool


class _Grouping:
    """Sums over the trials of each cell."""

    def __init__(self, cell: np.ndarray, cells: int) -> None:
        self._cells = cells
        self._order = np.argsort(cell, kind="stable")
        self._present, self._start = np.unique(cell[self._order], return_index=True)

    def sum(self, rows: np.ndarray) -> np.ndarray:
        """[n, ...] to [cells, ...]; a cell without trials sums to 0."""
        total = np.zeros((self._cells, *rows.shape[1:]))
        if len(self._present):
            total[self._present] = np.add.reduceat(rows[self._order], self._start, axis=0)
        return total

    def outer(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Sums of outer products of [n, a] and [n, b]: [cells, a, b]."""
        return self.sum(left[:, :, None] * right[:, None])


def prior_of(
    covariates: Covariates, settings: SurfaceSettings, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the shared parameters; `level` is a typical ln loss."""
    names = covariates.names
    layout = Layout(1 + len(names))
    mean, sd = np.zeros(layout.size), np.ones(layout.size)
    slopes = [
        settings.law_family if name.startswith("experts") else settings.law_exponent
        for name in names
    ]
    for block in layout.law:
        sd[block] = [settings.law_intercept, *slopes]
    valley = layout.valley.start
    mean[valley : valley + TERMS] = settings.log_weight_mean
    sd[valley : valley + TERMS] = settings.log_weight
    sd[valley + TERMS : layout.valley.stop] = settings.log_rate
    sd[layout.scale] = settings.scale_slope
    mean[layout.level.start] = level
    sd[layout.level] = [settings.level_intercept, *[settings.level_slope] * len(names)]
    return mean, sd


def predict_rows(
    shared: np.ndarray, own: np.ndarray, regressors: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Predictions of ln loss and their derivatives.

    Args:
        shared: [S] parameters.
        own: [n, 3], the parameters of each row's cell.
        regressors: [n, k], of each row's cell.
        offset: [n, 2], each row's point less the published law's optimum of its cell.

    Returns:
        ln loss [n], gap [n], and the Jacobian of ln loss by shared [n, S] and own parameters [n, 3].
    """
    layout = Layout(regressors.shape[1])
    laws = np.stack([shared[law] for law in layout.law], -1)
    u, v = (offset - regressors @ laws - own[:, 1:]).T
    scale = np.exp(regressors[:, 1:3] @ shared[layout.scale])
    value, by_point, by_valley = gap_derivatives(u, v, shared[layout.valley])
    value, by_point = value * scale, by_point * scale[:, None]
    by_shared = np.empty((len(regressors), layout.size))
    for axis, law in enumerate(layout.law):
        by_shared[:, law] = -by_point[:, axis, None] * regressors
    by_shared[:, layout.valley] = by_valley * scale[:, None]
    by_shared[:, layout.scale] = value[:, None] * regressors[:, 1:3]
    by_shared[:, layout.level] = regressors
    by_own = np.column_stack([np.ones(len(regressors)), -by_point])
    log_loss = regressors @ shared[layout.level] + own[:, 0] + value
    return log_loss, value, by_shared, by_own


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
        far: [n] bool, trials that tell no more than a gap above `settings.far`.
        covariates: the regressors' names.
        design: [cells, k], their values.
        law_prior: [cells, 2], the published law's optimum of each cell.
        settings: prior widths.
    """
    cells, which = len(design), observed.cell
    trials_of = _Grouping(which, cells)
    regressors, offset = design[which], observed.point - law_prior[which]
    near = ~far
    level = float(observed.log_loss[near].mean()) if near.any() else 0.0
    mean, sd = prior_of(covariates, settings, level)
    repeats = _repeats(observed, settings.roughness_length)
    guess = settings.shift_guess
    widths = Widths(
        np.array([settings.level_guess, guess, guess]),
        np.full(3, settings.guess_weight),
        settings.noise_guess,
        settings.growth_guess,
    )

    def evaluate(shared: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, ...]:
        """Residuals, gaps and Jacobians; a far trial's residual is what its gap lacks."""
        predicted, value, by_shared, by_own = predict_rows(shared, own[which], regressors, offset)
        residual = observed.log_loss - predicted
        if far.any():
            residual[far] = np.maximum(settings.far - value[far], 0)
            by_shared[far, Layout(design.shape[1]).level] = 0.0
            by_own[far, 0] = 0.0
            enough = far & (value >= settings.far)
            by_shared[enough] = 0.0
            by_own[enough] = 0.0
        return residual, value, by_shared, by_own

    def cost(
        residual: np.ndarray, shared: np.ndarray, own: np.ndarray, variance: np.ndarray
    ) -> float:
        nu = settings.student
        misfit = (nu + 1) * np.log1p(residual**2 / (nu * variance)).sum()
        prior = (((shared - mean) / sd) ** 2).sum() + ((own / widths.own) ** 2).sum()
        return 0.5 * float(misfit + prior)

    terms = np.arange(TERMS) + Layout(design.shape[1]).valley.start
    shared, own = mean.copy(), np.zeros((cells, 3))
    state = evaluate(shared, own)
    gaps = np.where(far, settings.far, state[1])
    damping = 1e-2
    while_moving = True
    covariance = ArrowInverse(
        np.diag(sd**2), np.zeros((cells, len(sd), 3)), np.zeros((cells, 3, 3))
    )
    for _ in range(_ITERATIONS):
        residual, value, by_shared, by_own = state
        # The noise follows the gap: half a step at a time, or mode and noise can chase each other.
        gaps = 0.5 * (gaps + np.where(far, settings.far, value))
        variance = widths.noise**2 + (widths.growth * gaps) ** 2 + observed.variance
        variance = variance * repeats
        weight = (settings.student + 1) / (settings.student + residual**2 / variance) / variance
        weighted = by_own * weight[:, None]
        head = (by_shared * weight[:, None]).T @ by_shared
        cross = trials_of.outer(by_shared, weighted)
        tail = trials_of.outer(by_own, weighted)
        head[np.diag_indices_from(head)] += sd**-2
        tail[:, range(3), range(3)] += widths.own**-2
        pull = by_shared.T @ (weight * residual)
        # The second derivative in ln weight that Gauss-Newton leaves out is known: keep its safe part.
        head[terms, terms] += np.maximum(-pull[terms], 0)
        toward_shared = pull - (shared - mean) / sd**2
        toward_own = trials_of.sum(weighted * residual[:, None]) - own / widths.own**2
        now = cost(residual, shared, own, variance)
        step_shared, step_own = np.zeros_like(shared), np.zeros_like(own)
        for _ in range(8):
            blocks = _damped(head, damping), cross, _damped(tail, damping)
            step_shared, step_own = _solve(*blocks, toward_shared, toward_own)
            tried = evaluate(shared + step_shared, own + step_own)
            if cost(tried[0], shared + step_shared, own + step_own, variance) <= now:
                shared, own, state = shared + step_shared, own + step_own, tried
                damping = max(damping / 10, 1e-8)
                break
            damping *= 10
            step_shared, step_own = np.zeros_like(shared), np.zeros_like(own)
        covariance = _invert(head, cross, tail)
        before = widths
        widths = _learn(widths, settings, own, covariance, state, near, observed)
        moved = max(
            float((np.abs(step_shared) / np.sqrt(covariance.shared.diagonal())).max()),
            float((np.abs(step_own) / np.sqrt(np.einsum("cii->ci", covariance.own))).max()),
        )
        while_moving = moved > _SETTLED or widths.change(before) > _LEARNED
        if not while_moving:
            break
    return Mode(shared, own, covariance, widths, not while_moving)


def _damped(blocks: np.ndarray, damping: float) -> np.ndarray:
    """Square blocks [..., m, m] with their diagonals raised by a share."""
    raised = blocks.copy()
    index = np.arange(blocks.shape[-1])
    raised[..., index, index] *= 1 + damping
    return raised


def _flat(blocks: np.ndarray) -> np.ndarray:
    """[cells, S, 3] side by side: [S, 3 cells]."""
    return blocks.transpose(1, 0, 2).reshape(blocks.shape[1], -1)


def _solve(
    head: np.ndarray, cross: np.ndarray, tail: np.ndarray, shared: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The arrow system [[head, cross], [cross', tail]] x = (shared, own), by its Schur complement."""
    reduced = cross @ np.linalg.inv(tail)
    first = np.linalg.solve(
        head - _flat(reduced) @ _flat(cross).T, shared - _flat(reduced) @ own.ravel()
    )
    rest = own - (_flat(cross).T @ first).reshape(-1, 3)
    return first, np.linalg.solve(tail, rest[..., None])[..., 0]


def _invert(head: np.ndarray, cross: np.ndarray, tail: np.ndarray) -> ArrowInverse:
    """The blocks of an arrow matrix's inverse that one cell at a time needs."""
    inverse = np.linalg.inv(tail)
    reduced = cross @ inverse
    shared = np.linalg.inv(head - _flat(reduced) @ _flat(cross).T)
    shared = 0.5 * (shared + shared.T)
    coupled = -shared @ reduced
    own = inverse - reduced.transpose(0, 2, 1) @ coupled
    return ArrowInverse(shared, coupled, 0.5 * (own + own.transpose(0, 2, 1)))


def _repeats(observed: Observations, length: float) -> np.ndarray:
    """[n], how many runs of its cell each run shares its luck with, itself counted."""
    repeats = np.ones(len(observed.cell))
    for cell in np.unique(observed.cell):
        rows = np.flatnonzero(observed.cell == cell)
        square = ((observed.point[rows, None] - observed.point[rows]) ** 2).sum(-1)
        repeats[rows] = np.exp(-0.5 * square / length**2).sum(1)
    return repeats


def _learn(
    widths: Widths,
    settings: SurfaceSettings,
    own: np.ndarray,
    covariance: ArrowInverse,
    state: tuple[np.ndarray, ...],
    near: np.ndarray,
    observed: Observations,
) -> Widths:
    """One step towards the widths of highest marginal likelihood (MacKay 1992 for the cells' effects)."""
    guess = np.array([settings.level_guess, settings.shift_guess, settings.shift_guess])
    spread = np.einsum("cii->ci", covariance.own)
    # An effect that the data determine counts as one; one that they leave to its prior, as none.
    known = settings.guess_weight + np.clip(1 - spread / widths.own**2, 0.0, 1.0).sum(0)
    total = settings.guess_weight * guess**2 + (own**2).sum(0)
    effects = np.sqrt(total / known)
    if not near.any():
        return replace(widths, own=effects, known=known)
    residual, value, by_shared, by_own = (part[near] for part in state)
    cell = observed.cell[near]
    leverage = (
        ((by_shared @ covariance.shared) * by_shared).sum(1)
        + 2 * ((by_shared[:, None] @ covariance.cross[cell])[:, 0] * by_own).sum(1)
        + ((by_own[:, None] @ covariance.own[cell])[:, 0] * by_own).sum(1)
    )
    square = residual**2 + leverage
    return Widths(
        effects, known, *_learn_noise(widths, square, value, observed.variance[near], settings)
    )


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
