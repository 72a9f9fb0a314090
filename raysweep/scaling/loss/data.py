"""LossData: the losses that laws are fitted to, with the columns a law may read; and its levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.cluster.hierarchy import fcluster, linkage

from raysweep.errors import UserError
from raysweep.scaling.loss.expression import Inputs
from raysweep.scaling.loss.laws import Law
from raysweep.study.shape import COUNTS, RunSize

COLUMNS = (
    *COUNTS,
    "tokens",
    "flops",
    "experts",
    "top_k",
    "granularity",
    "batch_tokens",
    "steps",
)
"""What a law may read of a run, named as in the results table."""

STAND_INS = {
    "params_total": "params_total_non_embedding",
    "params_active": "params_active_non_embedding",
    "params_dense": "params_active_non_embedding",
}
"""The count that stands in for one that a table lacks."""

SIZES = (*COUNTS, "tokens", "experts", "top_k", "granularity")
"""Runs that agree in these are repeats of each other."""

SAME = 1e-6
"""Relative difference below which two sizes are one."""

LEVEL_RATIO = 1.2
"""Values of one level differ by less than this factor; runs of one budget do by a few per cent."""

WIDEST_LEVEL = 2.0
"""Where no budgets were held, runs within this factor of FLOPs are joined into a level."""

CELLS_A_LEVEL = 3

SPREAD = 0.05
"""An input that varies by less, in its log, says nothing of its exponent."""


@dataclass(frozen=True, eq=False)
class LossData:
    """Losses and the runs they belong to, as arrays of one length n.

    `columns` holds each of `COLUMNS`, NaN where it is not known (and `sparsity`, where it is given
    in place of experts). `loss` is in nats per token, `log_se` the known sd of ln loss (0: not
    known), `cell` an id; rows of one cell are resampled together. `run_sd` is the sd of ln loss
    between repeated runs, 0 where none were repeated."""

    columns: Mapping[str, np.ndarray]
    loss: np.ndarray
    log_se: np.ndarray
    cell: np.ndarray
    run_sd: float = 0.0

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def unspanned(self) -> list[str]:
        """Which of `params` and `tokens` is the same in all runs."""
        if not len(self):
            return []
        counts = [self.columns[name] for name in COUNTS]
        told = next((n for n in counts if np.isfinite(n).all()), None)
        given = {"params": told, "tokens": self.columns["tokens"]}
        return [
            name
            for name, values in given.items()
            if values is not None and np.isfinite(values).all() and np.ptp(np.log(values)) < SPREAD
        ]

    @classmethod
    def of(
        cls,
        columns: Inputs,
        loss: npt.ArrayLike,
        *,
        log_se: npt.ArrayLike = 0.0,
        cell: npt.ArrayLike | None = None,
    ) -> LossData:
        """From arrays [n] by column; `params` stands for every count. UserError for other names
        and for lengths that differ."""
        observed = np.asarray(loss, dtype=float)
        n = observed.size
        if observed.shape != (n,):
            raise UserError("the losses must be a list of numbers, one a run")
        known = (*COLUMNS, "params", "sparsity")
        for name in columns:
            if name not in known:
                raise UserError(f"no law reads a column '{name}'; known: {', '.join(known)}")
        given = {name: np.asarray(v, dtype=float) for name, v in columns.items()}
        given |= {name: given["params"] for name in COUNTS if "params" in given}
        ids = np.arange(n) if cell is None else np.unique(np.asarray(cell), return_inverse=True)[1]
        errors = np.asarray(log_se, dtype=float)
        errors = np.full(n, float(errors)) if errors.ndim == 0 else errors
        lengths = {**{k: v for k, v in given.items() if v.ndim}, "cell": ids, "log_se": errors}
        for name, value in lengths.items():
            if value.shape != (n,):
                raise UserError(
                    f"the columns differ in length: {value.size} of '{name}' and {n} losses; "
                    "give one loss a run"
                )
        table = {name: np.full(n, np.nan) for name in COLUMNS}
        for name, value in given.items():
            if name != "params":
                table[name] = np.broadcast_to(value, (n,)).copy()
        return cls(table, observed, errors, ids)

    @classmethod
    def from_cells(cls, cells: pd.DataFrame) -> LossData:
        """From a cell table: its columns by name, `loss`, `loss_se` and, for several rows of one
        cell, `cell_group`. Rows without a loss are left out."""
        known = cells[cells["loss"].notna()]
        loss = known["loss"].to_numpy(float)
        relative = np.zeros(len(known))
        if "loss_se" in known:
            relative = np.nan_to_num((known["loss_se"] / known["loss"]).to_numpy(float))
        ids = known["cell_group"] if "cell_group" in known else known.index.to_series()
        columns = {name: known[name].to_numpy(float) for name in COLUMNS if name in known}
        return cls.of(columns, loss, log_se=relative, cell=ids.astype(str).to_numpy())

    def select(self, rows: np.ndarray) -> LossData:
        """The rows of a mask or of indices."""
        columns = {name: value[rows] for name, value in self.columns.items()}
        return replace(
            self,
            columns=columns,
            loss=self.loss[rows],
            log_se=self.log_se[rows],
            cell=self.cell[rows],
        )

    def averaged(self) -> LossData:
        """Repeats, runs of equal sizes and tokens, as one row each: the mean ln loss and its sd.

        Known errors weigh the mean; where none is known, the spread within all the repeats, pooled,
        is a run's sd. (The least of several would be too low: by .83 % of three with 1 %.)"""
        sizes = np.stack([np.log(self.columns[name]) for name in SIZES], axis=1)
        keys = np.round(np.nan_to_num(sizes, nan=-1.0) / SAME).astype(np.int64)
        _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        group = group.ravel()
        if len(first) == len(self):
            return self
        order = np.argsort(first)
        rank = np.empty(len(first), dtype=int)
        rank[order] = np.arange(len(first))
        group, first = rank[group], first[order]
        repeats = np.bincount(group)
        log_loss = np.log(self.loss)
        plain = np.bincount(group, log_loss) / repeats
        freedom = len(self) - len(first)
        run_sd = float(np.sqrt(((log_loss - plain[group]) ** 2).sum() / freedom))
        sd = np.where(self.log_se > 0, self.log_se, max(run_sd, 1e-12))
        weight = np.bincount(group, sd**-2.0)
        mean = np.bincount(group, log_loss * sd**-2.0) / weight
        columns = {name: value[first] for name, value in self.columns.items()}
        for name in ("flops", "batch_tokens", "steps"):
            columns[name] = np.bincount(group, self.columns[name]) / repeats
        return LossData(columns, np.exp(mean), weight**-0.5, np.arange(len(first)), run_sd)

    def inputs(self, law: Law) -> tuple[dict[str, np.ndarray], str]:
        """The inputs [n] that a law reads, and the column that serves as its N.

        UserError names a column that the law needs and the rows lack."""
        count = law.parameter_count
        if not self._complete(count):
            count = STAND_INS.get(count, count)
        inputs = {}
        for name in law.inputs:
            if name == "sparsity":
                inputs[name] = self._sparsity(law)
                continue
            column = count if name == "params" else name
            value = self.columns[column]
            if np.isnan(value).any():
                row = int(np.argmax(np.isnan(value)))
                lacking = "these runs lack" if np.isnan(value).all() else f"row {row} lacks"
                raise UserError(f"law '{law.key}' needs a column '{column}', which {lacking}")
            inputs[name] = value
        return inputs, count

    @property
    def flops(self) -> np.ndarray:
        """Training FLOPs [n]; 6 N D, with the first count that is known, where they are not."""
        return compute_of(self.columns)

    def levels(self) -> np.ndarray:
        """The level of compute [n] of each row; see `compute_levels`."""
        return compute_levels(self.flops)

    def _complete(self, column: str) -> bool:
        return not np.isnan(self.columns[column]).any()

    def _sparsity(self, law: Law) -> np.ndarray:
        if "sparsity" in self.columns:
            return self.columns["sparsity"]
        for name in ("experts", "top_k"):
            if not self._complete(name):
                raise UserError(f"law '{law.key}' needs a column '{name}', which these runs lack")
        return 1 - self.columns["top_k"] / self.columns["experts"]


