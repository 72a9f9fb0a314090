"""One side over another: optima, and losses of cells of the same size, with intervals.

Every ratio is the other side's over the reference's, so 1 is no difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from raysweep.scaling.fits import Fits
from raysweep.scaling.noise import compare_halves
from raysweep.scaling.power_law import COLLINEAR
from raysweep.scaling.sides import Side

N, D, C = "params_active_non_embedding", "tokens", "flops"

SAME_SIZE = 0.05
"""Cells whose N and D differ by less than this (in logs) are the same size."""

CONVERGED = "converged"

SHARED = "one power law, a factor for the other"
MATCHED = "cells of the same size"
ONE_LAW = "the reference's law of the loss, and the ratio in cells of the same size"
OWN_LAWS = "each side's own law of the loss"
OF_COMPUTE = "each side's law of the loss in compute"
"""How a ratio is had."""

_EQUALS: dict[str, tuple[str, ...]] = {
    "N and D": ("params", "tokens"),
    "FLOPs": ("flops",),
    "loss": ("loss",),
}


@dataclass(frozen=True)
class Contrast:
    """The other side over the reference in one quantity, other things equal.

    `low` and `high` are the ends of its 95 % interval, NaN where there is none. A contrast that
    could not be had has a `status` other than `converged`, a `message` and NaN. `n` counts the
    cells it rests on, `how` says by which means, `at` where (empty: everywhere alike).
    """

    quantity: str
    at_equal: str
    ratio: float
    low: float
    high: float
    n: int
    how: str
    at: dict[str, float]
    status: str
    message: str

    @property
    def ok(self) -> bool:
        return self.status == CONVERGED and not math.isnan(self.ratio)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.ok and (self.low > 1 or self.high < 1)


@dataclass(frozen=True)
class MatchedCell:
    """Two cells of the same size, and the ratio of their losses with its 95 % interval."""

    reference: str
    other: str
    params: float
    tokens: float
    flops: float
    reference_loss: float
    other_loss: float
    ratio: float
    low: float
    high: float


def contrast_optima(
    reference: Side, other: Side, *, with_loss: bool, n_boot: int = 200, seed: int = 0
) -> list[Contrast]:
    """Learning rate, batch and noise scale: one law over both sides, with a factor for the other.

    At equal N and D, at equal FLOPs and, `with_loss`, at equal loss. Intervals hold the scatter of
    cells about the law, and what all optima of a side are off together."""
    a, b = reference.fits, other.fits
    error = np.sqrt(reference.shared_error + other.shared_error)
    shared: dict[str, float] = {"learning_rate": error[0], "batch_tokens": error[1]}
    cells = pd.concat([_renamed(f, i) for i, f in enumerate((a, b))])
    optima = {
        f"{i}/{name}": o
        for i, fits in enumerate((a, b))
        for name, o in fits.optima[fits.method].items()
    }
    noise = pd.concat([f.noise_scale for f in (a, b)])
    noise.index = cells.index
    second = np.arange(len(cells)) >= len(a.cells)
    found = []
    for equal, inputs in _EQUALS.items():
        if equal == "loss" and not with_loss:
            continue
        ratios = compare_halves(
            cells, optima, noise, second, at_equal=inputs, n_boot=n_boot, seed=seed
        )
        for quantity, r in ratios.items():
            message = r.message
            if r.status == COLLINEAR:
                message = "N and D move together in these cells: see the ratio at equal FLOPs"
            low, high = _widened(r.ratio, r.low, r.high, shared.get(quantity, 0.0))
            found.append(
                Contrast(
                    quantity=quantity,
                    at_equal=equal,
                    ratio=r.ratio,
                    low=low,
                    high=high,
                    n=r.n_dense + r.n_moe,
                    how=SHARED,
                    at={},
                    status=r.status,
                    message=message,
                )
            )
    return found


def _widened(ratio: float, low: float, high: float, sd: float) -> tuple[float, float]:
    """The ends of an interval with a further error, whose sd is of the log."""
    if not low < ratio < high:
        return low, high
    below, above = (math.hypot(math.log(end / ratio), 1.96 * sd) for end in (low, high))
    return ratio * math.exp(-below), ratio * math.exp(above)


def _renamed(fits: Fits, side: int) -> pd.DataFrame:
    """The cells of a side, under names that no other side has; each side is a family of its own."""
    cells = fits.cells.assign(architecture=str(side))
    return cells.set_axis([f"{side}/{name}" for name in cells.index])


def matched_cells(reference: pd.DataFrame, other: pd.DataFrame) -> list[MatchedCell]:
    """Pairs of cells of the same N and D with a known loss, smallest first; each cell once."""
    free = other[other["loss"].notna()]
    pairs = []
    for name, row in reference[reference["loss"].notna()].iterrows():
        away = np.max(np.abs(np.log(free[[N, D]].to_numpy(float) / row[[N, D]].to_numpy(float))), 1)
        if not len(away) or away.min() > SAME_SIZE:
            continue
        match = free.iloc[int(away.argmin())]
        free = free.drop(index=match.name)
        ratio = float(match["loss"] / row["loss"])
        sd = math.hypot(row["loss_se"] / row["loss"], match["loss_se"] / match["loss"])
        pairs.append(
            MatchedCell(
                reference=str(name),
                other=str(match.name),
                params=float(row[N]),
                tokens=float(row[D]),
                flops=float(row[C]),
                reference_loss=float(row["loss"]),
                other_loss=float(match["loss"]),
                ratio=ratio,
                low=ratio * math.exp(-1.96 * sd),
                high=ratio * math.exp(1.96 * sd),
            )
        )
    return pairs


def contrast_matched(pairs: list[MatchedCell], *, n_boot: int = 200, seed: int = 0) -> Contrast:
    """The mean ratio of losses over cells of the same size, by resampling these."""
    n = len(pairs)
    if not n:
        return no_contrast(
            "loss", "N and D", MATCHED, "too few cells", "no two cells have the same N and D"
        )
    logs = np.log([p.ratio for p in pairs])
    low = high = math.nan
    message = "fewer than 3 pairs: no interval"
    if n >= 3:
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(n, np.full(n, 1 / n), size=max(n_boot, 200)) @ logs / n
        # Resampled means stray less than means do, by (n - 1) / n in their variance.
        half = stats.t.ppf(0.975, n - 1) * draws.std() * math.sqrt(n / (n - 1))
        low, high = (math.exp(logs.mean() + s * half) for s in (-1, 1))
        message = ""
    ratio = math.exp(logs.mean())
    return Contrast("loss", "N and D", ratio, low, high, n, MATCHED, {}, CONVERGED, message)


def no_contrast(quantity: str, equal: str, how: str, status: str, message: str) -> Contrast:
    """A contrast that could not be had, with why."""
    nan = math.nan
    return Contrast(quantity, equal, nan, nan, nan, 0, how, {}, status, message)
