"""What trials measure beside their loss: gradient noise scale and load of experts, by cell."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from raysweep.scaling.estimate import Estimate

NEAR_BEST = 0.01
"""The noise scale of a cell is read off its trials within this share of the best loss."""
ONE_TRIAL, MIN_SD = 0.5, 0.01
"""sd of ln noise scale where one trial tells it, and the least that trials may claim."""


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
    recorded = near["noise_scale_tokens"].astype(float)
    near = near[apart | (recorded > 0)]
    found = pd.DataFrame(
        {
            "noise_scale_tokens": math.nan,
            "log_sd": math.nan,
            "left_out": "noise scale not measured",
        },
        index=cells.index,
    )
    for cell, own in near.groupby("cell").groups.items():
        if len(parts := own[apart[own]]):
            scale, sd = _ratio_of_means(trace[parts], grad_sq[parts])
            scale *= length[parts].iloc[0]
            why = "|G|^2 not distinguishable from 0"
        else:
            logs = np.log(recorded[own])
            scale, sd = math.exp(logs.mean()), logs.std() / math.sqrt(len(logs))
            why = ""
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


def noise_along(cells: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """The noise scale in each quarter of a run, against the mean training loss there.

    Of each cell the mean over its trials within 1 % of its best, numerator and denominator apart.
    Columns `cell`, `architecture`, `quarter` (from 1), `loss`, `noise_scale_tokens`; a quarter
    whose |G|^2 is not distinguishable from 0 is left out."""
    best = trials.groupby("cell")["loss"].transform("min")
    near = trials[(trials["loss"] <= best * (1 + NEAR_BEST)) & trials["noise_quarters"].notna()]
    rows = []
    for cell, own in near.groupby("cell", sort=False):
        if cell not in cells.index:
            continue
        runs = [json.loads(text) for text in own["noise_quarters"]]
        for k in range(min(map(len, runs))):
            parts = [run[k] for run in runs if run[k]["trace"] is not None]
            if not parts:
                continue
            loss, grad_sq, trace = (
                float(np.mean([p[name] for p in parts])) for name in ("loss", "grad_sq", "trace")
            )
            scale = trace / grad_sq if grad_sq > 0 and trace > 0 else math.nan
            length = float(own["sequence_length"].iloc[0])
            rows.append((cell, cells.loc[cell, "architecture"], k + 1, loss, scale * length))
    columns = ["cell", "architecture", "quarter", "loss", "noise_scale_tokens"]
    return pd.DataFrame(rows, columns=columns).dropna()


@dataclass(frozen=True)
class NoiseLaw:
    """The noise scale as a power law: ln scale = intercept + sum of exponents times ln inputs."""

    intercept: float
    exponents: dict[str, Estimate]
    n: int

    @property
    def b0(self) -> float:
        """The coefficient, in tokens: the noise scale where every input is 1."""
        return math.exp(self.intercept)


def fit_noise_scale(
    cells: pd.DataFrame,
    noise: pd.DataFrame,
    inputs: Sequence[str] = ("loss",),
    factor: np.ndarray | None = None,
) -> NoiseLaw | None:
    """Weighted least squares over the cells that measured it; None where they are too few.

    `inputs` are columns of `cells`; `factor` [cells], 0 or 1, adds a ratio of the cells marked 1
    over the others, as the exponent `factor` of e. Weights are those of the cells' own errors with
    their scatter about the law (by moments); intervals are Student's.
    """
    known = (noise["noise_scale_tokens"] > 0).to_numpy()
    columns = [np.log(cells[name].to_numpy(float)[known]) for name in inputs]
    names = list(inputs)
    if factor is not None:
        columns.append(factor[known].astype(float))
        names.append("factor")
    design = np.column_stack([np.ones(int(known.sum())), *columns])
    usable = np.isfinite(design).all(axis=1)
    design = design[usable]
    y = np.log(noise["noise_scale_tokens"].to_numpy(float)[known][usable])
    # Repeats that agree to all digits are no measure without error.
    sd = np.maximum(noise["log_sd"].to_numpy(float)[known][usable], MIN_SD)
    degrees = len(y) - design.shape[1]
    if degrees < 1:
        return None
    spread = np.linalg.svd(design - design.mean(0) * (np.arange(design.shape[1]) > 0))[1]
    if spread[-1] < 0.1:
        return None
    scatter, square = 0.0, 0.0
    theta, normal = np.zeros(design.shape[1]), np.eye(design.shape[1])
    for _ in range(20):
        weight = 1 / (sd**2 + scatter)
        normal = np.linalg.inv(design.T @ (design * weight[:, None]))
        theta = normal @ (design.T @ (weight * y))
        square = float((weight * (y - design @ theta) ** 2).sum())
        scatter = max(0.0, scatter + (square - degrees) / float(weight.sum()))
    reach = stdtrit(degrees, 0.975) * np.sqrt(normal.diagonal() * max(square / degrees, 1.0))
    exponents = {
        name: Estimate(float(t), float(t - r), float(t + r))
        for name, t, r in zip(names, theta[1:], reach[1:], strict=True)
    }
    return NoiseLaw(float(theta[0]), exponents, len(y))


LOAD_COLUMNS = ("expert_load_entropy", "expert_load_max_over_mean", "router_confidence")
"""As in `results.schema`."""


def cell_expert_load(cells: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """One row a MoE cell that measured any of `LOAD_COLUMNS`, indexed by cell.

    Each is the mean over the cell's `n_trials` within 1 % of its best loss, with its standard
    deviation between them as `COLUMN_sd` (NaN of one trial)."""
    best = trials.groupby("cell")["loss"].transform("min")
    near = trials[trials["loss"] <= best * (1 + NEAR_BEST)]
    near = near[near[list(LOAD_COLUMNS)].notna().any(axis=1)]
    grouped = near.groupby("cell")[list(LOAD_COLUMNS)]
    found = grouped.mean().join(grouped.std().add_suffix("_sd"))
    found.insert(0, "n_trials", near.groupby("cell").size())
    moe = cells.index[cells["architecture_kind"] == "moe"]
    return found.reindex([c for c in moe if c in found.index]).rename_axis("cell")