Runs = Mapping[str, npt.ArrayLike] | pd.DataFrame | Sequence[RunSize]
"""Runs to be told of: columns by name, or sizes."""


def run_columns(runs: Runs) -> dict[str, np.ndarray]:
    """`COLUMNS` of some runs, arrays of one length, NaN where a column is not known."""
    if isinstance(runs, Mapping | pd.DataFrame):
        given = {str(name): np.asarray(runs[name], dtype=float) for name in COLUMNS if name in runs}
        if "params" in runs:
            value = np.asarray(runs["params"], dtype=float)
            given |= {name: given.get(name, value) for name in COUNTS}
        n = max((v.size for v in given.values()), default=0)
        columns = {name: np.full(n, np.nan) for name in COLUMNS}
        columns |= {name: np.broadcast_to(v, (n,)).astype(float) for name, v in given.items()}
    else:
        columns = {
            name: np.array([float(getattr(run, name, math.nan)) for run in runs])
            for name in COLUMNS
        }
        columns["flops"] = np.array([run.compute for run in runs])
    for name in ("experts", "top_k"):
        columns[name] = np.where(np.isnan(columns[name]), 1.0, columns[name])
    columns["flops"] = compute_of(columns)
    dense = columns["experts"] <= 1
    active = columns["params_active_non_embedding"]
    for name in ("params_total_non_embedding", "params_dense"):
        columns[name] = np.where(np.isnan(columns[name]) & dense, active, columns[name])
    return columns


