"""How evenly tokens fall on experts in each MoE cell, and how sure its router is."""

from __future__ import annotations

import pandas as pd

from raysweep.scaling.noise import NEAR_BEST

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
