"""What a fitted surface model says: the posterior of a cell's optimum, of the laws, and draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from raysweep.errors import UserError
from raysweep.scaling.surface_features import CellFeatures, Covariates

_TARGETS = ("learning_rate", "batch")


@dataclass(frozen=True)
class OptimumPosterior:
    """What is known of one cell's optimum. Points are (ln learning rate, ln batch tokens)."""

    mean: np.ndarray  # [2]
    covariance: np.ndarray  # [2, 2]
    log_loss: float
    log_loss_sd: float
    curvature: np.ndarray  # [2, 2]: Hessian of ln loss at the optimum
    trials: int  # finished or diverged trials in this cell

    @property
    def learning_rate(self) -> float:
        """Peak learning rate at the posterior mean."""
        return float(np.exp(self.mean[0]))

    @property
    def batch_tokens(self) -> float:
        """Batch in tokens at the posterior mean."""
        return float(np.exp(self.mean[1]))

    @property
    def loss(self) -> float:
        """Expected loss at the optimum, nats per token."""
        return float(np.exp(self.log_loss))

    @property
    def expected_gap(self) -> float:
        """Expected relative excess loss of running at the posterior mean, to second order."""
        return 0.5 * float((self.curvature * self.covariance).sum())

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Draws of the optimum, [count, 2]."""
        rng = np.random.default_rng(seed)
        return self.mean + rng.standard_normal((count, 2)) @ root(self.covariance).T


@dataclass(frozen=True)
class Laws:
    """The power laws of the optimum, free of any cell's own correction.

    ln lr* = sum_j exponents[0, j] x_j and ln batch* = sum_j exponents[1, j] x_j over the columns
    `names`: "intercept" (read at the ladder's mean logs), the logs of "params" (active), "tokens"
    and "sparsity" (total / active), and indicators of MoE families.
    """

    names: tuple[str, ...]
    exponents: np.ndarray  # [2, names]
    covariance: np.ndarray  # [2 names, 2 names], learning rate first
    degrees: np.ndarray  # [2], of freedom of Student's t: the cells' scatter is itself estimated
    covariates: Covariates

    def exponent(self, target: str, name: str, level: float = 0.95) -> tuple[float, float, float]:
        """(mean, low, high) of the exponent of `name` in the law of "learning_rate" or "batch".

        Raises:
            UserError: no such law, or no such column.
        """
        if target not in _TARGETS or name not in self.names:
            raise UserError(
                f"no exponent of {name!r} in a law of {target!r}: laws are {', '.join(_TARGETS)},"
                f" columns {', '.join(self.names)}"
            )
        axis, column = _TARGETS.index(target), self.names.index(name)
        mean = float(self.exponents[axis, column])
        index = axis * len(self.names) + column
        half = float(
            stats.t.ppf(0.5 + level / 2, self.degrees[axis]) * self.covariance[index, index] ** 0.5
        )
        return mean, mean - half, mean + half

    def samples(self, count: int, seed: int = 0) -> np.ndarray:
        """Draws of all exponents, [count, 2, names]."""
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((count, self.exponents.size))
        draws = self.exponents.ravel() + noise @ root(self.covariance).T
        return draws.reshape(count, 2, -1)

    def predict(self, cell: CellFeatures) -> tuple[float, float]:
        """(learning rate, batch tokens) by the laws alone."""
        learning_rate, batch = self.exponents @ self.covariates.matrix([cell])[0]
        return float(np.exp(learning_rate)), float(np.exp(batch))


@dataclass(frozen=True)
class CellDraws:
    """Joint posterior draws about one cell."""

    optima: np.ndarray  # [draws, 2]
    laws: np.ndarray  # [draws, 2, regressors], about the published law
    levels: np.ndarray  # [draws], ln loss at the optimum
    gaps: np.ndarray  # [draws, points]


def root(covariance: np.ndarray) -> np.ndarray:
    """A lower-triangular square root; a hair is added to the diagonal against rounding."""
    hair = 1e-9 * covariance.diagonal() + 1e-18
    return np.linalg.cholesky(covariance + np.diag(hair))
