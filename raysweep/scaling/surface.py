"""The surface model: loss over (learning rate, batch) in all cells at once.

The log loss of a run in cell c at p = (ln learning rate, ln batch tokens) is modelled as

    ln L = level_c + e^(k_c) gap(p - m_c) + noise,   m_c = law(N_c, D_c, sparsity_c) + shift_c

where `gap` is the convex valley of `surface_shape`, shared by all cells up to a slowly varying
depth e^(k_c); the optimum m_c moves as a power law of the cell's sizes; shift_c and part of the
level are effects of the cell's own. The noise has sd hypot(floor, growth gap): far from the optimum
the valley's shape is only roughly known. Runs that diverged, or ended absurdly high, say only that
the gap there is large. The widths of the cells' effects and of the noise are learned from the data
(empirical Bayes); all else has a weak normal prior, about Step Law for the optimum. The posterior
is Laplace's, around the mode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raysweep.errors import UserError
from raysweep.scaling.surface_features import (
    CellFeatures,
    Covariates,
    covariates_of,
    prior_exponents,
    prior_optimum,
)
from raysweep.scaling.surface_fit import Mode, fit_mode, kinship
from raysweep.scaling.surface_parameters import (
    DEFAULT,
    Layout,
    Observations,
    SurfaceSettings,
    predict_rows,
)
from raysweep.scaling.surface_posterior import CellDraws, Laws, OptimumPosterior, root
from raysweep.scaling.surface_shape import curvature, gap

__all__ = [
    "DEFAULT",
    "CellFeatures",
    "Laws",
    "OptimumPosterior",
    "Surface",
    "SurfaceSettings",
    "fit_surface",
]

_log = logging.getLogger("raysweep")
_FEWEST_DEGREES = 3.0  # of freedom of the laws' intervals; fewer make them wider than they need be


@dataclass(frozen=True)
class Surface:
    """A fitted surface model. Made by `fit_surface`."""

    cells: tuple[CellFeatures, ...]
    covariates: Covariates
    mode: Mode
    settings: SurfaceSettings
    observed: Observations

    @cached_property
    def trials(self) -> np.ndarray:
        """[cells], finished and diverged trials of each."""
        return np.bincount(self.observed.cell, minlength=len(self.cells))

    @property
    def status(self) -> str:
        """`prior` without data, else `converged` or `not converged`."""
        if not len(self.observed.cell):
            return "prior"
        return "converged" if self.mode.converged else "not converged"

    @cached_property
    def laws(self) -> Laws:
        """The laws of the optimum, with uncertainty."""
        blocks = self._layout.law
        both = np.r_[blocks]
        return Laws(
            names=("intercept", *self.covariates.names),
            # The published law is itself a power law of the same columns.
            exponents=prior_exponents(self.covariates) + self.mode.shared[both].reshape(2, -1),
            covariance=self.mode.covariance.shared[np.ix_(both, both)],
            degrees=np.maximum(self.mode.widths.known[1:], _FEWEST_DEGREES),
            covariates=self.covariates,
        )

    def optimum(self, cell: CellFeatures | str) -> OptimumPosterior:
        """The posterior of a cell's optimum, with or without trials, known to the fit or not."""
        features, index = self._find(cell)
        layout = self._layout
        parameters, covariance = self._one_cell(features, index)
        x = self.covariates.matrix([features])[0]
        rows = np.zeros((3, len(parameters)))  # ln learning rate, ln batch, level
        for row, block in enumerate((*layout.law, layout.level)):
            rows[row, block] = x
            rows[row, layout.size + (row + 1) % 3] = 1.0  # own: level, shift in lr, in batch
        mean = rows @ parameters
        spread = rows @ covariance @ rows.T
        depth = np.exp(x[1:3] @ parameters[layout.scale])
        return OptimumPosterior(
            mean=prior_optimum([features])[0] + mean[:2],
            covariance=spread[:2, :2],
            log_loss=float(mean[2]),
            log_loss_sd=float(spread[2, 2] ** 0.5),
            curvature=depth * curvature(parameters[layout.valley]),
            trials=0 if index is None else int(self.trials[index]),
        )

    def predict(
        self, cell: CellFeatures | str, learning_rate: np.ndarray, batch_tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sd of the loss (nats per token, noise left out) at points of one cell."""
        features, index = self._find(cell)
        learning_rate, batch_tokens = np.broadcast_arrays(learning_rate, batch_tokens)
        point = np.log(np.stack([learning_rate.ravel(), batch_tokens.ravel()], -1))
        parameters, covariance = self._one_cell(features, index)
        size = self._layout.size
        log_loss, _, by_shared, by_own = predict_rows(
            parameters[:size],
            np.tile(parameters[size:], (len(point), 1)),
            np.tile(self.covariates.matrix([features]), (len(point), 1)),
            point - prior_optimum([features]),
        )
        rows = np.concatenate([by_shared, by_own], axis=1)
        sd = np.sqrt(((rows @ covariance) * rows).sum(1))
        loss = np.exp(log_loss)
        return loss.reshape(learning_rate.shape), (loss * sd).reshape(learning_rate.shape)

    def recommend(self, cell: CellFeatures | str) -> tuple[float, float]:
        """(learning rate, batch tokens) to run: the optimum, or a trial that did better than it.

        A trial's deviation from the surface is partly luck and partly the fine grain of that spot:
        `roughness_share` of it is taken to recur. A trial is recommended where its loss, so shrunk,
        lies below the expected loss at the optimum; runs of one point are averaged.
        """
        optimum = self.optimum(cell)
        features, index = self._find(cell)
        rows = np.flatnonzero(~self.observed.diverged & (self.observed.cell == index))
        if index is None or not len(rows):
            return optimum.learning_rate, optimum.batch_tokens
        learning_rate, batch = np.exp(self.observed.point[rows]).T
        expected = np.log(self.predict(features, learning_rate, batch)[0])
        alike = kinship(self.observed.point[rows], 0.2 * self.settings.roughness_length)
        deviation = alike @ (self.observed.log_loss[rows] - expected) / alike.sum(1)
        shrunk = expected + self.settings.roughness_share * deviation
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
        """Which bounds the optimum lies at or beyond: ("learning_rate" | "batch", "low" | "high").

        An optimum is bracketed by trials only if it lies `margin` (ln units; 0.35 is a factor of
        sqrt 2) inside a bound. Empty where it does.
        """
        mean = self.optimum(cell).mean
        found = []
        for axis, (name, bounds) in enumerate(
            (("learning_rate", learning_rate), ("batch", batch_tokens))
        ):
            low, high = np.log(bounds)
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
        layout = self._layout
        parameters, covariance = self._one_cell(features, index)
        noise = rng.standard_normal((count, len(parameters)))
        draws = parameters + noise @ root(covariance).T
        x = self.covariates.matrix([features])[0]
        laws = np.stack([draws[:, law] for law in layout.law], 1)
        own = draws[:, layout.size :]
        optima = prior_optimum([features])[0] + laws @ x + own[:, 1:]
        depth = np.exp(draws[:, layout.scale] @ x[1:3])
        u, v = (point[None] - optima[:, None]).transpose(2, 0, 1)
        return CellDraws(
            optima=optima,
            laws=laws,
            levels=draws[:, layout.level] @ x + own[:, 0],
            gaps=gap(u, v, draws[:, None, layout.valley]) * depth[:, None],
        )

    def noise_variance(self, gaps: np.ndarray) -> np.ndarray:
        """Variance of one run's ln loss at a given gap."""
        return self.mode.widths.noise**2 + (self.mode.widths.growth * gaps) ** 2

    @cached_property
    def _layout(self) -> Layout:
        return Layout(1 + len(self.covariates.names))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {cell.name: i for i, cell in enumerate(self.cells)}

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

    def _one_cell(self, features: CellFeatures, index: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Shared parameters, then this cell's own three, and their covariance."""
        mode, size = self.mode, self._layout.size
        covariance = np.zeros((size + 3, size + 3))
        covariance[:size, :size] = mode.covariance.shared
        if index is not None:
            cross = mode.covariance.cross[index]
            covariance[:size, size:], covariance[size:, :size] = cross, cross.T
            covariance[size:, size:] = mode.covariance.own[index]
            return np.r_[mode.shared, mode.own[index]], covariance
        variance = mode.widths.own**2
        if not self.covariates.sparse:  # nothing here has taught what sparsity does
            variance[1:] += (self.settings.law_exponent * features.log_sparsity) ** 2
        covariance[range(size, size + 3), range(size, size + 3)] = variance
        return np.r_[mode.shared, np.zeros(3)], covariance


def fit_surface(
    cells: Sequence[CellFeatures],
    cell_index: np.ndarray,
    learning_rate: np.ndarray,
    batch_tokens: np.ndarray,
    loss: np.ndarray,
    diverged: np.ndarray | None = None,
    loss_se: np.ndarray | None = None,
    settings: SurfaceSettings = DEFAULT,
) -> Surface:
    """Fit the surface model to trials of any number of cells.

    Args:
        cells: the cells, with or without trials.
        cell_index: [n], each trial's position in `cells`.
        learning_rate: [n], peak.
        batch_tokens: [n].
        loss: [n], nats per token; ignored where diverged.
        diverged: [n] bool. A trial with a loss that is not finite counts as diverged.
        loss_se: [n], known standard error of each loss (of several seeds, or of evaluation), added
            to the noise that is learned; nan where unknown.
        settings: prior widths.

    Raises:
        UserError: arrays of different lengths, or values that are not positive.
    """
    cells = tuple(cells)
    if not cells:
        raise UserError("the surface model needs at least one cell")
    if len({cell.name for cell in cells}) != len(cells):
        raise UserError("the surface model needs cells of distinct names")
    observed = _observations(
        len(cells), cell_index, learning_rate, batch_tokens, loss, diverged, loss_se
    )
    if not len(observed.cell):
        _log.info(
            "no trials yet: optima are guessed from Step Law (arXiv 2503.04715), a weak prior"
        )
    covariates = covariates_of(cells)
    mode = fit_mode(
        observed,
        _far(cells, observed, settings.far),
        covariates,
        covariates.matrix(cells),
        prior_optimum(cells),
        settings,
    )
    return Surface(cells, covariates, mode, settings, observed)


def _observations(
    cells: int,
    cell_index: np.ndarray,
    learning_rate: np.ndarray,
    batch_tokens: np.ndarray,
    loss: np.ndarray,
    diverged: np.ndarray | None,
    loss_se: np.ndarray | None,
) -> Observations:
    index = np.asarray(cell_index, dtype=int)
    rate, batch, values = (np.asarray(a, dtype=float) for a in (learning_rate, batch_tokens, loss))
    if any(a.shape != index.shape for a in (rate, batch, values)):
        raise UserError("cell_index, learning_rate, batch_tokens and loss must have equal lengths")
    if len(index) and not (index.min() >= 0 and index.max() < cells):
        raise UserError(f"cell_index must lie in 0..{cells - 1}")
    lost = ~np.isfinite(values)
    if diverged is not None:
        lost = lost | np.asarray(diverged, dtype=bool)
    if not ((rate > 0).all() and (batch > 0).all() and (values[~lost] > 0).all()):
        raise UserError("learning rates, batch sizes and losses must be positive")
    safe = np.where(lost, 1.0, values)
    relative = np.zeros(len(index)) if loss_se is None else np.nan_to_num(loss_se) / safe
    return Observations(
        cell=index,
        point=np.column_stack([np.log(rate), np.log(batch)]),
        log_loss=np.log(safe),
        diverged=lost,
        variance=np.where(lost, 0.0, relative) ** 2,
    )


def _far(cells: Sequence[CellFeatures], observed: Observations, far: float) -> np.ndarray:
    """[n] bool: trials that diverged, or ended so high that they tell no more than a diverged one.

    Far means above the best of the cell by `far` in ln loss. So that a cell whose every trial was
    bad is seen to be so, the best of any cell no larger in parameters, tokens and sparsity counts
    too: it should have been beaten.
    """
    finished = ~observed.diverged
    lowest = np.full(len(cells), np.inf)
    np.minimum.at(lowest, observed.cell[finished], observed.log_loss[finished])
    sizes = np.array([(cell.params, cell.tokens, cell.log_sparsity) for cell in cells])
    smaller = (sizes[None] <= sizes[:, None]).all(-1)
    reference = np.where(smaller, lowest, np.inf).min(1)
    return observed.diverged | (observed.log_loss > reference[observed.cell] + far)
