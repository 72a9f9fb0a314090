"""Surface: the fitted model of all trials, and what it says of any run's optimum and loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import stdtrit

from raysweep.errors import UserError
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.optima.arrow import jittered_cholesky
from raysweep.scaling.optima.fit import MapEstimate, fit_map
from raysweep.scaling.optima.literature import OptimumPrior, literature_prior
from raysweep.scaling.optima.model import (
    DEFAULT,
    LINEAR,
    Design,
    Layout,
    Observations,
    Problem,
    Settings,
    level_terms,
    predict_rows,
    sizes_of,
    valley_at,
)
from raysweep.scaling.optima.valley import best_rate, curvature, gap
from raysweep.scaling.quantities import EXPONENTS, TARGETS
from raysweep.study.shape import RunSize
from raysweep.text import short

_log = logging.getLogger("raysweep")

_MIN_DEGREES = 3.0  # of freedom of an interval; fewer make it wider than it need be
_MAX_ROUGHNESS = 0.25  # variance, in ln units, that a cell's fine grain may add to its optimum's
_VARIED = 0.1  # ln units over which a cell must vary its batch to tell of it
_SPANNED = 0.15  # sd of the cells along a direction of (ln N, ln D, ln sparsity), at least
_ASIDE = math.log(1.5)  # how far a run may lie off the cells along a direction they don't span


@dataclass(frozen=True)
class OptimumPosterior:
    """What is known of one run's optimum. Points are (ln learning rate, ln batch tokens)."""

    mean: np.ndarray  # [2]
    covariance: np.ndarray  # [2, 2]
    degrees: np.ndarray  # [2], of freedom of Student's t
    log_loss: float
    log_loss_sd: float
    valley: np.ndarray  # [PARAMETERS], the shape of the loss about it
    trials: int  # finished or diverged trials in this cell
    as_run: bool  # whether no cell varied its batch: then it is the one that was run

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

    @cached_property
    def curvature(self) -> np.ndarray:
        """[2, 2], the Hessian of ln loss at the optimum."""
        return curvature(self.valley)

    def interval(self, level: float = 0.95) -> np.ndarray:
        """[2, 2]: low and high end of ln learning rate, then of ln batch tokens (NaN as run)."""
        reach = stdtrit(self.degrees, 0.5 + level / 2)
        half = reach * np.sqrt(self.covariance.diagonal())
        half[1] = np.nan if self.as_run else half[1]
        return np.stack([self.mean - half, self.mean + half], -1)

    def largest_batches(self, within: Sequence[float]) -> list[tuple[float, float]]:
        """For each share of the loss that may be lost: by how much, in logs, the largest batch and
        the learning rate that is best there lie above the optimum's."""
        v = np.linspace(0.0, 6.0, 121)
        u = best_rate(v, self.valley)
        cost = np.maximum.accumulate(gap(u, v, self.valley))
        at = np.interp(np.log1p(within), cost, v)
        return [(float(a), float(b)) for a, b in zip(at, np.interp(at, v, u), strict=True)]

    def estimates(self, level: float = 0.95) -> tuple[Estimate, Estimate]:
        """The learning rate and the batch in tokens, with their intervals."""
        (low, high), (least, most) = np.exp(self.interval(level)).tolist()
        rate = Estimate(self.learning_rate, low, high)
        return rate, Estimate(self.batch_tokens, least, most)


