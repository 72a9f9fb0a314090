"""IsoFLOP parabolas: the optimum of each budget by a quadratic in log N, with its bias measured.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556). Its parabolas are biased where the exponents
of parameters and tokens differ, and where the grid of a budget is off-centre or drifts from budget
to budget, even without noise (Czech et al. 2026, arXiv 2603.22339). `budgets.parabola_bias`
measures that on the very grid at hand: prefer the surface fit where it is not small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from raysweep.errors import UserError
from raysweep.scaling.loss.data import levels
from raysweep.scaling.loss.expression import checked

NEAR = 4.0
"""Runs within this factor of a budget's best size tell where its loss is least."""

Status = Literal["interior", "at edge", "not convex", "too few points"]

BIAS_NOTE = (
    "Parabolas are biased where the exponents of N and D differ and where grids are off-centre or "
    "drift; the surface fit is not."
)


@dataclass(frozen=True)
class Parabola:
    """One budget's quadratic log L = c0 + c1 log N + c2 log^2 N, and its minimum."""

    flops: float
    n: int
    params: float
    tokens: float
    loss: float
    curvature: float  # c2
    status: Status

    def at(self, params: np.ndarray) -> np.ndarray:
        """The quadratic's loss at other sizes [n]."""
        return self.loss * np.exp(self.curvature * np.log(params / self.params) ** 2)


@dataclass(frozen=True)
class IsoFlop:
    """All budgets' parabolas and the power laws N_opt = k C^a, D_opt ~ C^b through them."""

    parabolas: tuple[Parabola, ...]
    exponent: float  # a; NaN where fewer than two budgets have an interior minimum
    tokens_exponent: float  # b; 1 - a but for FLOPs a token over N that change with size
    coefficient: float  # k
    interval: tuple[float, float] | None  # of the exponent
    status: Literal["fitted", "too few budgets"]
    note: str = BIAS_NOTE

    @property
    def inside(self) -> list[Parabola]:
        """Those with a minimum among their sizes."""
        return [p for p in self.parabolas if p.status == "interior"]


