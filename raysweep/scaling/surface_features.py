"""What the surface model knows of a cell: its sizes as covariates, and a published law as prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.errors import UserError

# Step Law, arXiv 2503.04715: learning rate 1.79 N^-0.713 D^0.307, batch 0.58 D^0.571 tokens. On its
# own MoE grids it holds with total, not active, parameters: those enter the learning rate here.
STEP_LAW_LEARNING_RATE = (1.79, -0.713, 0.307)
STEP_LAW_BATCH = (0.58, 0.571)


@dataclass(frozen=True)
class CellFeatures:
    """One scale at one horizon, as the surface model sees it.

    `params` are active non-embedding parameters, `tokens` the horizon D, `params_total` all
    non-embedding parameters (None where unknown, or dense), `flops` those of one whole run (they
    only order cells).
    """

    name: str
    params: float
    tokens: float
    experts: int = 1
    top_k: int = 1
    params_total: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        for field in ("params", "tokens", "experts", "top_k"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"cell {self.name!r}: {field} must be positive, got {value}")
        if self.params_total is not None and not self.params_total >= self.params * (1 - 1e-9):
            raise UserError(
                f"cell {self.name!r}: params_total {self.params_total:g} is below the active"
                f" {self.params:g}"
            )

    @property
    def compute(self) -> float:
        """FLOPs of one run: `flops`, or 6 N D where they are not given."""
        return self.flops if self.flops is not None else 6.0 * self.params * self.tokens

    @property
    def log_sparsity(self) -> float:
        """ln(total / active parameters); ln(experts / top_k) where the total is unknown."""
        if self.params_total is not None:
            return max(0.0, math.log(self.params_total / self.params))
        return max(0.0, math.log(self.experts / self.top_k))

    @property
    def family(self) -> tuple[int, int]:
        """(experts, top_k): cells that share it share an architecture up to scale."""
        return (self.experts, self.top_k)


def prior_optimum(cells: Sequence[CellFeatures]) -> np.ndarray:
    """Step Law's (ln learning rate, ln batch tokens) for each cell, shape [cells, 2]."""
    a, n_exponent, d_exponent = STEP_LAW_LEARNING_RATE
    b, batch_exponent = STEP_LAW_BATCH
    n, d, s = _logs(cells)
    learning_rate = math.log(a) + n_exponent * (n + s) + d_exponent * d
    return np.column_stack([learning_rate, math.log(b) + batch_exponent * d])


def prior_exponents(covariates: Covariates) -> np.ndarray:
    """Step Law as coefficients of these regressors, [2, 1 + names]."""
    _, n, d = STEP_LAW_LEARNING_RATE
    _, batch = STEP_LAW_BATCH
    centre = CellFeatures("centre", *np.exp(covariates.centre))
    known = np.zeros((2, 1 + len(covariates.names)))
    known[:, 0] = prior_optimum([centre])[0]
    known[:, 1:3] = [[n, d], [0.0, batch]]
    if covariates.sparse:
        known[0, 3] = n
    return known


@dataclass(frozen=True)
class Covariates:
    """The regressors of the laws: an intercept, centred logs of sizes, and offsets of MoE families.

    `names` are the columns after the intercept: "params" and "tokens" (ln active parameters, ln
    horizon), then "sparsity" (ln total / active) if cells differ in it, then "experts=E,top_k=K"
    indicators.
    """

    centre: np.ndarray  # [2]: the ln params and ln tokens at which the intercept is read
    sparse: bool
    families: tuple[tuple[int, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Column names after the intercept."""
        offsets = tuple(f"experts={e},top_k={k}" for e, k in self.families)
        return ("params", "tokens", *(("sparsity",) if self.sparse else ()), *offsets)

    def matrix(self, cells: Sequence[CellFeatures]) -> np.ndarray:
        """Shape [cells, 1 + len(names)]; the first column is the intercept."""
        n, d, s = _logs(cells)
        columns = [np.ones(len(cells)), n - self.centre[0], d - self.centre[1]]
        if self.sparse:
            columns.append(s)
        columns += [np.array([float(cell.family == f) for cell in cells]) for f in self.families]
        return np.column_stack(columns)


def covariates_of(cells: Sequence[CellFeatures]) -> Covariates:
    """The regressors that these cells can tell apart.

    Sparse families get offsets only where there are two or more: the sparsity term already sets a
    single one apart from dense cells.
    """
    n, d, s = _logs(cells)
    sparse = bool(np.ptp(s) > 1e-9) if len(cells) else False
    families = sorted({cell.family for cell in cells if cell.log_sparsity > 0})
    return Covariates(
        centre=np.array([n.mean(), d.mean()]),
        sparse=sparse,
        families=tuple(families) if len(families) > 1 else (),
    )


def _logs(cells: Sequence[CellFeatures]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = np.log([cell.params for cell in cells])
    d = np.log([cell.tokens for cell in cells])
    return n, d, np.array([cell.log_sparsity for cell in cells])
