"""IsoFLOP parabolas: the optimum of each budget by a quadratic in log N, with its bias measured.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556). Its parabolas are biased where the exponents
of parameters and tokens differ, and where the grid of a budget is off-centre or drifts from budget
to budget, even without noise (Czech et al. 2026, arXiv 2603.22339). `parabola_bias` measures that
on the very grid at hand: prefer the surface fit where it is not small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

from raysweep.errors import UserError
from raysweep.scaling.compute.allocation import best_size
from raysweep.scaling.loss.data import levels
from raysweep.scaling.loss.expression import checked
from raysweep.scaling.loss.model import LossModel

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
    status: Literal["interior", "at edge", "not convex", "too few points"]

    def at(self, params: np.ndarray) -> np.ndarray:
        """The quadratic's loss at other sizes [n]."""
        return self.loss * np.exp(self.curvature * np.log(params / self.params) ** 2)


@dataclass(frozen=True)
class IsoFlop:
    """All budgets' parabolas and the power laws N_opt = k C^a, D_opt ~ C^(1-a) through them."""

    parabolas: tuple[Parabola, ...]
    exponent: float  # a; NaN where fewer than two budgets have an interior minimum
    coefficient: float  # k
    interval: tuple[float, float] | None  # of the exponent
    status: Literal["fitted", "too few budgets"]
    note: str = BIAS_NOTE


@dataclass(frozen=True)
class ParabolaBias:
    """What the parabolas would report on noise-free losses of a known law, on the same grid."""

    params_ratio: np.ndarray  # a budget's parabola N_opt over the law's own, NaN without a minimum
    exponent_error: float  # parabola exponent - the law's own


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
    parabolas, exponent, coefficient = _through(log_n, log_nd, log_c, log_loss, budget)
    interval = None
    if resamples and np.isfinite(exponent):
        rng = np.random.default_rng(seed)
        members = [np.flatnonzero(budget == k) for k in range(budget.max() + 1)]
        draws = []
        for _ in range(resamples):
            pick = np.concatenate([rng.choice(m, len(m)) for m in members])
            table = (a[pick] for a in (log_n, log_nd, log_c, log_loss, budget))
            draws.append(_through(*table)[1])
        kept = np.array([d for d in draws if np.isfinite(d)])
        if len(kept) <= 0.5 * resamples:  # four sizes a budget are rarely drawn all
            kept = _by_residuals(log_n, log_nd, log_c, log_loss, budget, resamples, rng)
        if len(kept) > 0.5 * resamples:
            low, high = interval_ends(kept[:, None], np.array([exponent]), level)
            interval = (float(low[0]), float(high[0]))
    return IsoFlop(
        tuple(parabolas),
        exponent,
        coefficient,
        interval,
        "fitted" if np.isfinite(exponent) else "too few budgets",
    )


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


def parabola_bias(
    model: LossModel, params: np.ndarray, tokens: np.ndarray, flops: np.ndarray | None = None
) -> ParabolaBias:
    """The parabolas' error on this grid if a model of the loss were the truth.

    FLOPs a token are proportional to N, as on the grid on average."""
    expected = model.predict_mean({"params": params, "tokens": tokens})[0]
    truth = isoflop(params, tokens, expected, flops)
    _, log_nd, log_c, _ = _logs(params, tokens, np.ones(len(params)), flops)
    cost = float(np.exp(np.mean(log_c - log_nd)))  # FLOPs = cost N D on this grid
    best = np.array(
        [best_size(model, p.flops, flops_per_token=lambda n: cost * n) for p in truth.parabolas]
    )
    ratio = np.array([p.params for p in truth.parabolas]) / best
    slope = np.nan
    if len(best) > 1 and np.isfinite(best).all():
        x, y = np.log([p.flops for p in truth.parabolas]), np.log(best)
        slope = float(np.polyfit(x, y, 1)[0])
    return ParabolaBias(ratio, truth.exponent - slope)


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
    draws = [_through(log_n, log_nd, log_c, fitted + e, budget)[1] for e in noise]
    return np.array([d for d in draws if np.isfinite(d)])


def _through(
    log_n: np.ndarray,
    log_nd: np.ndarray,
    log_c: np.ndarray,
    log_loss: np.ndarray,
    budget: np.ndarray,
) -> tuple[list[Parabola], float, float]:
    parabolas = [
        _parabola(*(a[budget == k] for a in (log_n, log_nd, log_c, log_loss)))
        for k in np.unique(budget)
    ]
    inside = [p for p in parabolas if p.status == "interior"]
    if len(inside) < 2:
        return parabolas, float("nan"), float("nan")
    slope, level = np.polyfit(
        np.log([p.flops for p in inside]), np.log([p.params for p in inside]), 1
    )
    return parabolas, float(slope), float(np.exp(level))


def _parabola(
    log_n: np.ndarray, log_nd: np.ndarray, log_c: np.ndarray, log_loss: np.ndarray
) -> Parabola:
    flops, nan = float(np.exp(log_c.mean())), float("nan")
    if len(np.unique(log_n)) < 4:
        return Parabola(flops, len(log_n), nan, nan, nan, nan, "too few points")
    centre = log_n.mean()
    c2, c1, c0 = np.polyfit(log_n - centre, log_loss, 2)
    if c2 <= 0:
        return Parabola(flops, len(log_n), nan, nan, nan, nan, "not convex")
    best = -c1 / (2 * c2)
    params = float(np.exp(centre + best))
    inside = log_n.min() < centre + best < log_n.max()
    return Parabola(
        flops,
        len(log_n),
        params,
        float(np.exp(log_nd.mean())) / params,
        float(np.exp(c0 - c1**2 / (4 * c2))),
        float(c2),
        "interior" if inside else "at edge",
    )
