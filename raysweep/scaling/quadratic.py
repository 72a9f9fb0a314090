"""A convex quadratic valley in (ln learning rate, ln batch), fitted to one cell's trials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Prior of the curvature of ln loss at the optimum, per nat squared, in (lr lr, batch batch, lr
# batch), and of the slope at the best trial. Medians over the public dense Step Law grids are
# .014, .014, -.005; the widths let any cell with a handful of trials speak for itself.
CURVATURE_MEAN = np.array([0.014, 0.014, -0.005])
CURVATURE_SD = np.array([0.02, 0.02, 0.01])
SLOPE_SD = 0.02
LEAST_CURVATURE = 5e-4
"""Eigenvalues of the Hessian are kept above this: a valley has a bottom."""

# A quadratic holds near the optimum only: a trial whose ln loss lies `gap` above the best one
# counts as if it had a noise of this share of the gap.
MISFIT = 1.0


@dataclass(frozen=True)
class Valley:
    """ln loss = floor + slope x + x H x / 2, with x = point - origin."""

    origin: np.ndarray  # [2]
    floor: float
    slope: np.ndarray  # [2]
    hessian: np.ndarray  # [2, 2], positive definite
    covariance: np.ndarray  # [6, 6] of (floor, slope, H00, H11, H01)

    @property
    def optimum(self) -> np.ndarray:
        """The unconstrained minimum, as (ln learning rate, ln batch)."""
        return self.origin - np.linalg.solve(self.hessian, self.slope)

    @property
    def optimum_covariance(self) -> np.ndarray:
        """Of the unconstrained minimum, by the delta method."""
        x = self.optimum - self.origin
        inverse = np.linalg.inv(self.hessian)
        # d x = -H^-1 (d slope + dH x)
        by_hessian = np.array([[x[0], 0.0, x[1]], [0.0, x[1], x[0]]])
        jacobian = -inverse @ np.hstack([np.zeros((2, 1)), np.eye(2), by_hessian])
        return jacobian @ self.covariance @ jacobian.T

    @property
    def value_sd(self) -> float:
        """Of ln loss at the minimum."""
        x = self.optimum - self.origin
        gradient = _features(x[None])[0]
        return float(np.sqrt(gradient @ self.covariance @ gradient))

    def value(self, point: np.ndarray) -> float:
        """ln loss at one point [2]."""
        x = point - self.origin
        return float(self.floor + self.slope @ x + x @ self.hessian @ x / 2)

    def minimum_within(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The least point of the box [low, high]: the minimum, or the least on the four sides."""
        best = self.optimum
        if ((best >= low) & (best <= high)).all():
            return best
        candidates = []
        for k, j in ((0, 1), (1, 0)):
            for side in (low[k], high[k]):
                point = np.empty(2)
                point[k] = side
                along = self.slope[j] + self.hessian[j, k] * (side - self.origin[k])
                free = self.origin[j] - along / self.hessian[j, j]
                point[j] = np.clip(free, low[j], high[j])
                candidates.append(point)
        return min(candidates, key=self.value)


def fit_valley(point: np.ndarray, log_loss: np.ndarray, noise: float) -> Valley:
    """Fit a valley to trials: `point` [n, 2] in logs, `log_loss` [n], any n of at least 1.

    Bayesian least squares: the noise of a trial grows with its gap, so that trials far up the walls
    say little about the bottom; the residuals rescale the covariance, weakly at small n. A
    direction in which the data want no positive curvature gets `LEAST_CURVATURE` and the slope is
    fitted again.
    """
    best = int(log_loss.argmin())
    origin, floor = point[best], float(log_loss[best])
    x = _features(point - origin)
    y = log_loss - floor
    weight = 1 / (noise + MISFIT * y) ** 2
    mean = np.concatenate([np.zeros(3), CURVATURE_MEAN])
    precision = np.concatenate([[1.0], np.full(2, SLOPE_SD**-2), CURVATURE_SD**-2])
    normal = (x.T * weight) @ x + np.diag(precision)
    theta = np.linalg.solve(normal, (x.T * weight) @ y + precision * mean)
    hessian = np.array([[theta[3], theta[5]], [theta[5], theta[4]]])
    values, vectors = np.linalg.eigh(hessian)
    if values[0] < LEAST_CURVATURE:
        hessian = (vectors * np.maximum(values, LEAST_CURVATURE)) @ vectors.T
        fixed = np.array([hessian[0, 0], hessian[1, 1], hessian[0, 1]])
        rest = y - x[:, 3:] @ fixed
        part = (x[:, :3].T * weight) @ x[:, :3] + np.diag(precision[:3])
        theta = np.concatenate([np.linalg.solve(part, (x[:, :3].T * weight) @ rest), fixed])
    residual = weight * (y - x @ theta) ** 2
    used = float(np.einsum("ij,ji->", np.linalg.inv(normal), (x.T * weight) @ x))
    scale = (residual.sum() + 4) / (
        max(len(y) - used, 0) + 4
    )  # as if 4 residuals of the stated size
    return Valley(origin, floor + theta[0], theta[1:3], hessian, np.linalg.inv(normal) * scale)


def _features(x: np.ndarray) -> np.ndarray:
    """[n, 2] -> [n, 6]: 1, u, v, u^2/2, v^2/2, uv."""
    u, v = x[:, 0], x[:, 1]
    return np.stack([np.ones_like(u), u, v, u * u / 2, v * v / 2, u * v], axis=1)
