"""The optimum of a cell: where in (learning rate, batch) its loss is least, by named methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raysweep.errors import UserError
from raysweep.scaling.cells import CellTrials
from raysweep.scaling.one_cell import argmin, interpolate, mean_within, quadratic
from raysweep.scaling.optimum_result import TOO_FEW, Optimum, optimum_at, searched_range
from raysweep.scaling.surface import Surface, fit_surface
from raysweep.scaling.unpooled import unpooled_optimum

__all__ = [
    "OPTIMUM_METHODS",
    "Optimum",
    "OptimumMethod",
    "find_optima",
    "surface_of",
    "surface_optima",
]

SURFACE_TRIALS = 4
"""Fewer trials than this and a cell's optimum on the surface is mostly that of the other cells."""

SURFACE_WITHIN, SURFACE_AT_LEAST = 0.01, 12
"""The surface is fitted to the trials within this share of their cell's best loss, but at least
so many a cell. On the public dense grids, whole grids give a law whose mean gap is twice as
large."""


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


def surface_of(cells: Sequence[CellTrials]) -> Surface:
    """The joint surface of cells, fitted to the trials near each cell's bottom."""
    near = [near_bottom(trials) for trials in cells]
    pairs = list(zip(near, cells, strict=True))
    lost = [np.full_like(t.failed_learning_rate, np.nan) for t in cells]
    sizes = [int(n.sum()) + len(x) for n, x in zip(near, lost, strict=True)]
    return fit_surface(
        [trials.features for trials in cells],
        np.repeat(np.arange(len(cells)), sizes),
        np.concatenate([np.r_[t.learning_rate[n], t.failed_learning_rate] for n, t in pairs]),
        np.concatenate([np.r_[t.batch_tokens[n], t.failed_batch_tokens] for n, t in pairs]),
        np.concatenate([np.r_[t.loss[n], x] for (n, t), x in zip(pairs, lost, strict=True)]),
    )


def surface_optima(fitted: Surface, cells: Sequence[CellTrials]) -> list[Optimum]:
    """Optima on a joint surface: each cell borrows the valley's shape and law from the others."""
    optima = []
    for trials in cells:
        posterior = fitted.optimum(trials.name)
        low, high = searched_range(trials)
        optimum = optimum_at(
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


def near_bottom(trials: CellTrials) -> np.ndarray:
    """[n] bool: the trials near the bottom; far up the walls a valley tells little of it."""
    enough = np.sort(trials.loss)[:SURFACE_AT_LEAST][-1]
    return trials.loss <= max(enough, trials.loss.min() * (1 + SURFACE_WITHIN))


def _each(find: Callable[[CellTrials], Optimum]) -> Callable[[Sequence[CellTrials]], list[Optimum]]:
    return lambda cells: [find(trials) for trials in cells]


OPTIMUM_METHODS: dict[str, OptimumMethod] = {
    m.name: m
    for m in (
        OptimumMethod(
            "surface",
            "joint surface model of all cells",
            "raysweep",
            lambda cells: surface_optima(surface_of(cells), cells),
        ),
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
