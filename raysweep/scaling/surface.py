"""The surface model: loss over (learning rate, batch) in all cells at once, and each cell's optimum.

The log loss of a run in cell c at p = (ln learning rate, ln batch tokens) is modelled as

    ln L = level_c + e^(k_c) gap(p - m_c) + noise,        m_c = law(N_c, D_c, sparsity_c) + shift_c

where `gap` is the convex valley of `surface_shape`, shared by all cells up to a slowly varying scale
e^(k_c); the optimum m_c moves as a power law of the cell's sizes; shift_c and part of the level are random
effects. The noise has sd sqrt(floor^2 + (growth gap)^2): far from the optimum the valley's shape is only
roughly known. Runs that diverged, or ended absurdly high, say only that the gap there is large. The widths
of the random effects and the noise are learned from the data (empirical Bayes); everything else has a weak
normal prior, about Step Law for the optimum. The posterior is Laplace's, around the mode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from raysweep.errors import UserError
from raysweep.scaling.surface_features import (
    CellFeatures,
    Covariates,
    covariates_of,
    prior_optimum,
)
from raysweep.scaling.surface_fit import (
    Layout,
    Mode,
    Observations,
    SurfaceSettings,
    fit_mode,
    predict_rows,
)
from raysweep.scaling.surface_shape import curvature, gap

__all__ = ["CellFeatures", "Laws", "OptimumPosterior", "Surface", "SurfaceSettings", "fit_surface"]

_log = logging.getLogger("raysweep")


@dataclass(frozen=True)
class OptimumPosterior:
    """What is known of one cell's optimum. Points are (ln learning rate, ln batch tokens)."""

    mean: np.ndarray  # [2]
    covariance: np.ndarray  # [2, 2]
    log_loss: float
    log_loss_sd: float
    curvature: np.ndarray  # [2, 2]: Hessian of ln loss at the optimum
    trials: int  # finished or diverged trials in this cell

    @property
    def learning_rate(self) -> float:
        """Peak learning rate at the posterior mean."""
        return float(np.exp(self.mean[0]))

    @property
    def batch_tokens(self) -> float:
        """Batch in tokens at the posterior mean."""
        return float(np.exp(self.mean[1]))

    @property
    def loss(self) -> float:
        """Expected loss at the optimum, nats per token."""
        return float(np.exp(self.log_loss))

    @property
    def expected_gap(self) -> float:
        """Expected relative excess loss of running at the posterior mean."""
        return 0.5 * float((self.curvature * self.covariance).sum())

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Draws of the optimum, [count, 2]."""
        rng = np.random.default_rng(seed)
        return rng.multivariate_normal(self.mean, self.covariance, size=count, method="cholesky")


@dataclass(frozen=True)
class CellDraws:
    """Joint posterior draws about one cell."""

    optima: np.ndarray  # [draws, 2]
    laws: np.ndarray  # [draws, 2, 1 + covariates], about the published law
    levels: np.ndarray  # [draws], ln loss at the optimum
    gaps: np.ndarray  # [draws, points]


@dataclass(frozen=True)
class Laws:
    """The power laws of the optimum, free of any cell's own correction.

    ln lr* = sum_j exponents[0, j] x_j and ln B* likewise [1], over columns `names` (after "intercept",
    read at `centre`): the logs of params, tokens, sparsity (total / active) and family indicators.
    """

    names: tuple[str, ...]
    exponents: np.ndarray  # [2, names]
    covariance: np.ndarray  # [2 names, 2 names], learning rate first
    degrees: float  # of freedom, for intervals
    covariates: Covariates

    def exponent(self, target: str, name: str, level: float = 0.95) -> tuple[float, float, float]:
        """(mean, low, high) of the exponent of `name` in the law of "learning_rate" or "batch"."""
        axis = ("learning_rate", "batch").index(target)
        column = self.names.index(name)
        mean = float(self.exponents[axis, column])
        index = axis * len(self.names) + column
        half = (
            float(stats.t.ppf(0.5 + level / 2, self.degrees)) * self.covariance[index, index] ** 0.5
        )
        return mean, mean - half, mean + half

    def samples(self, count: int, seed: int = 0) -> np.ndarray:
        """Draws of all exponents, [count, 2, names]."""
        rng = np.random.default_rng(seed)
        draws = rng.multivariate_normal(
            self.exponents.ravel(), self.covariance, size=count, method="cholesky"
        )
        return draws.reshape(count, 2, -1)

    def predict(self, cell: CellFeatures) -> tuple[float, float]:
        """(learning rate, batch tokens) by the laws alone."""
        learning_rate, batch = self.exponents @ self.covariates.matrix([cell])[0]
        return float(np.exp(learning_rate)), float(np.exp(batch))


@dataclass(frozen=True)
class Surface:
    """A fitted surface model. Made by `fit_surface`."""

    cells: tuple[CellFeatures, ...]
    covariates: Covariates
    mode: Mode
    settings: SurfaceSettings
    trials: np.ndarray  # [cells]
    observed: Observations

    @cached_property
    def _layout(self) -> Layout:
        return Layout(1 + len(self.covariates.names), len(self.cells))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {cell.name: i for i, cell in enumerate(self.cells)}

    @property
    def status(self) -> str:
        """`prior` without data, else `converged` or `not converged`."""
        if not self.trials.any():
            return "prior"
        return "converged" if self.mode.converged else "not converged"

    @cached_property
    def laws(self) -> Laws:
        """The laws of the optimum, with uncertainty."""
        layout, theta = self._layout, self.mode.theta
        a, b = layout.law
        both = np.r_[a, b]
        # The prior law is itself a power law of the same columns: add its exponents.
        known = _prior_exponents(self.covariates)
        exponents = known + np.stack([theta[a], theta[b]])
        taught = int((self.trials > 0).sum())
        return Laws(
            names=("intercept", *self.covariates.names),
            exponents=exponents,
            covariance=self.mode.covariance[np.ix_(both, both)],
            degrees=float(max(3, taught - exponents.shape[1])),
            covariates=self.covariates,
        )

    def optimum(self, cell: CellFeatures | str) -> OptimumPosterior:
        """The posterior of a cell's optimum, whether or not it has trials or was known to the fit."""
        layout, mode = self._layout, self.mode
        features, index = self._find(cell)
        z = self.covariates.matrix([features])[0]
        rows = np.zeros((3, layout.size))  # learning rate, batch, level
        extra = np.zeros(3)
        for axis in range(2):
            rows[axis, layout.law[axis]] = z
        rows[2, layout.level_law] = z
        if index is None:
            extra[:] = [*mode.hyper.shift**2, mode.hyper.level**2]
            if not self.covariates.sparse:
                extra[:2] += (self.settings.law_exponent * features.log_sparsity) ** 2
        else:
            for axis in range(2):
                rows[axis, layout.shift[axis].start + index] = 1.0
            rows[2, layout.level.start + index] = 1.0
        covariance = rows @ mode.covariance @ rows.T + np.diag(extra)
        mean = rows @ mode.theta
        scale = np.exp(z[1:3] @ mode.theta[layout.scale])
        return OptimumPosterior(
            mean=prior_optimum([features])[0] + mean[:2],
            covariance=covariance[:2, :2],
            log_loss=float(mean[2]),
            log_loss_sd=float(covariance[2, 2] ** 0.5),
            curvature=scale * curvature(mode.theta[layout.log_weights]),
            trials=0 if index is None else int(self.trials[index]),
        )

    def predict(
        self, cell: CellFeatures | str, learning_rate: np.ndarray, batch_tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sd of the loss (nats per token, noise of one run left out) at points of one cell."""
        features, index = self._find(cell)
        learning_rate, batch_tokens = np.broadcast_arrays(learning_rate, batch_tokens)
        point = np.log(np.stack([learning_rate.ravel(), batch_tokens.ravel()], -1))
        design = self.covariates.matrix([features])
        layout = self._layout
        theta, which = self._one_cell(index)
        single = Layout(layout.covariates, 1)
        mean, _, rows = predict_rows(
            theta, single, prior_optimum([features]), design, np.zeros(len(point), dtype=int), point
        )
        variance = np.einsum("ij,jk,ik->i", rows, which, rows)
        loss = np.exp(mean)
        shape = learning_rate.shape
        return loss.reshape(shape), (loss * np.sqrt(variance)).reshape(shape)

    def recommend(self, cell: CellFeatures | str) -> tuple[float, float]:
        """(learning rate, batch tokens) to run: the optimum, or a trial that did better than it.

        A trial's deviation from the surface is partly luck and partly the fine grain of that spot:
        `roughness_share` of it is taken to recur. A trial is recommended where its loss, so shrunk,
        lies below the expected loss at the optimum.
        """
        optimum = self.optimum(cell)
        features, index = self._find(cell)
        rows = np.flatnonzero(~self.observed.diverged & (self.observed.cell == index))
        if index is None or not len(rows):
            return optimum.learning_rate, optimum.batch_tokens
        learning_rate, batch = np.exp(self.observed.point[rows]).T
        expected = np.log(self.predict(features, learning_rate, batch)[0])
        share = self.settings.roughness_share
        shrunk = expected + share * (self.observed.log_loss[rows] - expected)
        best = int(shrunk.argmin())
        if shrunk[best] < optimum.log_loss:
            return float(learning_rate[best]), float(batch[best])
        return optimum.learning_rate, optimum.batch_tokens

    def edges(
        self,
        cell: CellFeatures | str,
        learning_rate: tuple[float, float],
        batch_tokens: tuple[float, float],
        margin: float = 0.35,
    ) -> tuple[tuple[str, str], ...]:
        """Which bounds the cell's optimum lies at or beyond: ("learning_rate" | "batch", "low" | "high").

        An optimum is bracketed by trials only if it lies `margin` (ln units; 0.35 is a factor of
        sqrt 2) inside a bound; empty where it is.
        """
        mean = self.optimum(cell).mean
        found = []
        for axis, bounds in enumerate((learning_rate, batch_tokens)):
            low, high = np.log(bounds)
            name = ("learning_rate", "batch")[axis]
            if mean[axis] < low + margin:
                found.append((name, "low"))
            if mean[axis] > high - margin:
                found.append((name, "high"))
        return tuple(found)

    def sample_cell(
        self, cell: CellFeatures | str, point: np.ndarray, count: int, rng: np.random.Generator
    ) -> CellDraws:
        """Joint posterior draws for one cell, with its gaps at `point` [n, 2]."""
        features, index = self._find(cell)
        theta, covariance = self._one_cell(index)
        single = Layout(self._layout.covariates, 1)
        draws = theta + rng.standard_normal((count, len(theta))) @ _root(covariance).T
        z = self.covariates.matrix([features])[0]
        optima = prior_optimum([features])[0] + np.stack(
            [
                draws[:, law] @ z + draws[:, shift.start]
                for law, shift in zip(single.law, single.shift, strict=True)
            ],
            -1,
        )
        levels = draws[:, single.level_law] @ z + draws[:, single.level.start]
        scale = np.exp(draws[:, single.scale] @ z[1:3])
        u = point[:, 0] - optima[:, :1]
        v = point[:, 1] - optima[:, 1:]
        gaps = gap(u, v, draws[:, None, single.log_weights]) * scale[:, None]
        laws = np.stack([draws[:, law] for law in single.law], 1)
        return CellDraws(optima, laws, levels, gaps)

    def noise_variance(self, gaps: np.ndarray) -> np.ndarray:
        """Variance of one run's ln loss at a given gap."""
        return self.mode.hyper.noise**2 + (self.mode.hyper.growth * gaps) ** 2

    def _find(self, cell: CellFeatures | str) -> tuple[CellFeatures, int | None]:
        name = cell if isinstance(cell, str) else cell.name
        index = self._index.get(name)
        if index is not None:
            return self.cells[index], index
        if isinstance(cell, str):
            raise UserError(
                f"no cell {cell!r} in this surface: give its CellFeatures to predict it"
            )
        return cell, None

    def _one_cell(self, index: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and covariance with only this cell's random effects kept."""
        layout, mode = self._layout, self.mode
        shared = np.arange(layout.level.start)
        if index is not None:
            starts = (layout.level.start, layout.shift[0].start, layout.shift[1].start)
            keep = np.r_[shared, [start + index for start in starts]]
            return mode.theta[keep], mode.covariance[np.ix_(keep, keep)]
        size = len(shared)
        covariance = np.zeros((size + 3, size + 3))
        covariance[:size, :size] = mode.covariance[np.ix_(shared, shared)]
        covariance[range(size, size + 3), range(size, size + 3)] = [
            mode.hyper.level**2,
            *mode.hyper.shift**2,
        ]
        return np.r_[mode.theta[shared], np.zeros(3)], covariance


def _root(covariance: np.ndarray) -> np.ndarray:
    """A lower-triangular square root; a hair is added to the diagonal against rounding."""
    hair = 1e-10 * covariance.diagonal()
    return np.linalg.cholesky(covariance + np.diag(hair + 1e-18))


def _prior_exponents(covariates: Covariates) -> np.ndarray:
    """Step Law's coefficients [2, 1 + columns] in these covariates, by evaluating it."""
    columns = 1 + len(covariates.names)
    known = np.zeros((2, columns))
    n, d = np.exp(covariates.centre)
    base = prior_optimum([CellFeatures("centre", n, d)])[0]
    known[:, 0] = base
    known[:, 1] = prior_optimum([CellFeatures("n", n * np.e, d)])[0] - base
    known[:, 2] = prior_optimum([CellFeatures("d", n, d * np.e)])[0] - base
    if covariates.sparse:
        known[:, 3] = prior_optimum([CellFeatures("s", n, d, params_total=n * np.e)])[0] - base
    return known


def fit_surface(
    cells: Sequence[CellFeatures],
    cell_index: np.ndarray,
    learning_rate: np.ndarray,
    batch_tokens: np.ndarray,
    loss: np.ndarray,
    diverged: np.ndarray | None = None,
    loss_se: np.ndarray | None = None,
    settings: SurfaceSettings = SurfaceSettings(),
) -> Surface:
    """Fit the surface model to trials of any number of cells.

    Args:
        cells: the cells, with or without trials.
        cell_index: [n], each trial's position in `cells`.
        learning_rate: [n], peak.
        batch_tokens: [n].
        loss: [n], nats per token; ignored where diverged.
        diverged: [n] bool. A trial with a loss that is not finite counts as diverged.
        loss_se: [n], known standard error of each loss (of several seeds, or of evaluation), added to the
            noise that is learned.
        settings: prior widths.

    Raises:
        UserError: arrays of different lengths, or values that are not positive.
    """
    cells = tuple(cells)
    cell_index = np.asarray(cell_index, dtype=int)
    arrays = [np.asarray(a, dtype=float) for a in (learning_rate, batch_tokens, loss)]
    if not cells:
        raise UserError("the surface model needs at least one cell")
    if len({cell.name for cell in cells}) != len(cells):
        raise UserError("the surface model needs cells of distinct names")
    if any(a.shape != cell_index.shape for a in arrays):
        raise UserError("cell_index, learning_rate, batch_tokens and loss must have equal lengths")
    count = len(cell_index)
    if count and not (0 <= cell_index.min() and cell_index.max() < len(cells)):
        raise UserError(f"cell_index must lie in 0..{len(cells) - 1}")
    lost = ~np.isfinite(arrays[2])
    if diverged is not None:
        lost = lost | np.asarray(diverged, dtype=bool)
    if any((a <= 0).any() for a in arrays[:2]) or (arrays[2][~lost] <= 0).any():
        raise UserError("learning rates, batch sizes and losses must be positive")
    safe = np.where(lost, 1.0, arrays[2])
    relative = (
        np.zeros(count) if loss_se is None else np.nan_to_num(np.asarray(loss_se, float)) / safe
    )
    observed = Observations(
        cell=cell_index,
        point=np.column_stack([np.log(arrays[0]), np.log(arrays[1])]),
        log_loss=np.log(safe),
        diverged=lost,
        variance=relative**2,
    )
    if not count:
        _log.info(
            "no trials yet: optima are guessed from Step Law (arXiv 2503.04715), a weak prior"
        )
    covariates = covariates_of(cells)
    mode = fit_mode(observed, covariates.matrix(cells), prior_optimum(cells), covariates, settings)
    trials = np.bincount(cell_index, minlength=len(cells))
    return Surface(cells, covariates, mode, settings, trials, observed)