def isoflop(
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    flops: np.ndarray | None = None,
    *,
    resamples: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> IsoFlop:
    """Fit a parabola to each budget (points within a few per cent of `flops`, 6ND by default).

    Arrays are [n]. `resamples` draws runs within each budget for the exponent's interval; where
    budgets have too few, it draws what the parabolas leave over."""
    log_n, log_nd, log_c, log_loss = _logs(params, tokens, loss, flops)
    budget = levels(np.exp(log_c))
    found = _through(log_n, log_nd, log_c, log_loss, budget)
    if resamples and np.isfinite(found.exponent):
        rng = np.random.default_rng(seed)
        members = [np.flatnonzero(budget == k) for k in range(budget.max() + 1)]
        draws = []
        for _ in range(resamples):
            pick = np.concatenate([rng.choice(m, len(m)) for m in members])
            table = (a[pick] for a in (log_n, log_nd, log_c, log_loss, budget))
            draws.append(_through(*table).exponent)
        kept = np.array([d for d in draws if np.isfinite(d)])
        if len(kept) <= 0.5 * resamples:  # four sizes a budget are rarely drawn all
            kept = _by_residuals(log_n, log_nd, log_c, log_loss, budget, resamples, rng)
        if len(kept) > 0.5 * resamples:
            low, high = interval_ends(kept[:, None], np.array([found.exponent]), level)
            return replace(found, interval=(float(low[0]), float(high[0])))
    return found


def read_minimum(params: np.ndarray, loss: np.ndarray) -> float:
    """The size of least loss among runs [n] of one budget, by a parabola in ln N through those
    within a factor of `NEAR` of the best; NaN where it has no minimum among them."""
    log_n, log_loss = np.log(params), np.log(loss)
    near = np.abs(log_n - log_n[np.argmin(log_loss)]) <= np.log(NEAR) + 1e-9
    status, best, *_ = _minimum(log_n[near], log_loss[near])
    return float(np.exp(best)) if status == "interior" else float("nan")


def power_law(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """(a, k) of y = k x^a through points, all above zero."""
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    return float(slope), float(np.exp(level))


def interval_ends(
    draws: np.ndarray, estimate: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end [n] of the interval that resamples `draws` [n_boot, n] give `estimate`
    [n].

    Bias-corrected percentiles (Efron 1981): plain ones cover too much here, as the objective is
    nearly a sum of absolute values, whose minimum is jumpy under resampling. Like plain
    percentiles they respect any transformation of the quantity."""
    below = (draws < estimate).mean(axis=0) + 0.5 * (draws == estimate).mean(axis=0)
    resolution = 0.5 / len(draws)
    shift = ndtri(np.clip(below, resolution, 1 - resolution))
    reach = ndtri(0.5 + 0.5 * level)
    ends = [
        np.array([np.quantile(d, q) for d, q in zip(draws.T, ndtr(2 * shift + z), strict=True)])
        for z in (-reach, reach)
    ]
    return ends[0], ends[1]


def _logs(
    params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, flops: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    n, d = checked("params", params), checked("tokens", tokens)
    c = 6.0 * n * d if flops is None else checked("flops", flops)
    losses = checked("loss", loss)
    if not n.shape == d.shape == c.shape == losses.shape:
        raise UserError("params, tokens, loss and flops must have one value a run each")
    return np.log(n), np.log(n * d), np.log(c), np.log(losses)


def _by_residuals(
    log_n: np.ndarray,
    log_nd: np.ndarray,
    log_c: np.ndarray,
    log_loss: np.ndarray,
    budget: np.ndarray,
    resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws of the exponent with noise as large as what the budgets' parabolas leave over."""
    fitted = np.empty(len(log_loss))
    freedom = len(log_loss)
    for k in np.unique(budget):
        own = budget == k
        degree = min(2, len(np.unique(log_n[own])) - 1)
        centre = log_n[own].mean()
        line = np.polyfit(log_n[own] - centre, log_loss[own], degree)
        fitted[own] = np.polyval(line, log_n[own] - centre)
        freedom -= degree + 1
    if freedom < 1:
        return np.array([])
    sd = float(np.sqrt(((log_loss - fitted) ** 2).sum() / freedom))
    noise = sd * rng.standard_normal((resamples, len(log_loss)))
    draws = [_through(log_n, log_nd, log_c, fitted + e, budget).exponent for e in noise]
    return np.array([d for d in draws if np.isfinite(d)])


def _through(
    log_n: np.ndarray,
    log_nd: np.ndarray,
    log_c: np.ndarray,
    log_loss: np.ndarray,
    budget: np.ndarray,
) -> IsoFlop:
    """Without an interval."""
    parabolas = tuple(
        _parabola(*(a[budget == k] for a in (log_n, log_nd, log_c, log_loss)))
        for k in np.unique(budget)
    )
    nan = float("nan")
    found = IsoFlop(parabolas, nan, nan, nan, None, "too few budgets")
    if len(found.inside) < 2:
        return found
    flops, params, tokens = zip(*((p.flops, p.params, p.tokens) for p in found.inside), strict=True)
    exponent, coefficient = power_law(flops, params)
    return replace(
        found,
        exponent=exponent,
        tokens_exponent=power_law(flops, tokens)[0],
        coefficient=coefficient,
        status="fitted",
    )


def _parabola(
    log_n: np.ndarray, log_nd: np.ndarray, log_c: np.ndarray, log_loss: np.ndarray
) -> Parabola:
    status, log_best, least, bend = _minimum(log_n, log_loss)
    flops, params = float(np.exp(log_c.mean())), float(np.exp(log_best))
    tokens = float(np.exp(log_nd.mean())) / params
    return Parabola(flops, len(log_n), params, tokens, float(np.exp(least)), bend, status)


def _minimum(log_n: np.ndarray, log_loss: np.ndarray) -> tuple[Status, float, float, float]:
    """Status, ln N and ln loss at the minimum, and c2 of the quadratic through runs [n] of one
    budget; NaN where it has no minimum."""
    nan = float("nan")
    if len(np.unique(log_n)) < 4:
        return "too few points", nan, nan, nan
    centre = log_n.mean()
    c2, c1, c0 = (float(c) for c in np.polyfit(log_n - centre, log_loss, 2))
    if c2 <= 0:
        return "not convex", nan, nan, nan
    best = float(centre) - c1 / (2 * c2)
    inside = log_n.min() < best < log_n.max()
    return "interior" if inside else "at edge", best, c0 - c1**2 / (4 * c2), c2