@dataclass(frozen=True)
class OptimumLaws:
    """The power laws of the optimum, free of any cell's own effect.

    ln lr* and ln batch* are linear in the columns "intercept" (read at the ladder's mean logs), and
    the logs of "params" (active non-embedding), "tokens" and "sparsity" (total / active).
    """

    coefficients: np.ndarray  # [2, LINEAR]
    covariance: np.ndarray  # [2 LINEAR, 2 LINEAR], learning rate first
    prior_mean: np.ndarray  # [2 LINEAR]
    prior_covariance: np.ndarray
    degrees: np.ndarray  # [2], of freedom of Student's t: the cells' scatter is itself estimated
    centre: np.ndarray  # [2]

    @property
    def centre_sizes(self) -> np.ndarray:
        """[2], the N and D of the ladder's centre."""
        return np.exp(self.centre)

    @property
    def at_centre(self) -> np.ndarray:
        """[2], the learning rate and the batch in tokens there, of a dense model."""
        return np.exp(self.coefficients[:, 0])

    def exponent(self, target: str, name: str, level: float = 0.95) -> Estimate:
        """The exponent of `name` in the law of "learning_rate" or "batch_tokens".

        Raises:
            UserError: no such law, or no such column.
        """
        if target not in TARGETS or name not in EXPONENTS:
            raise UserError(
                f"no exponent of {name!r} in a law of {target!r}: laws are {', '.join(TARGETS)}, "
                f"exponents {', '.join(EXPONENTS)}"
            )
        axis, column = TARGETS.index(target), 1 + list(EXPONENTS).index(name)
        mean = float(self.coefficients[axis, column])
        index = axis * LINEAR + column
        reach = float(stdtrit(self.degrees[axis], 0.5 + level / 2))
        half = reach * float(self.covariance[index, index]) ** 0.5
        return Estimate(mean, mean - half, mean + half)

    def learned(self, target: str, name: str) -> float:
        """How much of the prior's variance of an exponent the data took away: 0 none, 1 all."""
        index = TARGETS.index(target) * LINEAR + 1 + list(EXPONENTS).index(name)
        left = self.covariance[index, index] / self.prior_covariance[index, index]
        return float(np.clip(1 - left, 0, 1))


@dataclass(frozen=True)
class CellDraws:
    """Joint posterior draws about one cell."""

    optima: np.ndarray  # [draws, 2]
    laws: np.ndarray  # [draws, 2, columns]
    levels: np.ndarray  # [draws], ln loss at the optimum
    gaps: np.ndarray  # [draws, points]


