"""Critical batch and gradient noise scale against loss, and dense against MoE at equal loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.scaling.optima_laws import fit_law, law_inputs
from raysweep.scaling.optimum import Optimum
from raysweep.scaling.power_law import Exponent, PowerLaw, fit_power_law

NEAR_BEST = 0.01
"""The noise scale of a cell is read off its trials within this share of the best loss."""
ONE_TRIAL = 0.5
"""sd of ln noise scale where one trial tells it."""


@dataclass(frozen=True)
class CriticalBatch:
    """B_crit = B0 / L^(1/a), batches in tokens, loss in nats a token (Kaplan 2001.08361, eq. 1.4).

    `law` is the power law of loss behind it: exponent -1/a, coefficient B0.
    """

    law: PowerLaw

    @property
    def b0(self) -> Exponent:
        return self.law.coefficient

    @property
    def a(self) -> Exponent:
        """NaN where the exponent of L, or an end of its interval, is not negative."""
        slope = self.law.exponents["loss"]
        low, high = (-1 / e if e < 0 else math.nan for e in (slope.low, slope.high))
        value = -1 / slope.value if slope.value < 0 else math.nan
        return Exponent(value, low, high)

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "formula": "B = B0 / L^(1/a)",
            "B0": self.b0.to_dict(),
            "a": self.a.to_dict(),
            "law": self.law.to_dict(),
        }


@dataclass(frozen=True)
class Ratio:
    """MoE over dense of one quantity, other things equal: ratio with its 95 % interval."""

    quantity: str
    at_equal: tuple[str, ...]
    ratio: float
    low: float
    high: float
    status: str
    message: str
    n_dense: int
    n_moe: int
    overlap: tuple[float, float]
    """Range of the first input in which both kinds have cells; NaN where there is none."""

    @property
    def ok(self) -> bool:
        return self.status == "converged"

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "quantity": self.quantity,
            "at_equal": list(self.at_equal),
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "status": self.status,
            "message": self.message,
            "n_dense": self.n_dense,
            "n_moe": self.n_moe,
            "overlap": list(self.overlap),
        }


def cell_noise_scale(cells: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """The gradient noise scale B_simple = tr S / |G|^2 of each cell, in tokens, with its log sd.

    From the trials within 1 % of the cell's best. Numerator and denominator are averaged separately
    where both are recorded (McCandlish 1812.06162, app. A), else the recorded ratios in logs. An
    estimate of |G|^2 may be negative, and counts: to leave it out would choose by the outcome.
    Columns `noise_scale_tokens` and `log_sd`, indexed by cell, NaN where `left_out` says why.
    """
    best = trials.groupby("cell")["loss"].transform("min")
    near = trials[trials["loss"] <= best * (1 + NEAR_BEST)]
    columns = [near[c].astype(float) for c in ("noise_trace", "noise_grad_sq", "sequence_length")]
    trace, grad_sq, length = columns
    apart = trace.notna() & grad_sq.notna() & (length > 0)
    found = pd.DataFrame(
        {
            "noise_scale_tokens": math.nan,
            "log_sd": math.nan,
            "left_out": "noise scale not measured",
        },
        index=cells.index,
    )
    for cell in found.index.intersection(near["cell"]):
        own = near["cell"] == cell
        if (parts := own & apart).any():
            scale, sd = _ratio_of_means(trace[parts], grad_sq[parts])
            scale *= length[parts].iloc[0]
            why = "|G|^2 not distinguishable from 0"
        else:
            logs = np.log(near["noise_scale_tokens"].astype(float).where(lambda x: x > 0))[own]
            scale, sd = math.exp(logs.mean()), logs.std() / math.sqrt(max(logs.count(), 1))
            why = str(found.loc[cell, "left_out"])
        known = math.isfinite(scale)
        sd = sd if math.isfinite(sd) else ONE_TRIAL
        found.loc[cell] = (scale, sd, "") if known else (math.nan, math.nan, why)
    return found


def _ratio_of_means(trace: pd.Series, grad_sq: pd.Series) -> tuple[float, float]:
    """mean(trace) / mean(grad_sq) and its log sd; NaN where a mean is not positive, and an sd
    of NaN from one trial."""
    means = trace.mean(), grad_sq.mean()
    if min(means) <= 0:
        return math.nan, math.nan
    # To first order the log of the ratio varies as this difference does.
    error = trace / means[0] - grad_sq / means[1]
    return means[0] / means[1], float(error.std()) / math.sqrt(len(error))


def fit_critical_batch(
    cells: pd.DataFrame, optima: Mapping[str, Optimum], *, n_boot: int = 200, seed: int = 0
) -> CriticalBatch:
    """The optimal batch against loss, over the rows of a cell table with the column `loss`."""
    return CriticalBatch(
        fit_law("batch_tokens", ("loss",), cells, optima, n_boot=n_boot, seed=seed)
    )


def fit_noise_scale(
    cells: pd.DataFrame, noise: pd.DataFrame, *, n_boot: int = 200, seed: int = 0
) -> CriticalBatch:
    """The measured noise scale against loss; `noise` as of `cell_noise_scale`."""
    return CriticalBatch(
        _noise_law(cells, noise, {"loss": cells["loss"].to_numpy(float)}, n_boot, seed)
    )


def compare_kinds(
    cells: pd.DataFrame,
    optima: Mapping[str, Optimum],
    noise: pd.DataFrame,
    *,
    at_equal: tuple[str, ...] = ("loss",),
    n_boot: int = 200,
    seed: int = 0,
) -> dict[str, Ratio]:
    """MoE over dense at equal `at_equal`; see `compare_halves`."""
    moe = (cells["architecture_kind"] == "moe").to_numpy()
    return compare_halves(cells, optima, noise, moe, at_equal=at_equal, n_boot=n_boot, seed=seed)


def compare_halves(
    cells: pd.DataFrame,
    optima: Mapping[str, Optimum],
    noise: pd.DataFrame,
    other: np.ndarray,
    *,
    at_equal: tuple[str, ...],
    n_boot: int = 200,
    seed: int = 0,
) -> dict[str, Ratio]:
    """The cells `other` [n] over the rest at equal `at_equal`: batch_tokens, learning_rate and
    noise_scale_tokens.

    One power law over both halves, with the same exponents and a factor for the other one: the
    factor is the ratio. Says how far the two overlap, since beyond that the ratio is an
    extrapolation.
    """
    factor = {"moe": np.where(other, math.e, 1.0)}
    inputs = (*at_equal, "moe")
    laws = {
        target: fit_law(target, inputs, cells, optima, extra=factor, n_boot=n_boot, seed=seed)
        for target in ("batch_tokens", "learning_rate")
    }
    columns = law_inputs(cells, "params_active_non_embedding")
    laws["noise_scale_tokens"] = _noise_law(
        cells, noise, {**{k: columns[k] for k in at_equal}, **factor}, n_boot, seed
    )
    return {
        target: _ratio(law, at_equal, cells, other, columns[at_equal[0]])
        for target, law in laws.items()
    }


def _noise_law(
    cells: pd.DataFrame,
    noise: pd.DataFrame,
    inputs: Mapping[str, np.ndarray],
    n_boot: int,
    seed: int,
) -> PowerLaw:
    known = noise["noise_scale_tokens"].notna().to_numpy()
    return fit_power_law(
        "noise_scale_tokens",
        {name: column[known] for name, column in inputs.items()},
        noise["noise_scale_tokens"].to_numpy(float)[known],
        noise["log_sd"].to_numpy(float)[known],
        cells=[str(c) for c in cells.index[known]],
        left_out={str(c): str(why) for c, why in noise["left_out"][~known].items()},
        n_boot=n_boot,
        seed=seed,
    )


def _ratio(
    law: PowerLaw,
    at_equal: tuple[str, ...],
    cells: pd.DataFrame,
    moe: np.ndarray,
    first: np.ndarray,
) -> Ratio:
    used = cells.index.isin(law.cells)
    log_ratio = law.exponents["moe"]
    n_dense, n_moe = int((used & ~moe).sum()), int((used & moe).sum())
    status, message = law.status, law.message
    if not (n_dense and n_moe):
        status, message = "too few cells", f"{n_dense} dense and {n_moe} MoE cells to compare"
    low = high = math.nan
    if n_dense and n_moe:
        low = max(first[used & moe].min(), first[used & ~moe].min())
        high = min(first[used & moe].max(), first[used & ~moe].max())
    return Ratio(
        quantity=law.target,
        at_equal=at_equal,
        ratio=math.exp(log_ratio.value),
        low=math.exp(log_ratio.low) if math.isfinite(log_ratio.low) else math.nan,
        high=math.exp(min(log_ratio.high, 700.0)) if math.isfinite(log_ratio.high) else math.nan,
        status=status,
        message=message,
        n_dense=n_dense,
        n_moe=n_moe,
        overlap=(float(low), float(high)) if low <= high else (math.nan, math.nan),
    )
