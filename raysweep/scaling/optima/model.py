"""The one model of all trials: its parameters, prior, and what trials leave unexplained.

    ln L = level_c + gap(p - m_c; valley_c) + noise        p = (ln learning rate, ln batch tokens)
    m_c = law(N, D, sparsity) + departure + offset of routing and group + shift of the cell
    level_c = ln(floor + term in N and sparsity + term in D) + offset of the group + own effect

README.md in `scaling/` explains it in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from raysweep.scaling.optima.arrow import Grouping
from raysweep.scaling.optima.literature import BATCH_SLOPE, COLUMNS, OptimumPrior
from raysweep.scaling.optima.valley import (
    DIRECTIONS,
    PARAMETERS,
    TERMS,
    gap_derivatives,
    slope_derivatives,
)
from raysweep.study.shape import RunSize

LINEAR = len(COLUMNS)
BENDS = ("params params", "params tokens", "tokens tokens")
LEVEL_NAMES = ("level", "ln N term", "ln D term", "ln N exponent", "ln D exponent", "experts")
LEVEL_LAW = len(LEVEL_NAMES)
CHINCHILLA = (482.0 / 1.817, 0.348, 2085.0 / 1.817, 0.366)
"""Terms over the floor and exponents of Chinchilla's law: Besiroglu et al., arXiv 2404.10102."""


@dataclass(frozen=True)
class Settings:
    """Prior widths and constants. Logs are natural; widths are sds.

    A width called guess is learned from the data; its weight is how many effects it counts for.
    """

    log_weight: float = 1.5  # of each ln weight of the valley's terms
    log_curvature_mean: float = math.log(0.004)  # of a term's part in the valley's curvature
    log_rate: float = 0.3  # of the ln rates that stretch the valley's axes
    scale_slope: float = 0.15  # of the valley's ln depth per nat of parameters or tokens
    term_slope_guess: float = 0.03  # of each term's own ln weight, the same
    term_slope_weight: float = 8.0
    bend_guess: float = 0.03  # second derivatives of ln lr*, ln batch* per nat^2: no law is exact
    bend_weight: float = 30.0  # hardly learned: a level's misfit would be booked as a bend
    level_bend_guess: float = 0.003  # the same of ln loss: no law of the loss is exact either
    level_bend_weight: float = 4.0
    shift_guess: float = 0.1  # a cell's own effect on its optimum, in ln lr and ln batch
    shift_weight: float = 2.0
    level_guess: float = 0.004  # a cell's own effect on its ln loss; full sweeps show .003 to .0045
    level_weight: float = 6.0
    routing_guess: tuple[float, float, float] = (0.01, 0.15, 0.15)  # level, ln lr, ln batch
    group_guess: tuple[float, float, float] = (0.02, 0.6, 0.3)
    offset_weight: float = 2.0
    share_sd: float = 0.5  # of the ln terms of the loss over its floor, at the ladder's centre
    power_sd: float = 0.2  # of their ln exponents
    noise_guess: float = 0.002  # sd of ln loss at the optimum
    growth_guess: float = 0.2  # noise sd per unit of gap
    noise_weight: float = 1.0
    far: float = 0.1  # a gap beyond this carries no more than "at least this far"
    diverged_distance: float = 1.0  # ln lr of a diverged run above its cell's optimum, at least
    diverged_sd: float = 0.5  # and how surely
    roughness_length: float = 0.25  # runs closer than this, in ln units, share their noise
    roughness_share: float = 0.5  # of a run's deviation: what would recur at the same point
    roughness_reach: float = 0.7  # ln units over which a grid is smoothed when it is read
    student: float = 6.0  # degrees of freedom of the noise: outliers weigh less


DEFAULT = Settings()


@dataclass(frozen=True)
class Observations:
    """Trials as arrays of equal length: cell index, (ln lr, ln batch tokens), ln loss, and kind."""

    cell: np.ndarray  # [n] int
    point: np.ndarray  # [n, 2]
    log_loss: np.ndarray  # [n]; unused where `diverged`
    diverged: np.ndarray  # [n] bool: only "the learning rate is too high" is known
    variance: np.ndarray  # [n]: known variance of ln loss, added to the learned noise


