"""What experts save: losses, tokens and compute of one run against another's, with intervals.

Every ratio is taken within joint draws of the model of the loss, so that what both runs share in
their uncertainty cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize.elementwise import find_root

from raysweep.scaling.compute.allocation import Count, best_size, token_cost
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.loss.data import COUNTS, Runs, run_columns
from raysweep.scaling.loss.model import LEVEL, LossModel

REACH, AMOUNTS = 1e3, 121
"""Amounts are looked for this far to either side; beyond, a loss counts as out of reach."""

BUDGETS = 41
"""Budgets that the compute for equal loss is read off between."""

FARTHEST = 1e6
"""The same where a law alone is asked."""


@dataclass(frozen=True)
class Efficiency:
    """How many times more the reference needs for the loss that the other model reaches.

    `ratio` above 1 means the other model saves; `saved` = 1 - 1/ratio is the share it saves.
    `unreachable` is the share of draws in which the reference does not reach the loss within
    `REACH` times as much: its ratio counts as infinite there, and `ratio` is infinite where the
    model itself says so."""

    ratio: float
    saved: float
    interval: tuple[float, float] | None
    unreachable: float
    loss: float
    message: str


def loss_ratio(model: LossModel, run: Runs, reference: Runs, *, seed: int = 0) -> Estimate:
    """The expected loss of one run over that of another."""
    both = _joined(run_columns(run), run_columns(reference))
    value = model.predict_mean(both)[0]
    draws = model.sample(both, seed=seed)
    if not np.isfinite(value).all():
        return Estimate.missing(model.why or "a column that the law reads is not known")
    low, high = np.quantile(np.exp(draws[:, 0] - draws[:, 1]), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(float(value[0] / value[1]), float(low), float(high))


def tokens_for_equal_loss(
    model: LossModel, run: Runs, reference: Runs, *, seed: int = 0
) -> Efficiency:
    """Tokens that `reference` needs, over those of `run`, for the expected loss of `run`.

    Of `reference` everything but its tokens counts: at equal active parameters both cost the same
    FLOPs a token, which is how Wang et al. 2024 compare."""
    one, other = run_columns(run), run_columns(reference)
    amounts = np.geomspace(1 / REACH, REACH, AMOUNTS)
    along = {name: np.repeat(value[:1], AMOUNTS) for name, value in other.items()}
    along["tokens"] = one["tokens"][0] * amounts
    return _equal_loss(model, one, along, amounts, "tokens", seed)


def compute_for_equal_loss(
    model: LossModel,
    flops: float,
    given: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    flops_per_token: Count | None = None,
    reference_flops_per_token: Count | None = None,
    seed: int = 0,
) -> Efficiency:
    """C_reference / C at equal loss, each budget split optimally (the efficiency leverage of Ling,
    arXiv 2507.17702, eq. 1).

    `flops` is the budget of the model described by `given` (experts, top_k, granularity), as
    `reference` describes the other. FLOPs a token are of the law's N, by default as the model's own
    runs have them."""
    usual = token_cost(model)

    def split(budget: float, what: Mapping[str, float], cost: Count) -> dict[str, np.ndarray]:
        params = np.array([best_size(model, budget, given=what, flops_per_token=cost)])
        return {
            **{name: np.full(1, float(v)) for name, v in what.items()},
            **dict.fromkeys(COUNTS, params),
            "tokens": budget / cost(params),
            "flops": np.full(1, budget),
        }

    amounts = np.geomspace(1 / REACH, REACH, BUDGETS)
    one = split(flops, given, flops_per_token or usual)
    path = [split(flops * f, reference, reference_flops_per_token or usual) for f in amounts]
    along = {name: np.concatenate([p[name] for p in path]) for name in path[0]}
    return _equal_loss(model, one, along, amounts, "compute", seed)


def _equal_loss(
    model: LossModel,
    run: Mapping[str, np.ndarray],
    along: Mapping[str, np.ndarray],
    amounts: np.ndarray,
    what: str,
    seed: int,
) -> Efficiency:
    """The amount at which the loss along runs [m] falls to that of the first of `run`."""
    joined = _joined(run_columns(run), run_columns(along))
    value = model.predict_mean(joined)[0]
    if not (model.ok and np.isfinite(value[0])):
        nan = math.nan
        return Efficiency(nan, nan, None, nan, nan, model.why or "a column is not known")
    told = np.vstack([np.log(value), model.sample(joined, seed=seed)])
    usable = np.asarray(np.isfinite(told).all(axis=0))
    ratios = _crossings(told[:, usable][:, 1:], told[:, 0], np.log(amounts[usable[1:]]))
    ratio, draws = float(ratios[0]), ratios[1:]
    interval = None
    if np.isfinite(ratio):
        ends = np.quantile(np.minimum(draws, REACH), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
        interval = (min(float(ends[0]), ratio), max(float(ends[1]), ratio))
    if np.isinf(ratio):
        message = f"the reference never reaches this loss, whatever its {what}"
    elif ratio >= 1:
        message = f"the reference needs {ratio:.3g} times the {what} for the same loss"
    else:
        message = f"the reference needs only {ratio:.3g} of the {what} for the same loss"
    unreachable = float(np.isinf(draws).mean())
    return Efficiency(ratio, 1 - 1 / ratio, interval, unreachable, float(value[0]), message)


def _crossings(log_loss: np.ndarray, target: np.ndarray, log_amounts: np.ndarray) -> np.ndarray:
    """The amount [B] at which each row of ln losses [B, m] first falls to its target [B];
    infinite where it never does, the least where that is enough."""
    falling = np.minimum.accumulate(log_loss, axis=1)
    reached = falling <= target[:, None]
    at = np.argmax(reached, axis=1)
    before = np.maximum(at - 1, 0)
    rows = np.arange(len(target))
    drop = falling[rows, before] - falling[rows, at]
    share = np.where(drop > 0, (falling[rows, before] - target) / np.maximum(drop, 1e-300), 0.0)
    amount = log_amounts[before] + np.clip(share, 0, 1) * (log_amounts[at] - log_amounts[before])
    return np.where(reached.any(axis=1), np.exp(amount), np.inf)


def _joined(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The first run of `one`, then the runs of `other`."""
    return {name: np.concatenate([value[:1], other[name]]) for name, value in one.items()}


def amount_for(
    loss: Callable[[np.ndarray], np.ndarray], target: np.ndarray, about: float
) -> np.ndarray:
    """The amount [B] at which a falling `loss` meets `target` [B], solved in logs.

    It is looked for within a factor of `FARTHEST` of `about`; infinite where it lies beyond, and
    the lower end where even that is enough."""
    low, high = (np.full(len(target), np.log(about * f)) for f in (1 / FARTHEST, FARTHEST))
    known = low.copy()

    def excess(log_amount: np.ndarray, rows: np.ndarray) -> np.ndarray:
        amounts = known.copy()
        amounts[rows] = log_amount
        return np.log(loss(np.exp(amounts)) / target)[rows]

    rows = np.arange(len(target))
    enough, unreachable = excess(low, rows) <= 0, excess(high, rows) > 0
    found = find_root(excess, (low, high), args=(rows,), tolerances={"xatol": 1e-9})
    solved = np.where(unreachable, np.inf, found.x)
    return np.exp(np.where(enough, low, solved))
