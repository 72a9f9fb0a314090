"""What experts save: tokens or compute for equal loss, under a fitted law that reads experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize.elementwise import find_root

from raysweep.scaling.allocation import Count, optimal_loss, six_n
from raysweep.scaling.form import Inputs
from raysweep.scaling.loss_fit import LossFit, interval_ends

# Beyond this factor a saving is reported as unreachable: the reference's floor lies above the loss.
FARTHEST = 1e6


@dataclass(frozen=True)
class Efficiency:
    """How many times more the reference needs for the loss that the other model reaches.

    `ratio` above 1 means the other model saves; `saved` = 1 - 1/ratio is the share it saves.
    `unreachable` is the share of resamples in which the reference never reaches the loss: its
    ratio counts as infinite there, and `ratio` is infinite where the fit itself says so."""

    ratio: float
    saved: float
    interval: tuple[float, float] | None
    unreachable: float
    loss: float
    message: str


def data_efficiency(
    fit: LossFit,
    params: float,
    tokens: float,
    given: Inputs,
    reference: Inputs,
    level: float = 0.95,
) -> Efficiency:
    """Tokens the `reference` needs over `tokens`, for equal loss at the same FLOPs a token.

    `given` and `reference` hold the law's other inputs of the two models, such as {"experts": 8}
    and {"experts": 1}; both have the law's `params`, so give a law whose N is the active count
    (Wang et al. 2024 compare at the same FLOPs a token in this sense)."""
    draws = _draws(fit)
    if draws is None:
        return _nothing(fit)
    target = fit.law.predict_each(draws, {**given, "params": params, "tokens": tokens})

    def loss(tokens_needed: np.ndarray) -> np.ndarray:
        return fit.law.predict_each(draws, {**reference, "params": params, "tokens": tokens_needed})

    return _summary(amount_for(loss, target, tokens) / tokens, target, level, "tokens")


def efficiency_leverage(
    fit: LossFit,
    flops: float,
    given: Inputs,
    reference: Inputs,
    *,
    flops_per_token: Count | None = None,
    reference_flops_per_token: Count | None = None,
    level: float = 0.95,
) -> Efficiency:
    """C_reference / C at equal loss, each budget split optimally (Ling, arXiv 2507.17702, eq. 1).

    `flops` is the budget of the model described by `given`."""
    draws = _draws(fit)
    if draws is None:
        return _nothing(fit)
    budget = np.full(len(draws), float(flops))
    target = optimal_loss(fit, draws, budget, given, flops_per_token or six_n)

    def loss(budget_needed: np.ndarray) -> np.ndarray:
        return optimal_loss(
            fit, draws, budget_needed, reference, reference_flops_per_token or six_n
        )

    return _summary(amount_for(loss, target, flops) / flops, target, level, "compute")


def _draws(fit: LossFit) -> np.ndarray | None:
    """The estimate in row 0, then the resamples; None where there is no fit."""
    if not fit.ok:
        return None
    return fit.values[None] if fit.samples is None else np.vstack([fit.values, fit.samples])


def _nothing(fit: LossFit) -> Efficiency:
    nan = float("nan")
    return Efficiency(nan, nan, None, nan, nan, f"no fit ({fit.status}): {fit.message}")


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


def _summary(ratios: np.ndarray, losses: np.ndarray, level: float, what: str) -> Efficiency:
    ratio = float(ratios[0])
    unreachable = float(np.isinf(ratios[1:] if len(ratios) > 1 else ratios).mean())
    interval = None
    if len(ratios) > 2 and np.isfinite(ratio):
        # An infinite draw is larger than any other; a huge finite number sorts the same.
        finite = np.minimum(ratios, FARTHEST)
        low, high = interval_ends(np.log(finite[1:, None]), np.log(finite[:1]), level)
        interval = (float(np.exp(low[0])), float(np.exp(high[0])))
    if np.isinf(ratio):
        message = f"the reference never reaches this loss, whatever its {what}"
    elif ratio >= 1:
        message = f"the reference needs {ratio:.3g} times the {what} for the same loss"
    else:
        message = f"the reference needs only {ratio:.3g} of the {what} for the same loss"
    return Efficiency(ratio, 1.0 - 1.0 / ratio, interval, unreachable, float(losses[0]), message)