@dataclass(frozen=True)
class Design:
    """The regressors of the laws: sizes about the ladder's centre, bends, and offsets.

    Routings (experts, top_k) of MoE cells have offsets where there are two or more (the sparsity
    already sets a single one apart from dense), groups where there are two or more.
    """

    centre: np.ndarray  # [2]: the ln N and ln D at which intercepts are read
    routings: tuple[tuple[int, int], ...]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, cells: Sequence[RunSize]) -> Design:
        """The regressors that these cells can tell apart."""
        sizes = sizes_of(cells)
        sparse = sorted({cell.routing for cell in cells if cell.log_sparsity > 0})
        groups = sorted({cell.group for cell in cells})
        return cls(
            centre=sizes[:, :2].mean(0),
            routings=tuple(sparse) if len(sparse) > 1 else (),
            groups=tuple(groups) if len(groups) > 1 else (),
        )

    def same(self, other: Design) -> bool:
        """Whether parameters fitted with the other mean the same here."""
        named = (self.routings, self.groups) == (other.routings, other.groups)
        return named and np.allclose(self.centre, other.centre, rtol=0, atol=1e-9)

    @property
    def offsets(self) -> int:
        """How many offsets a law has."""
        return len(self.routings) + len(self.groups)

    def matrix(self, cells: Sequence[RunSize]) -> np.ndarray:
        """[cells, 1, N, D, sparsity; three bends; offsets]."""
        n, d, s = (sizes_of(cells) - [*self.centre, 0.0]).T
        columns = [np.ones(len(n)), n, d, s, n * n / 2, n * d, d * d / 2]
        columns += [np.array([float(c.routing == r) for c in cells]) for r in self.routings]
        columns += [np.array([float(c.group == r) for c in cells]) for r in self.groups]
        return np.column_stack(columns)


def sizes_of(cells: Sequence[RunSize]) -> np.ndarray:
    """[cells, 3]: ln N (active non-embedding), ln D, ln(total / active)."""
    return np.array(
        [(np.log(c.params_active_non_embedding), np.log(c.tokens), c.log_sparsity) for c in cells]
    ).reshape(-1, 3)


@dataclass(frozen=True)
class Layout:
    """Where each block lies in the vector of shared parameters."""

    offsets: int

    @cached_property
    def columns(self) -> int:
        """Coefficients of one target's law."""
        return LINEAR + len(BENDS) + self.offsets

    @cached_property
    def law(self) -> tuple[slice, slice]:
        """Of ln lr* and of ln batch*."""
        return slice(0, self.columns), slice(self.columns, 2 * self.columns)

    @cached_property
    def valley(self) -> slice:
        """Of the valley's ln weights and ln rates at the centre."""
        return slice(2 * self.columns, 2 * self.columns + PARAMETERS)

    @cached_property
    def scale(self) -> slice:
        """Of the valley's ln depth, per nat of N and of D."""
        return slice(self.valley.stop, self.valley.stop + 2)

    @cached_property
    def slopes(self) -> slice:
        """Of each term's ln weight: all per nat of N, then all per nat of D."""
        return slice(self.scale.stop, self.scale.stop + 2 * TERMS)

    @cached_property
    def level(self) -> slice:
        """Of ln loss at the optimum: `LEVEL_NAMES`, then bends, then offsets."""
        return slice(self.slopes.stop, self.slopes.stop + LEVEL_LAW + len(BENDS) + self.offsets)

    @cached_property
    def size(self) -> int:
        """Number of shared parameters."""
        return self.level.stop

    @cached_property
    def linear(self) -> np.ndarray:
        """The coefficients that the literature speaks of."""
        return np.concatenate([law.start + np.arange(LINEAR) for law in self.law])

    @cached_property
    def bends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The smooth departures from the laws, of the level, of ln lr* and of ln batch*."""
        rate, batch = (law.start + LINEAR + np.arange(len(BENDS)) for law in self.law)
        return self.level.start + LEVEL_LAW + np.arange(len(BENDS)), rate, batch

    def offset(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those numbered `which`: of the level, of ln lr*, of ln batch*."""
        first = LINEAR + len(BENDS)
        rate, batch = (law.start + first + which for law in self.law)
        return self.level.start + LEVEL_LAW + len(BENDS) + which, rate, batch


@dataclass(frozen=True)
class Component:
    """Shared parameters of one learned width."""

    index: np.ndarray
    guess: float
    weight: float


@dataclass(frozen=True)
class VarianceComponents:
    """What is learned about spread."""

    own: np.ndarray  # [3]: sd of a cell's level, shift in ln lr, shift in ln batch
    known: np.ndarray  # [3]: how many effects, the guess's weight included, each is learned from
    shared: np.ndarray  # one sd for each `Component`
    noise: float
    growth: float

    def change(self, other: VarianceComponents) -> float:
        """The largest relative change between two."""
        both = [np.array([*w.own, *w.shared, w.noise, w.growth]) for w in (self, other)]
        return float(np.abs(np.log(both[0] / both[1])).max())


