"""From the results table to cells: the trials that count, and each cell's sizes, as arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.schema import COLUMNS, FINISHED
from raysweep.scaling.surface_features import CellFeatures

COUNTS = (
    "params_active_non_embedding",
    "params_total_non_embedding",
    "params_active",
    "params_total",
    "params_dense",
)
"""The parameter counts that a law may take as its N."""

REQUIRED = ("architecture", "params_active_non_embedding", "tokens", "loss")

_SIZES = (
    *COUNTS,
    "experts",
    "top_k",
    "d_model",
    "vocab_size",
    "flops_per_token",
    "sequence_length",
    "d_ff",
    "expert_ff",
    "granularity",
)
_TEXT = (
    "study",
    "cell",
    "architecture",
    "architecture_kind",
    "scale",
    "status",
    "excluded",
    "reason",
)


@dataclass(frozen=True)
class CellTrials:
    """The trials of one cell that count, as arrays of one length n.

    The `failed_*` arrays hold the diverged trials: they bound the searched range.
    """

    features: CellFeatures
    learning_rate: np.ndarray
    batch_tokens: np.ndarray
    loss: np.ndarray
    failed_learning_rate: np.ndarray
    failed_batch_tokens: np.ndarray

    @property
    def name(self) -> str:
        return self.features.name


@dataclass(frozen=True)
class CellTable:
    """All cells of a results table.

    `cells` has one row a cell, indexed by its name, smallest compute first: sizes, numbers of
    trials, best loss, and the mean of all with their sd (both of ln loss). `trials` are the rows
    that count for a loss, `failed` those that diverged, `left_out` every other row with the column
    `why`. All three carry `cell`, unique to the cell.
    """

    cells: pd.DataFrame
    trials: pd.DataFrame
    failed: pd.DataFrame
    left_out: pd.DataFrame

    def searched(self) -> list[CellTrials]:
        """Cells with trials whose learning rate and batch are known, in the order of `cells`."""
        with_rate = _has_hyperparameters(self.trials)
        trials = dict(iter(self.trials[with_rate].groupby("cell", sort=False)))
        failed = dict(iter(self.failed.groupby("cell", sort=False)))
        nothing = self.failed.iloc[:0]
        return [
            _arrays(self.features(name), trials[name], failed.get(name, nothing))
            for name in self.cells.index
            if name in trials
        ]

    def features(self, cell: str) -> CellFeatures:
        """One cell as the surface model sees it."""
        row = self.cells.loc[[cell]].to_dict("records")[0]
        total = float(row["params_total_non_embedding"])
        active = float(row["params_active_non_embedding"])
        return CellFeatures(
            name=cell,
            params=active,
            tokens=float(row["tokens"]),
            experts=int(row["experts"]),
            top_k=int(row["top_k"]),
            params_total=total if np.isfinite(total) and total >= active else None,
            flops=float(row["flops"]),
        )


def cell_table(frame: pd.DataFrame) -> CellTable:
    """Sort the rows of a results table (columns of `results.schema`) into cells.

    Columns that a table lacks count as empty; UserError where one is missing without which
    nothing can be fitted.
    """
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise UserError(f"the results table lacks the column {missing[0]!r}: see raysweep import")
    rows = frame.reindex(columns=list(dict.fromkeys((*COLUMNS, *frame.columns)))).reset_index(
        drop=True
    )
    numeric = [n for n in (*COLUMNS, "granularity") if n not in _TEXT and n in _NUMERIC]
    rows = rows.assign(
        **{n: pd.to_numeric(rows[n], errors="coerce").astype(float) for n in numeric if n in rows}
    )
    rows = rows.assign(
        experts=rows["experts"].fillna(1.0),
        top_k=rows["top_k"].fillna(1.0),
        status=rows["status"].fillna(FINISHED),
        architecture=rows["architecture"].astype(object).fillna("unnamed"),
    )
    rows["architecture_kind"] = (
        rows["architecture_kind"]
        .astype(object)
        .where(rows["architecture_kind"].notna(), np.where(rows["experts"] > 1, "moe", "dense"))
    )
    active, is_dense = rows["params_active_non_embedding"], rows["experts"] <= 1
    for name in ("params_total_non_embedding", "params_dense"):
        rows[name] = rows[name].where(rows[name].notna() | ~is_dense, active)
    rows["why"] = _why_left_out(rows)
    rows["cell"] = _unique_cells(rows)
    usable = rows["why"] == ""
    diverged = (rows["status"] == "diverged") & _has_hyperparameters(rows)
    diverged &= _positive(rows["tokens"]) & _positive(rows["params_active_non_embedding"])
    return CellTable(
        cells=_cell_rows(rows, usable),
        trials=rows[usable].drop(columns="why"),
        failed=rows[diverged & rows["excluded"].isna()].drop(columns="why"),
        left_out=rows[~usable],
    )


_NUMERIC = {name for name, c in COLUMNS.items() if str(c.type) in ("int64", "double")}


def routings(cells: pd.DataFrame) -> int:
    """Different numbers of experts, and of experts a token, among rows; dense counts as one."""
    return len(cells[["experts", "top_k"]].drop_duplicates())


def _positive(column: pd.Series) -> pd.Series:
    return (column > 0) & np.isfinite(column.astype(float))


def _has_hyperparameters(rows: pd.DataFrame) -> pd.Series:
    return _positive(rows["learning_rate"]) & _positive(rows["batch_tokens"])


def _why_left_out(rows: pd.DataFrame) -> pd.Series:
    """Why each row is kept out of fits; "" where it counts."""
    why = pd.Series("", index=rows.index, dtype=object)
    for name in ("loss", "tokens", "params_active_non_embedding"):
        column = rows[name]
        why = why.where(_positive(column), f"{name} is missing, zero, negative or not finite")
    status = rows["status"].astype(object)
    why = why.where(status == FINISHED, status)
    excluded = rows["excluded"]
    why = why.where(excluded.isna() | (excluded == ""), "excluded: " + excluded.astype(str))
    # Studies that share a folder have a row each of a trial that both ran.
    counts = (why == "") & rows["trial_key"].notna()
    again = rows["trial_key"].where(counts).duplicated() & counts
    return why.mask(again, "the same trial in another study")


def _unique_cells(rows: pd.DataFrame) -> pd.Series:
    """Cell names, told apart where studies of different sizes share one; derived where missing."""
    parts = ("architecture", "params_active_non_embedding", "tokens")
    derived = [
        f"{name}-{params:.4g}-{tokens:.4g}tok"
        for name, params, tokens in zip(*(rows[p] for p in parts), strict=True)
    ]
    given = rows["cell"].astype(object)
    cell = given.where(given.notna(), pd.Series(derived, index=rows.index, dtype=object))
    cell = cell.astype(str).astype(object)
    sizes = ["architecture", "params_active_non_embedding", "tokens", "experts", "top_k"]
    group = rows.groupby([cell, *(rows[s] for s in sizes)], sort=False, dropna=False).ngroup()
    first = group.groupby(cell, sort=False).transform("min")
    rank = group.groupby(cell, sort=False).rank("dense").astype(int)
    return cell.where(group == first, cell + " #" + rank.astype(str))


def _cell_rows(rows: pd.DataFrame, usable: pd.Series) -> pd.DataFrame:
    sized = rows[_positive(rows["tokens"]) & _positive(rows["params_active_non_embedding"])]
    grouped = sized.groupby("cell", sort=False)
    sizes = [s for s in _SIZES if s in sized]
    text = [t for t in ("study", "architecture", "architecture_kind", "scale") if t in sized]
    cells = grouped[[*text, "tokens", *sizes]].first()
    exact = cells["flops_per_token"] * cells["tokens"]
    rough = 6 * cells["params_active_non_embedding"] * cells["tokens"]
    total = cells["params_total_non_embedding"].fillna(cells["params_active_non_embedding"])
    if "granularity" not in cells:
        wide = cells["d_ff"] / cells["expert_ff"].where(cells["expert_ff"] > 0)
        cells["granularity"] = wide.where(cells["architecture_kind"] == "moe", 1.0)
    cells = cells.assign(
        flops=exact.where(_positive(exact), rough),
        flops_exact=_positive(exact),
        active_ratio=cells["params_active_non_embedding"] / total,
        n_trials=grouped.size(),
        n_finished=_count(sized, usable, cells.index),
        n_searched=_count(sized, usable & _has_hyperparameters(rows), cells.index),
        n_diverged=_count(sized, rows["status"] == "diverged", cells.index),
        best_loss=sized["loss"][usable].groupby(sized["cell"]).min().reindex(cells.index),
    )
    log_loss = sized["loss"][usable].astype(float).map(math.log)
    repeats = log_loss.groupby(sized["cell"])
    cells = cells.assign(
        mean_loss=repeats.mean().map(math.exp).reindex(cells.index),
        loss_sd=repeats.std().reindex(cells.index),
    )
    return cells.sort_values(["flops", "tokens"], kind="stable")


def _count(sized: pd.DataFrame, mask: pd.Series, index: pd.Index) -> pd.Series:
    return mask[sized.index].groupby(sized["cell"]).sum().reindex(index).astype(int)


def _arrays(features: CellFeatures, rows: pd.DataFrame, failed: pd.DataFrame) -> CellTrials:
    return CellTrials(
        features=features,
        learning_rate=rows["learning_rate"].to_numpy(float),
        batch_tokens=rows["batch_tokens"].to_numpy(float),
        loss=rows["loss"].to_numpy(float),
        failed_learning_rate=failed["learning_rate"].to_numpy(float),
        failed_batch_tokens=failed["batch_tokens"].to_numpy(float),
    )