@dataclass(frozen=True)
class Surface:
    """The fitted model. Made by `fit_surface`."""

    cells: tuple[RunSize, ...]
    design: Design
    mode: MapEstimate
    settings: Settings
    prior: OptimumPrior
    problem: Problem

    @property
    def observed(self) -> Observations:
        """The trials as the fit saw them."""
        return self.problem.observed

    @property
    def batch_rule(self) -> np.ndarray | None:
        """[4], the law of the batch that was run, where no cell varied it: the rate is that at
        this batch. None where the batch was searched."""
        return self.problem.batch_rule

    @cached_property
    def trials(self) -> np.ndarray:
        """[cells], finished and diverged trials of each."""
        return np.bincount(self.observed.cell, minlength=len(self.cells))

    @cached_property
    def varied(self) -> tuple[bool, bool]:
        """Whether learning rate, and batch, were varied at all: other than as a power law of size,
        within cells or over them."""
        x = self.problem.rows[:, :LINEAR]
        if len(x) <= 1:
            return False, False
        rule, *_ = np.linalg.lstsq(x, self.observed.point, rcond=None)
        rate, batch = np.ptp(self.observed.point - x @ rule, axis=0) > _VARIED
        return bool(rate), bool(batch)

    @property
    def status(self) -> str:
        """`prior` without data, else `converged` or `not converged`."""
        if not len(self.observed.cell):
            return "prior"
        return "converged" if self.mode.converged else "not converged"

    @cached_property
    def sparse(self) -> bool:
        """Whether the cells differ in sparsity, so that its exponent is told at all."""
        return bool(np.ptp(sizes_of(self.cells)[:, 2]) > 1e-9)

    @property
    def bases(self) -> dict[str, str]:
        """By the exponents that its laws have, what is raised to them: `(N/6.47k)`, `(D/139k)`, and
        where it is told of sparsity `(total/active)`."""
        centre = zip(EXPONENTS.values(), self.laws.centre_sizes, strict=False)
        bases = [f"({symbol}/{short(float(value))})" for symbol, value in centre]
        bases += [f"({EXPONENTS['sparsity']})"] if self.sparse else []
        return dict(zip(EXPONENTS, bases, strict=False))

    @cached_property
    def laws(self) -> OptimumLaws:
        """The power laws of the optimum, with uncertainty."""
        linear = self._layout.linear
        return OptimumLaws(
            coefficients=self.mode.shared[linear].reshape(2, LINEAR),
            covariance=self.mode.covariance.shared[np.ix_(linear, linear)],
            prior_mean=self.problem.law_mean,
            prior_covariance=self.problem.law_covariance
            / self.problem.law_weight(self.mode.shared),
            degrees=np.maximum(self.mode.widths.known[1:], _MIN_DEGREES),
            centre=self.design.centre,
        )

    def law(self, run: RunSize) -> np.ndarray:
        """[2], (ln learning rate, ln batch) by the law alone, without a cell's own effect."""
        x = self.design.matrix([run])[0]
        return np.array([x @ self.mode.shared[law] for law in self._layout.law])

    def optimum(self, cell: RunSize | str) -> OptimumPosterior:
        """The posterior of a run's optimum, with or without trials, known to the fit or not."""
        run, index = self._find(cell)
        layout = self._layout
        parameters, covariance = self._one_cell(index)
        x = self.design.matrix([run])
        level, by_level = level_terms(parameters[layout.level], x)
        rows = np.zeros((3, len(parameters)))  # ln learning rate, ln batch, level
        for row, law in enumerate(layout.law):
            rows[row, law] = x[0]
            rows[row, layout.size + 1 + row] = 1.0
        rows[2, layout.level] = by_level[0]
        rows[2, layout.size] = 1.0
        spread = rows @ covariance @ rows.T
        valley = valley_at(parameters[: layout.size], x, layout)[0]
        return OptimumPosterior(
            mean=rows[:2] @ parameters,
            covariance=spread[:2, :2] + np.diag(self._roughness(valley) + self._beyond**2),
            degrees=self._degrees(spread.diagonal()[:2]),
            log_loss=float(level[0] + parameters[layout.size]),
            log_loss_sd=float(spread[2, 2] ** 0.5),
            valley=valley,
            trials=0 if index is None else int(self.trials[index]),
            as_run=self.batch_rule is not None,
        )

    @cached_property
    def _beyond(self) -> np.ndarray:
        """[2], in ln learning rate and ln batch how far the optima lie beyond all trials of all
        cells, on whichever side, and 0 where trials enclose them. There the valley's shape, which
        no trial has shown, decides where they lie: they are not known to better than that."""
        observed, layout = self.observed, self._layout
        seen = ~observed.diverged
        if not seen.any():
            return np.zeros(2)
        laws = np.stack([self.mode.shared[law] for law in layout.law], -1)
        off = observed.point[seen] - self.problem.rows[seen] @ laws
        beyond = np.maximum(np.maximum(off.min(0), -off.max(0)), 0.0)
        return beyond if self.batch_rule is None else beyond * [1.0, 0.0]

    def predict(
        self, cell: RunSize | str, learning_rate: np.ndarray, batch_tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sd of the loss (nats per token, noise left out) at points of one cell."""
        run, index = self._find(cell)
        learning_rate, batch_tokens = np.broadcast_arrays(learning_rate, batch_tokens)
        point = np.log(np.stack([learning_rate.ravel(), batch_tokens.ravel()], -1))
        if self.batch_rule is not None:
            point[:, 1] = self.law(run)[1]
        parameters, covariance = self._one_cell(index)
        size = self._layout.size
        log_loss, _, by_shared, by_own = predict_rows(
            parameters[:size],
            np.tile(parameters[size:], (len(point), 1)),
            np.tile(self.design.matrix([run]), (len(point), 1)),
            point,
            self._layout,
        )
        rows = np.concatenate([by_shared, by_own], axis=1)
        sd = np.sqrt(((rows @ covariance) * rows).sum(1))
        loss = np.exp(log_loss)
        return loss.reshape(learning_rate.shape), (loss * sd).reshape(learning_rate.shape)

    def largest_batch(self, cell: RunSize | str, within: float) -> tuple[float, float]:
        """(batch tokens, learning rate): the largest batch whose loss, at its own best learning
        rate, lies within the share `within` (.005 is .5 %) of the loss at the optimum."""
        optimum = self.optimum(cell)
        [(v, u)] = optimum.largest_batches([within])
        return float(np.exp(optimum.mean[1] + v)), float(np.exp(optimum.mean[0] + u))

    def unspanned(self, run: RunSize) -> tuple[str, ...]:
        """Names of the directions along which a run lies off the cells though they do not span
        them: there the answer follows the prior."""
        tried = self.trials > 0
        sizes = sizes_of([c for c, has in zip(self.cells, tried, strict=True) if has])
        if not len(sizes):
            return ("N", "D")
        off = sizes_of([run])[0] - sizes.mean(0)
        size, directions = np.linalg.eigh(np.atleast_2d(np.cov(sizes.T, bias=True)))
        names = ("N", "D", "sparsity")
        found: list[str] = []
        for variance, direction in zip(size, directions.T, strict=True):
            if math.sqrt(max(variance, 0.0)) >= _SPANNED or abs(direction @ off) < _ASIDE:
                continue
            parts = [n for n, part in zip(names, direction, strict=True) if abs(part) > 0.35]
            moved = [n for n, o in zip(names, off, strict=True) if n in parts and abs(o) > _SPANNED]
            found.append(" apart from ".join(parts) if len(parts) > 1 else (moved or parts)[0])
        return tuple(found)

    def edges(
        self,
        cell: RunSize | str,
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
        self, cell: RunSize | str, point: np.ndarray, count: int, rng: np.random.Generator
    ) -> CellDraws:
        """Joint posterior draws for one cell, with its gaps at `point` [n, 2]."""
        run, index = self._find(cell)
        layout = self._layout
        parameters, covariance = self._one_cell(index)
        noise = _matched_normals(count, len(parameters), rng)
        draws = parameters + noise @ jittered_cholesky(covariance).T
        x = self.design.matrix([run])
        laws = np.stack([draws[:, law] for law in layout.law], 1)
        own = draws[:, layout.size :]
        optima = laws @ x[0] + own[:, 1:]
        level, by_level = level_terms(parameters[layout.level], x)
        moved = (draws[:, layout.level] - parameters[layout.level]) @ by_level[0]
        u, v = (point[None] - optima[:, None]).transpose(2, 0, 1)
        return CellDraws(
            optima=optima,
            laws=laws,
            levels=level[0] + moved + own[:, 0],
            gaps=gap(u, v, valley_at(draws, x, layout)),
        )

    def sample_optima(
        self, runs: Sequence[RunSize], count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Joint draws of the optima (ln learning rate, ln batch) of runs, [count, runs, 2]."""
        mode, layout = self.mode, self._layout
        root = jittered_cholesky(mode.covariance.shared)
        moved = rng.standard_normal((count, layout.size)) @ root.T
        x = self.design.matrix(runs)
        shared = mode.shared + moved
        optima = np.stack([shared[:, law] @ x.T for law in layout.law], -1)
        for i, run in enumerate(runs):
            index = self._index.get(run.name)
            own = rng.standard_normal((count, 3)) * mode.widths.own
            if index is not None:
                cross = mode.covariance.cross[index]  # [S, 3]
                slope = np.linalg.solve(mode.covariance.shared, cross)
                left = mode.covariance.own[index] - cross.T @ slope
                own = rng.standard_normal((count, 3)) @ jittered_cholesky(left).T
                own += mode.own[index] + moved @ slope
            grain = np.sqrt(self._roughness(valley_at(mode.shared, x[i : i + 1], layout)[0]))
            optima[:, i] += own[:, 1:] + grain * rng.standard_normal((count, 2))
        return optima

    def group_offset(self, group: str) -> float:
        """ln loss of a group over the mean of all, other things equal; 0 without several."""
        if group not in self.design.groups:
            return 0.0
        return math.log(self.group_effect(group)[2].value)

    def group_effect(self, group: str) -> tuple[Estimate, Estimate, Estimate]:
        """A group's learning rate, batch and loss over the mean of all, other things equal; no
        batch where none was varied.

        Raises:
            UserError: no such group among several.
        """
        if group not in self.design.groups:
            known = ", ".join(self.design.groups) or "none: the results were not grouped"
            raise UserError(f"no group {group!r} in this fit; known: {known}")
        which = len(self.design.routings) + self.design.groups.index(group)
        every = len(self.design.routings) + np.arange(len(self.design.groups))
        found = []
        for index, block in zip(
            self._layout.offset(np.array([which])), self._layout.offset(every), strict=True
        ):
            row = np.zeros(self._layout.size)
            row[index] = 1.0
            row[block] -= 1.0 / len(every)
            mean = float(row @ self.mode.shared)
            half = 1.96 * float(row @ self.mode.covariance.shared @ row) ** 0.5
            found.append(Estimate(*np.exp([mean, mean - half, mean + half]).tolist()))
        loss, rate, batch = found
        if self.batch_rule is not None:
            batch = Estimate.missing("no cell varied its batch")
        return rate, batch, loss

    def noise_variance(self, gaps: np.ndarray) -> np.ndarray:
        """Variance of one run's ln loss at a given gap."""
        return self.mode.widths.noise**2 + (self.mode.widths.growth * gaps) ** 2

    def _degrees(self, variance: np.ndarray) -> np.ndarray:
        """[2], Satterthwaite's degrees of freedom: of the optimum's variance, only the share of
        the cells' scatter is itself estimated."""
        widths = self.mode.widths
        share = np.clip(widths.own[1:] ** 2 / np.maximum(variance, 1e-18), 1e-3, 1.0)
        return np.maximum(widths.known[1:] / share**2, _MIN_DEGREES)

    def _roughness(self, valley: np.ndarray) -> np.ndarray:
        """[2], by how much (variance, ln units) the fine grain of a cell's losses moves the optimum
        that one would read off a smoothed grid."""
        settings = self.settings
        inverse = np.linalg.inv(curvature(valley))
        grain = (self.mode.widths.noise / settings.roughness_reach) ** 2
        rough = settings.roughness_share * grain * (inverse @ inverse).diagonal()
        return np.minimum(rough, _MAX_ROUGHNESS)

    @cached_property
    def _layout(self) -> Layout:
        return self.problem.layout

    @cached_property
    def _index(self) -> dict[str, int]:
        return {cell.name: i for i, cell in enumerate(self.cells)}

    def _find(self, cell: RunSize | str) -> tuple[RunSize, int | None]:
        name = cell if isinstance(cell, str) else cell.name
        index = self._index.get(name)
        if index is not None:
            return self.cells[index], index
        if isinstance(cell, str):
            raise UserError(f"no cell {cell!r} in this fit: give its RunSize to predict it")
        return cell, None

    def _one_cell(self, index: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Shared parameters, then the three of a cell's own, and their covariance."""
        mode, size = self.mode, self._layout.size
        covariance = np.zeros((size + 3, size + 3))
        covariance[:size, :size] = mode.covariance.shared
        if index is not None:
            cross = mode.covariance.cross[index]
            covariance[:size, size:], covariance[size:, :size] = cross, cross.T
            covariance[size:, size:] = mode.covariance.own[index]
            return np.r_[mode.shared, mode.own[index]], covariance
        covariance[range(size, size + 3), range(size, size + 3)] = mode.widths.own**2
        return np.r_[mode.shared, np.zeros(3)], covariance


def _matched_normals(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """[count, size], normal draws whose sample mean and covariance are exactly 0 and 1.

    What is regressed across a hundred draws of some fifty parameters would otherwise rest on chance
    correlations. Too few draws for that stay as they are.
    """
    draws = rng.standard_normal((count, size))
    if count < 1.25 * size:
        return draws
    draws -= draws.mean(0)
    return np.linalg.solve(np.linalg.cholesky(draws.T @ draws / count), draws.T).T


def fit_surface(
    cells: Sequence[RunSize],
    cell_index: np.ndarray,
    learning_rate: np.ndarray,
    batch_tokens: np.ndarray,
    loss: np.ndarray,
    diverged: np.ndarray | None = None,
    loss_se: np.ndarray | None = None,
    *,
    prior: OptimumPrior | None = None,
    settings: Settings = DEFAULT,
    batch_searched: bool = False,
    warm: Surface | None = None,
) -> Surface:
    """Fit the model to trials of any number of cells.

    Args:
        cells: the cells, of distinct names, with or without trials.
        cell_index: [n], each trial's position in `cells`.
        learning_rate: [n], peak.
        batch_tokens: [n].
        loss: [n], nats per token; ignored where diverged.
        diverged: [n] bool. A trial with a loss that is not finite counts as diverged.
        loss_se: [n], known standard error of each loss (of several seeds, or of evaluation), added
            to the noise that is learned; nan where unknown.
        prior: of the law of the optimum; the literature's by default.
        settings: prior widths and constants.
        batch_searched: the batch is known to be searched, though no cell may have varied it yet.
            Otherwise trials that never vary it are fitted as of the batch that was run.
        warm: a fit of nearly the same trials, whose mode is followed: quicker, and blind to others.

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
    prior = prior or literature_prior()
    if not len(observed.cell):
        _log.info("no trials yet: optima are guessed from published laws, a weak prior")
    design = Design.of(cells)
    far = _far(cells, observed, settings.far)
    rule = None if batch_searched else _batch_rule(cells, design, observed)
    problem = Problem(observed, far, design, cells, prior, settings, rule)
    followed = warm.mode if warm is not None and design.same(warm.design) else None
    mode = fit_map(problem, followed)
    return Surface(cells, design, mode, settings, prior, problem)


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


def _far(cells: Sequence[RunSize], observed: Observations, far: float) -> np.ndarray:
    """[n] bool: trials that diverged, or ended so high that they tell no more than a diverged one.

    Far means above the best of the cell by `far` in ln loss. So that a cell whose every trial was
    bad is seen to be so, the best of any cell of its group no larger in parameters, tokens and
    sparsity counts too: it should have been beaten.
    """
    finished = ~observed.diverged
    lowest = np.full(len(cells), np.inf)
    np.minimum.at(lowest, observed.cell[finished], observed.log_loss[finished])
    sizes = sizes_of(cells)
    groups = np.array([cell.group for cell in cells])
    smaller = (sizes[None] <= sizes[:, None]).all(-1) & (groups[None] == groups[:, None])
    reference = np.where(smaller, lowest, np.inf).min(1)
    return observed.diverged | (observed.log_loss > reference[observed.cell] + far)


def _batch_rule(
    cells: Sequence[RunSize], design: Design, observed: Observations
) -> np.ndarray | None:
    """[4], the law of the batch that was run in 1, n, d, s, if no cell varied its batch; else None.

    Needs several runs in some cell: one run a cell tells neither of a rule nor of a search."""
    batch = observed.point[:, 1]
    count = np.bincount(observed.cell, minlength=len(cells))
    if not (count > 1).any():
        return None
    low, high = np.full(len(cells), np.inf), np.full(len(cells), -np.inf)
    np.minimum.at(low, observed.cell, batch)
    np.maximum.at(high, observed.cell, batch)
    if (high - low)[count > 1].max() > _VARIED:
        return None
    seen = count > 0
    x = design.matrix(cells)[seen][:, :LINEAR]
    middle = 0.5 * (low + high)[seen]
    # Sizes that the cells do not span leave the rule's exponent at zero.
    ridge = np.diag([1e-9, 1e-3, 1e-3, 1e-3])
    return np.linalg.solve(x.T @ x + ridge, x.T @ middle)
