"""The shape of a loss valley over (ln learning rate, ln batch): a convex sum of exponentials."""

from __future__ import annotations

import numpy as np

# The loss near its optimum behaves as a sum of powers of the learning rate and of the batch: too
# high a rate destabilises (lr, and lr^3 soon after), gradient noise grows with lr / B, a large
# batch leaves few steps (B, or B / lr), a small rate leaves the model untrained (1 / lr), and both
# high at once cost more than each (lr B). Each term, less its linear part, is w psi(t) with
# psi(t) = e^t - 1 - t >= 0, t linear in the logs: the sum is convex, zero at its optimum, steep on
# one side of a direction and shallow on the other, and any w > 0 make a legal shape. Two rates
# stretch the axes: small ones make the valley a parabola, large ones a trough.
DIRECTIONS = np.array(
    [(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1), (3, 0), (1, 1)], dtype=float
)
TERMS = len(DIRECTIONS)
PARAMETERS = TERMS + 2  # ln weights, then ln rates of (ln learning rate, ln batch)

_EDGE = 8.0  # the valley is flat beyond e^8 from its optimum: nothing overflows
_LOWEST, _HIGHEST = -30.0, 16.0  # of t, for the steeper directions


def gap(u: np.ndarray, v: np.ndarray, valley: np.ndarray) -> np.ndarray:
    """ln(loss / loss at the optimum), at ln learning rate `u` and ln batch `v` from the optimum.

    `valley` [..., PARAMETERS] holds the ln weights and ln rates; its leading axes broadcast with u
    and v."""
    rates = np.exp(valley[..., TERMS:])
    weights = np.exp(valley[..., :TERMS])
    u = np.clip(u * rates[..., 0], -_EDGE, _EDGE)
    v = np.clip(v * rates[..., 1], -_EDGE, _EDGE)
    total = 0.0
    for term, (a, b) in enumerate(DIRECTIONS):
        t = np.clip(a * u + b * v, _LOWEST, _HIGHEST)
        total = total + weights[..., term] * (np.exp(t) - 1 - t)
    return np.asarray(total)


def gap_derivatives(
    u: np.ndarray, v: np.ndarray, valley: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gap [n], its gradient in (u, v) [n, 2], and in the valley's parameters [n, PARAMETERS].

    `valley` is [PARAMETERS], or [n, PARAMETERS] for each point's own."""
    rates, weights = np.exp(valley[..., TERMS:]), np.exp(valley[..., :TERMS])
    point = np.clip(np.stack([u, v], -1) * rates, -_EDGE, _EDGE)
    t = np.clip(point @ DIRECTIONS.T, _LOWEST, _HIGHEST)
    slope = np.exp(t) - 1
    by_weight = (slope - t) * weights
    by_stretched = (slope * weights) @ DIRECTIONS
    by_valley = np.concatenate([by_weight, by_stretched * point], axis=1)
    return by_weight.sum(-1), by_stretched * rates, by_valley


def slope_derivatives(u: np.ndarray, v: np.ndarray, valley: np.ndarray) -> np.ndarray:
    """[n, 2, PARAMETERS]: how the gap's gradient in (u, v) changes with the valley's parameters.

    `valley` is [n, PARAMETERS], each point's own."""
    rates, weights = np.exp(valley[:, TERMS:]), np.exp(valley[:, :TERMS])
    raw = np.stack([u, v], -1)
    point = np.clip(raw * rates, -_EDGE, _EDGE)
    t = np.clip(point @ DIRECTIONS.T, _LOWEST, _HIGHEST)
    stretched = DIRECTIONS.T * rates[:, :, None]  # [n, 2, TERMS]
    by_weight = stretched * ((np.exp(t) - 1) * weights)[:, None]
    hessian = np.einsum("nak,nk,nbk->nab", stretched, weights * np.exp(t), stretched)
    by_rate = hessian * raw[:, None]
    by_rate[:, range(2), range(2)] += by_weight.sum(2)
    return np.concatenate([by_weight, by_rate], axis=2)


def curvature(valley: np.ndarray) -> np.ndarray:
    """The 2 x 2 Hessian of the gap at the optimum, in (ln learning rate, ln batch)."""
    stretched = DIRECTIONS * np.exp(valley[TERMS:])
    return (stretched * np.exp(valley[:TERMS, None])).T @ stretched


def best_rate(v: np.ndarray, valley: np.ndarray) -> np.ndarray:
    """ln learning rate from the optimum's [n] that is best at ln batch `v` [n] from it.

    The gap is convex in u: bisection of its slope."""
    low, high = np.full(v.shape, -_EDGE), np.full(v.shape, _EDGE)
    scale = np.exp(valley[TERMS])
    for _ in range(60):
        middle = 0.5 * (low + high)
        slope = gap_derivatives(middle / scale, v, valley)[1][:, 0]
        low, high = np.where(slope < 0, middle, low), np.where(slope < 0, high, middle)
    return 0.5 * (low + high) / scale
