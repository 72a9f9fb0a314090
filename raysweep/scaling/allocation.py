"""Compute-optimal allocation: how many parameters and tokens a budget should buy under a law.

Laws whose only dependence on the allocation is A/N^a + B/D^b have a closed form (Hoffmann et al.
2022, arXiv 2203.15556, eq. 4); for every other law the minimum along the budget is found
numerically, for all resamples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize.elementwise import find_minimum

from raysweep.errors import UserError
from raysweep.scaling.form import Inputs
from raysweep.scaling.loss_fit import LossFit, interval_ends

Count = Callable[[np.ndarray], np.ndarray]
Interval = tuple[float, float]

# Where the optimum is looked for: no budget is best spent on fewer or more parameters than this.
SMALLEST, LARGEST = 1e3, 1e15
OUTSIDE = 2.0
"""A split further than this from the sizes and tokens that were fitted is outside them. At the
largest cell's budget every split but that cell's own is a little beyond one or the other."""

# Parameter and token terms of the laws with a closed form: amplitude and exponent of each.
_CLOSED = {"chinchilla": ("A", "a", "B", "b"), "wang": ("A", "a", "B", "b")}


def six_n(params: np.ndarray) -> np.ndarray:
    """Training FLOPs a token: 6 for each parameter that acts on it (Kaplan et al. 2020)."""
    return 6.0 * params


@dataclass(frozen=True)
class Allocation:
    """The loss-optimal split of a budget, with intervals where the fit was resampled.

    `exponent` is d log N_opt / d log C at this budget. `extrapolation` holds the params and tokens
    of the split over the largest of each that was fitted (over the smallest, where they lie below
    it; 1 inside): a split far `outside` them is the law's word alone."""

    flops: float
    params: float
    tokens: float
    loss: float
    exponent: float
    method: Literal["closed form", "numeric"]
    status: Literal["interior", "outside", "at edge", "no fit"]
    intervals: dict[str, Interval]  # of params, tokens, loss, exponent
    extrapolation: dict[str, float]


def compute_optimal(
    fit: LossFit,
    flops: float,
    *,
    given: Inputs | None = None,
    flops_per_token: Count | None = None,
    level: float = 0.95,
) -> Allocation:
    """Minimise the law's loss over N and D at `flops` = flops_per_token(N) D.

    `given` holds the law's other inputs (experts, granularity, ...). `flops_per_token` maps the
    law's N to the training FLOPs of a token, 6N by default: give it where N is not the count of
    active parameters (the law's `parameter_count` says which it is)."""
    _check(fit, flops)
    if not fit.ok:
        nan = float("nan")
        return Allocation(flops, nan, nan, nan, nan, "numeric", "no fit", {}, {})
    cost = flops_per_token or six_n
    closed = _has_closed_form(fit, cost)
    draws = fit.values[None] if fit.samples is None else np.vstack([fit.values, fit.samples])
    extra = dict(given or {})
    budgets = flops * np.exp([-0.05, 0.0, 0.05])
    solve = _closed_form if closed else _numeric
    logs = np.stack([solve(fit, draws, c, extra, cost) for c in budgets])  # [3, B]
    params = np.exp(logs[1])
    tokens = flops / cost(params)
    loss = _along(fit, draws, logs[1], flops, extra, cost)
    quantities = {
        "params": np.log(params),
        "tokens": np.log(tokens),
        "loss": np.log(loss),
        "exponent": (logs[2] - logs[0]) / 0.1,
    }
    intervals: dict[str, Interval] = {}
    if len(draws) > 2:
        for name, values in quantities.items():
            low, high = interval_ends(values[1:, None], values[:1], level)
            ends = (float(low[0]), float(high[0]))
            intervals[name] = ends if name == "exponent" else (np.exp(ends[0]), np.exp(ends[1]))
    factors = outside(fit, float(params[0]), float(tokens[0]))
    status = "outside" if lies_outside(factors) else "interior"
    if not SMALLEST * 1.01 < params[0] < LARGEST * 0.99:
        status = "at edge"
    return Allocation(
        flops=float(flops),
        params=float(params[0]),
        tokens=float(tokens[0]),
        loss=float(loss[0]),
        exponent=float(quantities["exponent"][0]),
        method="closed form" if closed else "numeric",
        status=status,
        intervals=intervals,
        extrapolation=factors,
    )