def compute_of(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Training FLOPs [n] of runs; 6 N D where they are not known, by the first count that is."""
    found = columns["flops"]
    for name in COUNTS:
        found = np.where(np.isnan(found), 6 * columns[name] * columns["tokens"], found)
    return found


def levels(scale: npt.ArrayLike, ratio: float = LEVEL_RATIO) -> np.ndarray:
    """Number each value's level [n]: values within a factor `ratio` of a neighbour are one."""
    scale = np.asarray(scale, dtype=float)
    order = np.argsort(scale, kind="stable")
    jumps = np.diff(np.log(scale[order])) > np.log(ratio)
    numbered = np.empty(len(scale), dtype=int)
    numbered[order] = np.concatenate([[0], np.cumsum(jumps)])
    return numbered


def held_budgets(flops: np.ndarray) -> np.ndarray | None:
    """The budget [n] of each run where budgets were held while sizes varied, else None."""
    level = levels(flops)
    spans = [np.ptp(np.log(flops[level == k])) for k in range(level.max() + 1)]
    several = np.median(np.bincount(level)) >= CELLS_A_LEVEL
    return level if len(spans) > 1 and max(spans) < np.log(LEVEL_RATIO) and several else None


def compute_levels(flops: np.ndarray) -> np.ndarray:
    """The level of compute [n] of runs, counted from the least.

    A held budget is a level. Anywhere else runs within a factor of `WIDEST_LEVEL` are joined, and a
    level of too few cells (`CELLS_A_LEVEL`, fewer of a handful of cells) with its nearest."""
    n = len(flops)
    if n < 2:
        return np.zeros(n, dtype=int)
    level = held_budgets(flops)
    log_flops = np.log(flops)
    if level is None:
        tree = linkage(log_flops[:, None], "complete")
        label = fcluster(tree, np.log(WIDEST_LEVEL), "distance")
        means = np.bincount(label, log_flops)[1:] / np.bincount(label)[1:]
        level = np.argsort(np.argsort(means))[label - 1]
    fewest = min(CELLS_A_LEVEL, max(1, n // 4))
    while level.max() > 0:
        sizes = np.bincount(level)
        least = int(np.argmin(sizes))
        if sizes[least] >= fewest:
            break
        means = np.bincount(level, log_flops) / sizes
        near = [k for k in (least - 1, least + 1) if 0 <= k <= level.max()]
        other = min(near, key=lambda k: abs(means[k] - means[least]))
        level = level - (level >= max(least, other))
    return level
