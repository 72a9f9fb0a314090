"""The run that a recommendation is asked for: every count that a law may want of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.scaling.published import Setting
from raysweep.scaling.surface_features import CellFeatures


@dataclass(frozen=True)
class Target:
    """The run asked about, with every count that a law may want as its N."""

    inputs: dict[str, float]
    """By column: the parameter counts, tokens, flops, experts, top_k, active_ratio; and
    head_params, NaN where the cells do not tell it."""
    notes: tuple[str, ...]

    def features(self) -> CellFeatures:
        """As the surface model takes it."""
        return CellFeatures(
            name="run",
            params=self.inputs["params_active_non_embedding"],
            tokens=self.inputs["tokens"],
            experts=int(self.inputs["experts"]),
            top_k=int(self.inputs["top_k"]),
            params_total=self.inputs["params_total_non_embedding"],
            flops=self.inputs["flops"],
        )

    def setting(self) -> Setting:
        """As the published laws take it."""
        get = self.inputs.get
        head = self.inputs["head_params"]
        return Setting(
            params_active_non_embedding=self.inputs["params_active_non_embedding"],
            tokens=self.inputs["tokens"],
            params_total_non_embedding=self.inputs["params_total_non_embedding"],
            params_active=get("params_active"),
            head_params=head if math.isfinite(head) else None,
            flops_per_token=self.inputs["flops"] / self.inputs["tokens"],
            experts=int(self.inputs["experts"]),
            top_k=int(self.inputs["top_k"]),
        )


def describe_target(
    cells: pd.DataFrame, params: float, tokens: float, experts: int, top_k: int
) -> Target:
    """Every count of a run of `params` active non-embedding parameters, after the cells of its
    family.

    Embeddings grow as the width does, with N^(1/3), from the largest cell. FLOPs a token follow the
    cells' own trend in N, never below 6 N. Routed experts keep the share of active parameters
    that they have in the cells (two thirds, a usual feed-forward share, where no cell is MoE).
    """
    notes = []
    largest = _largest(cells)
    n0 = float(largest["params_active_non_embedding"])
    share = expert_share(cells)
    if share is None:
        share = 2 / 3
        if experts > 1:
            notes.append("no MoE cell tells the share of experts in N: 2/3 is assumed")
    total = params if experts == 1 else params * (1 - share + share * experts / top_k)
    wider = (params / n0) ** (1 / 3)
    embedding = (float(largest["params_active"]) - n0) * wider
    # Results that give one count for all tell nothing of a head.
    head = float(largest["d_model"]) * float(largest["vocab_size"]) * wider
    head = head if math.isfinite(head) else embedding / 2 or math.nan
    dense = float((cells["params_dense"] / cells["params_active_non_embedding"]).median()) * params
    inputs = {
        "params_active_non_embedding": params,
        "params_total_non_embedding": total,
        "params_active": params + embedding,
        "params_total": total + embedding,
        "params_dense": dense,
        "head_params": head,
        "tokens": tokens,
        "flops": _flops_per_token(cells, params) * tokens,
        "experts": float(experts),
        "top_k": float(top_k),
        "active_ratio": params / total,
    }
    return Target(inputs, tuple(notes))


@dataclass(frozen=True)
class ComputePath:
    """How cells split their compute: ln(tokens / params) = intercept + slope ln FLOPs.

    A law of the loss in compute alone has learnt one split at each budget and knows no other: from
    cells of one horizon, say, it would take any large model for one that saw few tokens."""

    intercept: float
    slope: float
    tolerance: float
    """How far ln(tokens / params) of a run may lie from the path: a factor of 4, or three standard
    deviations of the cells where they scatter more."""

    @classmethod
    def of(cls, cells: pd.DataFrame) -> ComputePath:
        """The path of cells that have a loss, by least squares."""
        known = cells[cells["loss"].notna()]
        params = known["params_active_non_embedding"].to_numpy(float)
        ratio = np.log(known["tokens"].to_numpy(float) / params)
        compute = np.log(known["flops"].to_numpy(float))
        spread = compute - compute.mean()
        slope = 0.0 if np.ptp(compute) < 1e-9 else float(spread @ ratio / (spread @ spread))
        off = ratio - ratio.mean() - slope * spread
        scatter = math.sqrt(float(off @ off) / max(len(off) - 2, 1))
        intercept = float(ratio.mean() - slope * compute.mean())
        return cls(intercept, slope, max(math.log(4), 3 * scatter))

    def expected(self, inputs: Mapping[str, float]) -> float:
        """Tokens a parameter at a run's compute."""
        return math.exp(self.intercept + self.slope * math.log(inputs["flops"]))

    def near(self, inputs: Mapping[str, float]) -> bool:
        """Whether a run lies near the path."""
        asked = inputs["tokens"] / inputs["params_active_non_embedding"]
        return abs(math.log(asked / self.expected(inputs))) <= self.tolerance


def expert_share(cells: pd.DataFrame) -> float | None:
    """Share of the active non-embedding parameters in routed experts, from the largest MoE cell."""
    moe = cells[
        (cells["experts"] > cells["top_k"])
        & (cells["params_total_non_embedding"] > cells["params_active_non_embedding"])
    ]
    if not len(moe):
        return None
    row = _largest(moe)
    active = float(row["params_active_non_embedding"])
    expert = (float(row["params_total_non_embedding"]) - active) / (row["experts"] - row["top_k"])
    return min(1.0, float(row["top_k"]) * expert / active)


def _largest(cells: pd.DataFrame) -> dict[str, float]:
    """The row of the cell with the most active parameters."""
    place = int(np.argmax(cells["params_active_non_embedding"].to_numpy(float)))
    return {str(k): v for k, v in cells.iloc[[place]].to_dict("records")[0].items()}


def _flops_per_token(cells: pd.DataFrame, params: float) -> float:
    exact = cells[cells["flops_exact"]]
    floor = 6 * params
    if not len(exact):
        return floor
    n = np.log(exact["params_active_non_embedding"].to_numpy(float))
    f = np.log(exact["flops_per_token"].to_numpy(float))
    if np.ptp(n) < 1e-9:
        return max(floor, float(np.exp(f.mean())) * params / float(np.exp(n.mean())))
    slope, intercept = np.polyfit(n, f, 1)
    return max(floor, math.exp(intercept + slope * math.log(params)))


def extrapolation(cells: pd.DataFrame, inputs: Mapping[str, float]) -> dict[str, float]:
    """How far a run lies beyond the cells: above 1, below 1, or 1 inside their range."""
    columns = {"params": "params_active_non_embedding", "tokens": "tokens", "FLOPs": "flops"}
    factors = {}
    for name, column in columns.items():
        low, high = float(cells[column].min()), float(cells[column].max())
        value = inputs[column]
        factors[name] = value / high if value > high else value / low if value < low else 1.0
    return factors