def outside(fit: LossFit, params: float, tokens: float) -> dict[str, float]:
    """How many times the largest params and tokens that were fitted a run has, or the smallest
    where it has fewer; 1 inside."""
    run, ranges = {"params": params, "tokens": tokens}, fit.ranges()
    return {name: value / float(np.clip(value, *ranges[name])) for name, value in run.items()}


def lies_outside(factors: Mapping[str, float]) -> bool:
    """Whether a run of such factors lies outside what was fitted by more than `OUTSIDE`."""
    return any(max(f, 1 / f) > OUTSIDE for f in factors.values())


def optimal_params(
    fit: LossFit, draws: np.ndarray, flops: np.ndarray, given: Inputs, cost: Count = six_n
) -> np.ndarray:
    """The N [B] of the lowest loss that each of `draws` [B, p] reaches with its own budget [B]."""
    solve = _closed_form if _has_closed_form(fit, cost) else _numeric
    return np.exp(solve(fit, draws, flops, dict(given), cost))


def optimal_loss(
    fit: LossFit, draws: np.ndarray, flops: np.ndarray, given: Inputs, cost: Count = six_n
) -> np.ndarray:
    """The lowest loss [B] that each of `draws` [B, p] reaches with its own budget `flops` [B]."""
    best = np.log(optimal_params(fit, draws, flops, given, cost))
    return _along(fit, draws, best, flops, dict(given), cost)


def _has_closed_form(fit: LossFit, cost: Count) -> bool:
    return fit.law.key in _CLOSED and cost is six_n


def _closed_form(
    fit: LossFit, draws: np.ndarray, flops: float | np.ndarray, given: dict, cost: Count
) -> np.ndarray:
    """log N_opt [B] = (log(a A / (b B)) + b log(C/6)) / (a + b), with A / E^g for experts."""
    c = dict(zip(fit.law.names, draws.T, strict=True))
    amplitude_n, a, amplitude_d, b = (c[name] for name in _CLOSED[fit.law.key])
    log_ratio = np.log(a * amplitude_n / (b * amplitude_d))
    if "g" in c:
        log_ratio = log_ratio - c["g"] * np.log(float(np.ravel(given["experts"])[0]))
    return (log_ratio + b * np.log(flops / 6.0)) / (a + b)


def _numeric(
    fit: LossFit, draws: np.ndarray, flops: float | np.ndarray, given: dict, cost: Count
) -> np.ndarray:
    """log N_opt [B] by a grid and then Chandrupatla's method, for all draws together."""
    flops = np.broadcast_to(np.asarray(flops, dtype=float), (len(draws),))

    def loss(log_params: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return _along(fit, draws[rows], log_params, flops[rows], given, cost)

    grid = np.linspace(np.log(SMALLEST), np.log(LARGEST), 40)
    rows = np.arange(len(draws))
    everywhere = loss(np.repeat(grid, len(rows)), np.tile(rows, len(grid)))
    lowest = np.argmin(everywhere.reshape(len(grid), -1), axis=0)
    middle = np.clip(lowest, 1, len(grid) - 2)
    bracket = grid[middle - 1], grid[middle], grid[middle + 1]
    found = find_minimum(loss, bracket, args=(rows,))
    # No bracket holds a minimum that lies at an end of the grid.
    return np.where(found.success, found.x, grid[lowest])


def _along(
    fit: LossFit,
    draws: np.ndarray,
    log_params: np.ndarray,
    flops: float | np.ndarray,
    given: dict,
    cost: Count,
) -> np.ndarray:
    """Loss [B] of each draw [B, p] at its own N [B] on the budget."""
    params = np.exp(log_params)
    inputs = {**given, "params": params, "tokens": flops / cost(params)}
    return fit.law.predict_each(draws, inputs)


def _check(fit: LossFit, flops: float) -> None:
    if not (np.isfinite(flops) and flops > 0):
        raise UserError(f"a budget must be a positive number of FLOPs, not {flops:g}")
    if not {"params", "tokens"} <= set(fit.law.inputs):
        raise UserError(
            f"law '{fit.law.key}' reads {', '.join(fit.law.inputs)}: it cannot say how to split a "
            "budget between params and tokens; use chinchilla, wang or another law of both"
        )