def level_terms(q: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln of the law of the loss over its value at the centre, and its derivatives.

    L / L_centre = (1 + e^(tN - a (n + g s)) + e^(tD - b d)) / (1 + e^tN + e^tD), with q = (level,
    tN, tD, ln a, ln b, g, bends, offsets) and n, d, s columns 1 to 3 of `x` [n, columns]:
    Chinchilla's law in which total over active parameters count as N^g; bends and offsets add to
    its ln.

    Returns:
        ln loss [n], and the Jacobian [n, len(q)].
    """
    level, tn, td, log_a, log_b, g = q[:LEVEL_LAW]
    a, b = np.exp(log_a), np.exp(log_b)
    n, d, s = x[:, 1] + g * x[:, 3], x[:, 2], x[:, 3]
    en, ed = np.exp(np.clip(tn - a * n, -30, 30)), np.exp(np.clip(td - b * d, -30, 30))
    total, centre = 1 + en + ed, 1 + np.exp(tn) + np.exp(td)
    share_n, share_d = en / total, ed / total
    added = x[:, LINEAR:]
    jacobian = np.column_stack(
        [
            np.ones(len(n)),
            share_n - np.exp(tn) / centre,
            share_d - np.exp(td) / centre,
            -share_n * a * n,
            -share_d * b * d,
            -share_n * a * s,
            added,
        ]
    )
    value = level + np.log(total / centre) + added @ q[LEVEL_LAW:]
    return value, jacobian


def valley_at(shared: np.ndarray, x: np.ndarray, layout: Layout) -> np.ndarray:
    """[..., n, PARAMETERS]: the valley at rows `x` [n, columns], for parameters [..., S]."""
    base, scale = shared[..., None, layout.valley], shared[..., None, layout.scale]
    slopes = shared[..., None, layout.slopes]
    n, d = x[:, 1:2], x[:, 2:3]
    weights = (
        base[..., :TERMS]
        + n * (scale[..., :1] + slopes[..., :TERMS])
        + d * (scale[..., 1:] + slopes[..., TERMS:])
    )
    rates = np.broadcast_to(base[..., TERMS:], (*weights.shape[:-1], 2))
    return np.concatenate([weights, rates], -1)


def predict_rows(
    shared: np.ndarray, own: np.ndarray, x: np.ndarray, point: np.ndarray, layout: Layout
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Predictions of ln loss and their derivatives.

    Args:
        shared: [S] parameters.
        own: [n, 3], the effects of each row's cell: level, shift in ln lr, shift in ln batch.
        x: [n, columns], the regressors of each row's cell.
        point: [n, 2], (ln learning rate, ln batch tokens).
        layout: where things lie in `shared`.

    Returns:
        ln loss [n], gap [n], and the Jacobian of ln loss by shared [n, S] and own [n, 3].
    """
    u, v = (point - x @ np.stack([shared[law] for law in layout.law], -1) - own[:, 1:]).T
    value, by_point, by_valley = gap_derivatives(u, v, valley_at(shared, x, layout))
    level, by_level = level_terms(shared[layout.level], x)
    by_weight = by_valley[:, :TERMS]
    by_shared = np.empty((len(x), layout.size))
    for axis, law in enumerate(layout.law):
        by_shared[:, law] = -by_point[:, axis, None] * x
    by_shared[:, layout.valley] = by_valley
    by_shared[:, layout.scale] = by_weight.sum(1, keepdims=True) * x[:, 1:3]
    by_shared[:, layout.slopes] = np.hstack([by_weight * x[:, 1:2], by_weight * x[:, 2:3]])
    by_shared[:, layout.level] = by_level
    by_own = np.column_stack([np.ones(len(x)), -by_point])
    return level + own[:, 0] + value, value, by_shared, by_own


@dataclass(frozen=True)
class Point:
    """The model at some parameters: what the trials leave unexplained, and how that would change.

    Of a trial that is only known to be far, the residual is what it lacks in distance.
    """

    shared: np.ndarray  # [S]
    own: np.ndarray  # [C, 3]
    residual: np.ndarray  # [n]
    gap: np.ndarray  # [n]
    by_shared: np.ndarray  # [n, S]
    by_own: np.ndarray  # [n, 3]


class Problem:
    """One fit's data and prior.

    `batch_rule` [4], the coefficients of ln batch in 1, n, d, s, says that no cell varied its
    batch: every trial then lies at its cell's own batch, and the law of the rate is that at the
    rule's.
    """

    def __init__(
        self,
        observed: Observations,
        far: np.ndarray,
        design: Design,
        cells: Sequence[RunSize],
        prior: OptimumPrior,
        settings: Settings,
        batch_rule: np.ndarray | None = None,
    ) -> None:
        self.far, self.near, self.settings = far, ~far, settings
        self.design, self.layout = design, Layout(design.offsets)
        self.x = design.matrix(cells)
        self.rows = self.x[observed.cell]
        self.batch_rule = batch_rule
        if batch_rule is not None:
            ruled = observed.point.copy()
            ruled[:, 1] = self.rows[:, :LINEAR] @ batch_rule
            observed = replace(observed, point=ruled)
        self.observed = observed
        self.trials_of = Grouping(observed.cell, len(self.x))
        self.repeats = effective_repeats(observed, settings.roughness_length)
        self._set_prior(prior.at(design.centre))

    def _set_prior(self, prior: OptimumPrior) -> None:
        settings, layout = self.settings, self.layout
        mean, scale = prior.mean, prior.scale
        if self.batch_rule is not None:
            # The rate at the rule's batch: ln lr* + BATCH_SLOPE (rule - ln batch*).
            to_rule = np.zeros((2 * LINEAR, 2 * LINEAR))
            to_rule[:LINEAR] = np.hstack([np.eye(LINEAR), -BATCH_SLOPE * np.eye(LINEAR)])
            mean = to_rule @ mean + np.r_[BATCH_SLOPE * self.batch_rule, self.batch_rule]
            exact = np.r_[np.zeros(LINEAR), np.full(LINEAR, 1e-3**2)]
            scale = to_rule @ scale @ to_rule.T + np.diag(exact)
        self.law_mean, self.law_degrees = mean, prior.degrees
        self.law_covariance = scale
        self.law_precision = np.linalg.inv(scale)
        n, d = self.design.centre
        over_n, a, over_d, b = CHINCHILLA
        typical = self.observed.log_loss[self.near]
        self.mean, self.sd = np.zeros(layout.size), np.ones(layout.size)
        self.mean[layout.linear] = mean
        terms = layout.valley.start + np.arange(TERMS)
        # Each term is expected to add as much to the curvature: steep ones weigh less.
        self.mean[terms] = settings.log_curvature_mean - np.log((DIRECTIONS**2).sum(1))
        self.sd[terms] = settings.log_weight
        self.sd[layout.valley.start + TERMS : layout.valley.stop] = settings.log_rate
        self.sd[layout.scale] = settings.scale_slope
        # Far below the sizes that the law was measured at, its terms say less and less.
        share_n, less_n = _tempered(math.log(over_n) - a * n, settings.share_sd)
        share_d, less_d = _tempered(math.log(over_d) - b * d, settings.share_sd)
        level = layout.level.start + np.arange(LEVEL_LAW)
        self.mean[level] = [
            float(typical.mean()) if len(typical) else 1.0,
            share_n,
            share_d,
            math.log(a),
            math.log(b),
            0.4,
        ]
        self.sd[level] = [1.0, less_n, less_d, settings.power_sd, settings.power_sd, 0.3]
        self.components = self._components()

    def _components(self) -> list[Component]:
        settings, layout, design = self.settings, self.layout, self.design
        level, rate, batch = layout.bends
        bends = rate if self.batch_rule is not None else np.r_[rate, batch]
        slopes = np.arange(layout.slopes.start, layout.slopes.stop)
        found = [
            Component(bends, settings.bend_guess, settings.bend_weight),
            Component(level, settings.level_bend_guess, settings.level_bend_weight),
            Component(slopes, settings.term_slope_guess, settings.term_slope_weight),
        ]
        first = 0
        for names, guesses in (
            (design.routings, settings.routing_guess),
            (design.groups, settings.group_guess),
        ):
            which = first + np.arange(len(names))
            first += len(names)
            if len(names):
                found += [
                    Component(index, guess, settings.offset_weight)
                    for index, guess in zip(layout.offset(which), guesses, strict=True)
                ]
        return found

    @property
    def own_guess(self) -> np.ndarray:
        """[3], of the cells' own effects: level, ln lr, ln batch."""
        settings = self.settings
        batch = settings.shift_guess if self.batch_rule is None else 1e-4
        return np.array([settings.level_guess, settings.shift_guess, batch])

    @property
    def own_weight(self) -> np.ndarray:
        """[3], how many effects each guess counts for."""
        settings = self.settings
        return np.array([settings.level_weight, settings.shift_weight, settings.shift_weight])

    def first_widths(self) -> VarianceComponents:
        """The guesses."""
        settings = self.settings
        return VarianceComponents(
            own=self.own_guess,
            known=self.own_weight,
            shared=np.array([c.guess for c in self.components]),
            noise=settings.noise_guess,
            growth=settings.growth_guess,
        )

    def sds(self, widths: VarianceComponents) -> np.ndarray:
        """[S], prior sd of each shared parameter that the literature does not speak of."""
        sd = self.sd.copy()
        for component, width in zip(self.components, widths.shared, strict=True):
            sd[component.index] = width
        if self.batch_rule is not None:
            sd[self.layout.bends[2]] = 1e-4
            sd[self.layout.offset(np.arange(self.design.offsets))[2]] = 1e-4
        return sd

    def law_weight(self, shared: np.ndarray) -> float:
        """By how much the t's precision at a law exceeds its scale matrix's inverse."""
        dimensions = 2 * LINEAR
        return (self.law_degrees + dimensions) / (self.law_degrees + self.law_distance(shared))

    def law_distance(self, shared: np.ndarray) -> float:
        """Squared Mahalanobis distance of the law from the literature's."""
        off = shared[self.layout.linear] - self.law_mean
        return float(off @ self.law_precision @ off)

    def at(self, shared: np.ndarray, own: np.ndarray) -> Point:
        """The model at these parameters."""
        observed, settings, layout = self.observed, self.settings, self.layout
        lost, high = observed.diverged, self.far & ~observed.diverged
        each = own[observed.cell]
        predicted, gap, by_shared, by_own = predict_rows(
            shared, each, self.rows, observed.point, layout
        )
        residual = observed.log_loss - predicted
        if high.any():
            residual[high] = np.maximum(settings.far - gap[high], 0)
            by_shared[high, layout.level] = 0.0
            by_own[high, 0] = 0.0
        if lost.any():
            rows, law = self.rows[lost], layout.law[0]
            above = observed.point[lost, 0] - rows @ shared[law] - each[lost, 1]
            residual[lost] = np.maximum(settings.diverged_distance - above, 0)
            by_shared[lost] = 0.0
            by_shared[lost, law] = -rows
            by_own[lost] = [0.0, -1.0, 0.0]
        enough = self.far & (residual <= 0)
        by_shared[enough] = 0.0
        by_own[enough] = 0.0
        return Point(shared, own, residual, gap, by_shared, by_own)

    def noise_gap(self, point: Point) -> np.ndarray:
        """[n], the gap that the noise of each trial goes by."""
        far = self.settings.far
        return np.where(self.far, far, np.minimum(point.gap, 2 * far))

    def variance(self, widths: VarianceComponents, gaps: np.ndarray) -> np.ndarray:
        """[n], squared scale of each residual."""
        noise = widths.noise**2 + (widths.growth * gaps) ** 2 + self.observed.variance
        diverged = self.settings.diverged_sd**2
        return np.where(self.observed.diverged, diverged, noise * self.repeats)

    def cost(self, point: Point, widths: VarianceComponents, variance: np.ndarray) -> float:
        """Minus the log posterior of the parameters, but for a constant; residuals are Student's
        t."""
        nu, dim = self.settings.student, 2 * LINEAR
        misfit = (nu + 1) * np.log1p(point.residual**2 / (nu * variance)).sum()
        law = (self.law_degrees + dim) * np.log1p(
            self.law_distance(point.shared) / self.law_degrees
        )
        z = (point.shared - self.mean) / self.sds(widths)
        z[self.layout.linear] = 0.0
        return 0.5 * float(misfit + law + (z**2).sum() + ((point.own / widths.own) ** 2).sum())

    def width_cost(self, point: Point, widths: VarianceComponents, variance: np.ndarray) -> float:
        """What `cost` lacks where widths differ: normalizing constants, and priors of widths."""
        settings = self.settings
        total = 0.5 * np.log(variance).sum() + len(point.own) * np.log(widths.own).sum()
        weight, guess = self.own_weight, self.own_guess
        total += (weight * (np.log(widths.own) + 0.5 * (guess / widths.own) ** 2)).sum()
        for component, width in zip(self.components, widths.shared, strict=True):
            total += len(component.index) * math.log(width)
            total += component.weight * (math.log(width) + 0.5 * (component.guess / width) ** 2)
        noise = math.log(widths.noise / settings.noise_guess) ** 2
        growth = math.log(widths.growth / settings.growth_guess) ** 2
        return float(total + 0.5 * settings.noise_weight * (noise + growth))

    def normal_equations(
        self, point: Point, widths: VarianceComponents, variance: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Blocks (head, cross, tail) of the precision, and the downhill gradient (shared, own)."""
        nu, layout = self.settings.student, self.layout
        weight = (nu + 1) / (nu + point.residual**2 / variance) / variance
        prior = np.diag(self.sds(widths) ** -2.0)
        heavy = self.law_weight(point.shared)
        prior[np.ix_(layout.linear, layout.linear)] = heavy * self.law_precision
        weighted = point.by_own * weight[:, None]
        head = (point.by_shared * weight[:, None]).T @ point.by_shared + prior
        cross = self.trials_of.outer(point.by_shared, weighted)
        tail = self.trials_of.outer(point.by_own, weighted)
        tail[:, range(3), range(3)] += widths.own**-2
        pull = point.by_shared.T @ (weight * point.residual)
        # Gauss-Newton leaves out second derivatives; that in a ln weight is known: keep what is
        # safe.
        terms = np.arange(TERMS) + layout.valley.start
        head[terms, terms] += np.maximum(-pull[terms], 0)
        shared = pull - prior @ (point.shared - self.mean)
        own = self.trials_of.sum(weighted * point.residual[:, None]) - point.own / widths.own**2
        return (head, cross, tail), (shared, own)


def shape_bias(
    problem: Problem, point: Point, variance: np.ndarray, tail: np.ndarray
) -> np.ndarray:
    """[S], the gradient of half the ln determinant of the precision `tail` [cells, 3, 3] of the
    cells' own effects, in the valley's shape.

    Added to that of `Problem.cost`, it puts the shape where the cells' effects are integrated out.
    At the joint mode every cell's optimum bends towards its trials, and with many cells of few
    trials the valley comes out too steep: Neyman and Scott, Econometrica 16, 1948. Weights and
    noise are held; trials that are only known to be far count for nothing here.
    """
    layout, observed, nu = problem.layout, problem.observed, problem.settings.student
    near = problem.near
    cell, x, by_own = observed.cell[near], problem.rows[near], point.by_own[near]
    residual, variance = point.residual[near], variance[near]
    weight = (nu + 1) / (nu + residual**2 / variance) / variance
    pull = np.einsum("nij,nj->ni", np.linalg.inv(tail)[cell], by_own)[:, 1:]
    centre = x @ np.stack([point.shared[law] for law in layout.law], -1) + point.own[cell, 1:]
    u, v = (observed.point[near] - centre).T
    change = slope_derivatives(u, v, valley_at(point.shared, x, layout))
    each = -weight[:, None] * np.einsum("na,nap->np", pull, change)
    terms = each[:, :TERMS]
    bias = np.zeros(layout.size)
    bias[layout.valley] = each.sum(0)
    bias[layout.scale] = terms.sum(1) @ x[:, 1:3]
    bias[layout.slopes] = (x[:, 1:3].T @ terms).ravel()
    return bias


def _tempered(log_share: float, sd: float) -> tuple[float, float]:
    """(mean, sd) of a term's ln share of the floor: no term is taken for more than e^0.7 floors,
    and the further it was cut, the less is said."""
    mean = min(log_share, 0.7)
    return mean, math.hypot(sd, 0.5 * (log_share - mean))


def rbf_kernel(point: np.ndarray, length: float) -> np.ndarray:
    """[n, n], squared-exponential correlation of the noise of runs at points [n, 2]."""
    square = ((point[:, None] - point) ** 2).sum(-1)
    return np.exp(-0.5 * square / length**2)


def effective_repeats(observed: Observations, length: float) -> np.ndarray:
    """[n], how many runs of its cell each run shares its noise with, itself counted."""
    repeats = np.ones(len(observed.cell))
    order = np.argsort(observed.cell, kind="stable")
    edges = np.flatnonzero(np.diff(observed.cell[order])) + 1
    for rows in np.split(order, edges):
        repeats[rows] = rbf_kernel(observed.point[rows], length).sum(1)
    return repeats
