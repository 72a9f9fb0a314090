"""The optimal batch and learning rate as power laws of the loss: B = B0 / L^a (Wang et al.)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from raysweep.scaling.estimate import Estimate
from raysweep.scaling.evidence import Evidence
from raysweep.scaling.quantities import TARGETS

MIN_CELLS = 4

PUBLISHED = {
    "batch_tokens": "Kaplan et al. 2e8 L^-4.76 (critical batch), MiniCPM 1.21e9 L^-6.24 (on C4)",
    "learning_rate": "Wang et al. fit a power law too, of a sign that its readers disagree on",
}
"""What others give, by quantity. Wang et al.'s coefficients are not known to us."""


@dataclass(frozen=True)
class LossRelation:
    """quantity = coefficient * L^exponent, L in nats a token, through the cells' optima.

    Kaplan et al. (2001.08361, eq. 1.4) and Wang et al. (2410.05661) write the batch as
    B0 / L^(a_B): a_B is minus the exponent."""

    quantity: str
    coefficient: Estimate
    """In the quantity's unit, at a loss of 1 nat: far from the cells, so its interval is wide."""
    exponent: Estimate
    losses: tuple[float, float]
    """Range of the cells' losses."""
    n_cells: int

    def at(self, loss: np.ndarray | float) -> np.ndarray:
        """The quantity at losses, in its unit."""
        return self.coefficient.value * np.asarray(loss, dtype=float) ** self.exponent.value


def loss_relation(
    evidence: Evidence, architecture: str, quantity: str, seed: int = 0
) -> LossRelation | None:
    """The relation of `learning_rate` or `batch_tokens` to the loss over an architecture's cells.

    A line through (ln loss, ln optimum) of the cells in every joint draw of the posterior, each
    draw over cells resampled with replacement: the interval holds what is not known of the optima
    and the scatter of the cells. None with fewer than four cells with a loss, or without optima.
    """
    cells = evidence.cells
    own = cells[(cells["architecture"] == architecture) & cells["loss"].notna()]
    if evidence.surface is None or len(own) < MIN_CELLS:
        return None
    runs = [evidence.sizes[str(name)] for name in own.index]
    optima, _ = evidence.sample(architecture, runs, seed)
    x = np.log(own["loss"].to_numpy(float))
    if np.ptp(x) < 0.02:
        return None
    y = optima[..., TARGETS.index(quantity)]
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=len(y)).astype(float)
    slopes = _slope(x, y, weight)
    slope = float(_slope(x, y.mean(0)[None], np.ones((1, len(x))))[0])
    total = weight.sum(1)
    levels = ((weight * y).sum(1) - slopes * (weight * x).sum(1)) / total
    level = float(y.mean() - slope * x.mean())

    def ends(draws: np.ndarray) -> tuple[float, float]:
        low, high = np.nanquantile(draws, [0.025, 0.975])
        return float(low), float(high)

    return LossRelation(
        quantity,
        Estimate(math.exp(level), *np.exp(ends(levels)).tolist()),
        Estimate(slope, *ends(slopes)),
        (float(own["loss"].min()), float(own["loss"].max())),
        len(own),
    )


def _slope(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted least-squares slopes [draws] of y [draws, n] in x [n]."""
    total = weight.sum(1, keepdims=True)
    off = x - (weight * x).sum(1, keepdims=True) / total
    square = (weight * off**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(square > 1e-12, (weight * off * y).sum(1) / square, np.nan)
