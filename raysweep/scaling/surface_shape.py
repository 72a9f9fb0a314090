"""The shape of a loss valley over (ln learning rate, ln batch): a convex sum of exponentials."""

from __future__ import annotations

import numpy as np

# The loss near its optimum behaves as a sum of terms in powers of the learning rate and of the batch: too
# high a rate destabilises (lr), noise of the gradient grows with lr / B, a large batch leaves few steps (B,
# B / lr), a small rate leaves the model untrained (1 / lr). Each term, less its linear part, is
# w psi(t) with psi(t) = e^t - 1 - t >= 0, so the sum is convex, zero at its optimum, steep on one side of a
# direction and shallow on the other, and every w > 0 is a legal shape.
DIRECTIONS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1)], dtype=float)

# psi goes on linearly beyond this, so that a far point can neither overflow nor dominate.
_LINEAR_BEYOND = 4.0


def _psi(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = np.minimum(t, _LINEAR_BEYOND)
    slope = np.expm1(inside)
    return slope - inside + (t - inside) * slope, slope


def gap(u: np.ndarray, v: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """ln(loss / loss at the optimum), at ln learning rate `u` and ln batch `v` from the optimum.

    `log_weights` [..., 6] are the ln w of the terms in `DIRECTIONS`; leading axes broadcast with u and v.
    """
    t = u[..., None] * DIRECTIONS[:, 0] + v[..., None] * DIRECTIONS[:, 1]
    return (np.exp(log_weights) * _psi(t)[0]).sum(-1)


def gap_derivatives(
    u: np.ndarray, v: np.ndarray, log_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gap [n], its gradient in (u, v) [n, 2], and in the log weights [n, 6]."""
    value, slope = _psi(np.stack([u, v], -1) @ DIRECTIONS.T)
    weights = np.exp(log_weights)
    by_weight = value * weights
    return by_weight.sum(-1), (slope * weights) @ DIRECTIONS, by_weight


def curvature(log_weights: np.ndarray) -> np.ndarray:
    """The 2 x 2 Hessian of the gap at the optimum, in (ln learning rate, ln batch)."""
    return (DIRECTIONS * np.exp(log_weights)[:, None]).T @ DIRECTIONS
