"""The coefficients of the optimum's laws as plain values, and beside their prior."""

from __future__ import annotations

import numpy as np

from raysweep.scaling.estimate import Estimate
from raysweep.scaling.optima.model import BENDS
from raysweep.scaling.optima.surface import Surface
from raysweep.scaling.quantities import EXPONENTS, TARGETS


def laws_to_dict(surface: Surface) -> dict[str, object]:
    """The laws of the optimum. ln value = the sum of `terms` times what they read of a run, with
    n = ln(N / centre N), d = ln(D / centre D), s = ln(total / active): 1, n, d, s, then the bends
    n n / 2, n d, d d / 2, and the offset of the run's routing and of its group, if there are any.
    """
    laws = surface.laws
    names = ["at_centre", *EXPONENTS, *BENDS]
    names += [f"routing e{e}k{k}" for e, k in surface.design.routings]
    names += [f"group {g}" for g in surface.design.groups]
    terms = {
        target: dict(zip(names, surface.mode.shared[law].tolist(), strict=True))
        for target, law in zip(TARGETS, surface.problem.layout.law, strict=True)
    }
    return {
        "status": surface.status,
        "centre": {
            "params": float(np.exp(laws.centre[0])),
            "tokens": float(np.exp(laws.centre[1])),
        },
        "at_centre": {
            t: float(np.exp(c)) for t, c in zip(TARGETS, laws.coefficients[:, 0], strict=True)
        },
        "exponents": {t: {n: laws.exponent(t, n) for n in EXPONENTS} for t in TARGETS},
        "learned": {t: {n: laws.learned(t, n) for n in EXPONENTS} for t in TARGETS},
        "terms": terms,
        "one_batch": surface.batch_rule is not None,
    }


def against_prior(surface: Surface) -> list[dict[str, object]]:
    """Each coefficient beside its prior, one row a target and coefficient: `prior` mean and
    `prior_sd`, `value` with its 95 % interval `low` to `high`, and `moved`, the distance of the
    value from the prior's mean in the prior's sds. Means and values at the centre are in units of
    the target (1, tokens), their sds of its logarithm."""
    laws = surface.laws
    size = laws.coefficients.size // 2
    rows = []
    for axis, target in enumerate(TARGETS):
        for column, name in enumerate(("at the centre", *EXPONENTS)):
            at = axis * size + column
            mean, sd = float(laws.prior_mean[at]), float(laws.prior_covariance[at, at] ** 0.5)
            value = float(laws.coefficients[axis, column])
            reach = 1.96 * float(laws.covariance[at, at] ** 0.5)
            found = Estimate(value, value - reach, value + reach)
            if column:
                found = laws.exponent(target, name)
            moved = (value - mean) / sd
            if not column:
                found = Estimate(*np.exp([found.value, found.low, found.high]).tolist())
            rows.append(
                {
                    "target": target,
                    "coefficient": name,
                    "prior": float(np.exp(mean)) if not column else mean,
                    "prior_sd": sd,
                    "value": found.value,
                    "low": found.low,
                    "high": found.high,
                    "moved": moved,
                }
            )
    return rows
