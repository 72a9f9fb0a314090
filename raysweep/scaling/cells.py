"""From the results table to cells: the trials that count, and each cell's sizes, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.columns import named_column
from raysweep.results.flags import flags
from raysweep.results.schema import COLUMNS, FINISHED
from raysweep.results.units import doubts
from raysweep.scaling.datasets import data_sets, said_of
from raysweep.scaling.joining import join_cells
from raysweep.scaling.runs import size_of
from raysweep.study.shape import COUNTS, RunSize

REQUIRED = ("architecture", "params_active_non_embedding", "tokens", "loss")

_SIZES = (
    *COUNTS,
    "experts",
    "top_k",
    "d_model",
    "layers",
    "heads",
    "kv_heads",
    "vocab_size",
    "flops_per_token",
    "sequence_length",
    "d_ff",
    "expert_ff",
    "granularity",
)
FAR = 0.1
"""A run this far in ln loss above the best of its cell, or of any cell no larger, is `far`."""
DIVERGED = 0.3
"""A finished run of an import this far above, at a learning rate above the best one's, diverged. On
the public dense grids no run lies between .19 and .53."""
SINGULAR = 1e-3
"""Runs count as repeats for the noise where N and D agree within this share."""


@dataclass(frozen=True)
class CellTrials:
    """The trials of one cell that count, as arrays of one length n; repeats stand singly.

    The `failed_*` arrays hold the diverged trials: they bound the searched range.
    """

    size: RunSize
    learning_rate: np.ndarray
    batch_tokens: np.ndarray
    loss: np.ndarray
    failed_learning_rate: np.ndarray
    failed_batch_tokens: np.ndarray

    @property
    def name(self) -> str:
        return self.size.name

    def averaged(self) -> tuple[CellTrials, np.ndarray]:
        """The same with one entry a setting, its loss the mean of its runs; and their numbers."""
        setting = np.round(np.log(np.column_stack([self.learning_rate, self.batch_tokens])), 6)
        _, first, of, n = np.unique(
            setting, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        mean = np.bincount(of.ravel(), self.loss) / n
        rate, batch = self.learning_rate[first], self.batch_tokens[first]
        return replace(self, learning_rate=rate, batch_tokens=batch, loss=mean), n


@dataclass(frozen=True)
class CellTable:
    """All cells of a results table.

    `cells` has one row a cell, indexed by its name, smallest compute first: sizes (of joined runs
    their geometric mean), numbers of trials, of learning rates and batches among them, and losses.
    `best_loss` is the least of one run, `loss_mean` the mean over the runs of the best setting (of
    all runs where none tells both learning rate and batch), `loss_se` its standard error, pooled
    over cells; NaN where no run was repeated. `trials` are the rows that count for a loss, `failed`
    those that diverged, `left_out` every other row with the column `why`. All three carry `cell`,
    unique to the cell; `trials` and `cells` carry `dataset` and `group`, empty where all share one;
    `trials` carries `label`, "far" for runs whose loss is far above what their cell reaches.
    `messages` say in sentences what a reader must know of the rows.
    """

    cells: pd.DataFrame
    trials: pd.DataFrame
    failed: pd.DataFrame
    left_out: pd.DataFrame
    messages: tuple[str, ...] = ()

    @property
    def varied(self) -> dict[str, bool]:
        """Whether any cell has several values of `learning_rate`, and of `batch_tokens`."""
        return {name: bool((self.cells[n] > 1).any()) for name, n in _NUMBERS_OF.items()}

    @property
    def fixed(self) -> dict[str, tuple[float, ...]]:
        """Of what no cell varied, the values that were run, ascending; empty where none is
        known."""
        found = {}
        for name, varied in self.varied.items():
            if not varied:
                values = self.trials[name][_positive(self.trials[name])]
                found[name] = tuple(float(v) for v in np.unique(_rounded(values)))
        return found

    def searched(self) -> list[CellTrials]:
        """Cells with trials whose learning rate and batch are known, in the order of `cells`."""
        with_rate = _has_hyperparameters(self.trials)
        trials = dict(iter(self.trials[with_rate].groupby("cell", sort=False)))
        failed = dict(iter(self.failed.groupby("cell", sort=False)))
        nothing = self.failed.iloc[:0]
        return [
            _arrays(size_of(name, self.cells.loc[name]), trials[name], failed.get(name, nothing))
            for name in self.cells.index
            if name in trials
        ]


def cell_table(frame: pd.DataFrame, group: Sequence[str] = ()) -> CellTable:
    """Sort the rows of a results table (columns of `results.schema`) into cells.

    Cells are the runs of one architecture and size whose tokens agree within 2 %: see
    `joining.join_cells`. They lie within one data set (`datasets.data_sets`); architectures of one
    name in several data sets get that of their data in brackets. `group` names columns, or keys of
    `recipe`, whose values split the cells further, such as ("optimizer", "schedule"). Columns that
    a table lacks count as empty.

    Raises:
        UserError: a column is missing without which nothing can be fitted, or one of `group`.
    """
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise UserError(f"the results table lacks the column {missing[0]!r}: see raysweep import")
    rows = frame.reindex(columns=list(dict.fromkeys((*COLUMNS, *frame.columns)))).reset_index(
        drop=True
    )
    groups = group_values(frame.reset_index(drop=True), group)
    rows = rows.assign(
        **{n: pd.to_numeric(rows[n], errors="coerce").astype(float) for n in _NUMERIC if n in rows}
    )
    rows = rows.assign(
        experts=rows["experts"].fillna(1.0),
        top_k=rows["top_k"].fillna(1.0),
        status=rows["status"].astype(object).fillna(FINISHED),
        architecture=rows["architecture"].astype(object).fillna("unnamed").astype(str),
        group=groups,
        dataset=data_sets(rows),
        label="",
    )
    rows["architecture_kind"] = (
        rows["architecture_kind"]
        .astype(object)
        .where(rows["architecture_kind"].notna(), np.where(rows["experts"] > 1, "moe", "dense"))
    )
    active, is_dense = rows["params_active_non_embedding"], rows["experts"] <= 1
    for name in ("params_total_non_embedding", "params_dense"):
        rows[name] = rows[name].where(rows[name].notna() | ~is_dense, active)
    rows["cell"] = join_cells(rows)
    said = [said_of(rows["dataset"], rows["architecture"])]
    rows["architecture"] = _told_apart(rows)
    rows["why"] = _why_left_out(rows)
    said += [_mark_far(rows)]
    usable = rows["why"] == ""
    said += [_repeated(rows[usable])]
    counted = usable | (rows["status"] == "diverged")
    said += [doubt.text for doubt in doubts(rows[counted & rows["excluded"].isna()])]
    diverged = (rows["status"] == "diverged") & _has_hyperparameters(rows)
    diverged &= _positive(rows["tokens"]) & _positive(rows["params_active_non_embedding"])
    return CellTable(
        cells=_cell_rows(rows, usable),
        trials=rows[usable].drop(columns="why"),
        failed=rows[diverged & rows["excluded"].isna()].drop(columns="why"),
        left_out=rows[~usable],
        messages=tuple(text for text in said if text),
    )


_NUMERIC = (
    *(name for name, c in COLUMNS.items() if str(c.type) in ("int64", "double")),
    "granularity",
)
_NUMBERS_OF = {"learning_rate": "n_learning_rates", "batch_tokens": "n_batches"}


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
    if "outlier" in rows:
        why = why.mask((why == "") & flags(rows["outlier"]), "excluded: outlier")
    # Studies that share a folder have a row each of a trial that both ran.
    counts = (why == "") & rows["trial_key"].notna()
    again = rows["trial_key"].where(counts).duplicated() & counts
    return why.mask(again, "the same trial in another study")


def group_values(frame: pd.DataFrame, group: Sequence[str]) -> pd.Series:
    """The group of each row: the values of these columns, or of these keys of `recipe`."""
    if not group:
        return pd.Series("", index=frame.index, dtype=object)
    said = [[_value(name, v) for v in named_column(frame, name, "group")] for name in group]
    return pd.Series(
        [", ".join(v) for v in zip(*said, strict=True)], index=frame.index, dtype=object
    )


def _value(name: str, value: object) -> str:
    """A value of a group column: text as it is, numbers after their column's name."""
    if value is None or value is pd.NA or value is pd.NaT or value != value or value == "":
        return "unknown"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return str(value) if isinstance(value, str) else f"{name} {value}"
    return f"{name} {float(value):g}"


def _told_apart(rows: pd.DataFrame) -> pd.Series:
    """Architecture names; one that several data sets have is followed by the data set's name."""
    sets = rows["dataset"].groupby(rows["architecture"], sort=False).transform("nunique")
    return rows["architecture"].where(sets < 2, rows["architecture"] + " (" + rows["dataset"] + ")")


def _repeated(rows: pd.DataFrame) -> str:
    """A sentence where runs made more than one pass over their corpus; else empty."""
    epochs = rows["epochs"].groupby(rows["cell"]).max()
    several = epochs[epochs > 1 + SINGULAR]
    if not len(several):
        return ""
    return (
        f"{len(several)} of {rows['cell'].nunique()} cells repeat their corpus, up to "
        f"{several.max():.3g} passes: laws fitted on repeated text do not hold for fresh text"
    )


def _mark_far(rows: pd.DataFrame) -> str:
    """Mark in place the runs whose loss is far above what their cell reaches; say how many.

    What the cell reaches is the best of its runs, or of any cell of its architecture, group and
    data that is no larger in N and D. Of imported runs, whose status is what somebody else calls
    finished, those that are further off, on the side of large learning rates, become diverged: a
    loss there is how a broken run ended, and tells no more of the surface than that it broke. The
    others stay, with the label `far`: they show how steep the walls of the valley are.
    """
    usable = rows["why"] == ""
    if not usable.any():
        return ""
    counted = rows[usable]
    best = counted.loc[counted.groupby("cell", sort=False)["loss"].idxmin()].set_index("cell")
    level, rate, batch = (pd.Series(np.nan, index=best.index) for _ in range(3))
    for _, part in best.groupby(["dataset", "group", "architecture"], sort=False):
        size = part["params_active_non_embedding"].to_numpy(float)
        tokens, loss = part["tokens"].to_numpy(float), part["loss"].to_numpy(float)
        for k, name in enumerate(part.index):
            smaller = np.flatnonzero((size <= size[k]) & (tokens <= tokens[k]))
            least = smaller[loss[smaller].argmin()]
            level[name] = loss[least]
            rate[name] = part["learning_rate"].iloc[least]
            batch[name] = part["batch_tokens"].iloc[least]
    cell = counted["cell"]
    above = _log(counted["loss"]) - _log(cell.map(level))
    faster = counted["learning_rate"] / cell.map(rate)
    larger = counted["batch_tokens"] / cell.map(batch)
    hot = (faster >= 1) | (faster**2 >= larger)  # sqrt scaling of the rate with the batch
    hot |= counted["learning_rate"].isna()
    broken = (above > DIVERGED) & hot & (counted["source"] != "raysweep")
    far = (above > FAR) & ~broken
    rows.loc[counted.index[far], "label"] = "far"
    at = counted.index[broken]
    rows.loc[at, "status"] = "diverged"
    rows.loc[at, "why"] = "diverged: far above its cell's best"
    if not len(at):
        return ""
    return (
        f"{len(at)} of {len(counted)} runs that their source calls finished count as diverged: at "
        f"a high learning rate, and more than {DIVERGED:g} in ln loss above the best of their cell "
        "or of a smaller one"
    )


def _cell_rows(rows: pd.DataFrame, usable: pd.Series) -> pd.DataFrame:
    # Of rows that are excluded the sizes may be what is wrong: they make no cell of their own.
    told = usable | rows["excluded"].isna()
    told = told.groupby(rows["cell"]).transform("any")
    sized = rows[_positive(rows["tokens"]) & _positive(rows["params_active_non_embedding"]) & told]
    sized = sized.assign(granularity=sized.get("granularity", np.nan))
    grouped = sized.groupby("cell", sort=False)
    text = ("study", "architecture", "architecture_kind", "scale", "dataset", "group")
    cells = grouped[[*text, "tokens", *_SIZES]].first()
    for name in (*COUNTS, "tokens", "flops_per_token"):
        cells[name] = _mean_size(sized, usable, name, cells[name])
    exact = cells["flops_per_token"] * cells["tokens"]
    rough = 6 * cells["params_active_non_embedding"] * cells["tokens"]
    total = cells["params_total_non_embedding"].fillna(cells["params_active_non_embedding"])
    wide = cells["d_ff"] / cells["expert_ff"].where(cells["expert_ff"] > 0)
    wide = wide.where(cells["architecture_kind"] == "moe", 1.0)
    counted = sized[usable[sized.index]]
    searched = counted[_has_hyperparameters(counted)]
    return cells.assign(
        granularity=cells["granularity"].astype(float).fillna(wide),
        flops=exact.where(_positive(exact), rough),
        flops_exact=_positive(exact),
        active_ratio=cells["params_active_non_embedding"] / total,
        n_trials=grouped.size(),
        n_finished=_count(sized, usable, cells.index),
        n_searched=_count(sized, usable & _has_hyperparameters(rows), cells.index),
        n_diverged=_count(sized, rows["status"] == "diverged", cells.index),
        n_far=_count(sized, rows["label"] == "far", cells.index),
        **{
            n: _rounded(searched[name])
            .groupby(searched["cell"])
            .nunique()
            .reindex(cells.index)
            .fillna(0)
            .astype(int)
            for name, n in _NUMBERS_OF.items()
        },
        best_loss=counted["loss"].groupby(counted["cell"]).min().reindex(cells.index),
        **_mean_losses(counted, cells.index),
    ).sort_values(["flops", "tokens"], kind="stable")


def _mean_size(sized: pd.DataFrame, usable: pd.Series, name: str, first: pd.Series) -> pd.Series:
    """The geometric mean over each cell's runs that count; exactly the size where all agree."""
    column = sized[name][usable[sized.index] & _positive(sized[name])]
    cell = column.groupby(sized["cell"])
    low, high = cell.min().reindex(first.index), cell.max().reindex(first.index)
    mean = _log(column).groupby(sized["cell"]).mean().reindex(first.index).map(np.exp)
    return first.where(low.isna(), mean.where(high > low, low))


def _mean_losses(counted: pd.DataFrame, index: pd.Index) -> dict[str, pd.Series]:
    """`loss_mean` and `loss_se` by cell: the best setting's mean, and its standard error.

    Repeats are runs of one cell at one learning rate, batch and recipe. The noise is one relative
    sd for all cells, pooled over repeats whose N and D agree to a thousandth, so that neither a
    drift of D within a cell nor another hyperparameter passes for it.
    """
    known = _has_hyperparameters(counted)
    any_known = known.groupby(counted["cell"]).transform("any")
    runs = counted[known | ~any_known]
    log_loss = _log(runs["loss"])
    setting = [
        runs["cell"],
        _rounded(runs["learning_rate"]),
        _rounded(runs["batch_tokens"]),
        runs["recipe"].astype(object).fillna(""),
    ]
    sizes = [(_log(runs[n]) / SINGULAR).round() for n in ("params_active_non_embedding", "tokens")]
    alike = log_loss.groupby([*setting, *sizes], dropna=False)
    freedom = len(runs) - alike.ngroups
    spread = ((log_loss - alike.transform("mean")) ** 2).sum()
    sd = float(np.sqrt(spread / freedom)) if freedom else np.nan
    of = runs["loss"].groupby(setting, dropna=False)
    mean, n = of.transform("mean"), of.transform("size")
    best = mean.groupby(runs["cell"]).idxmin()
    of_cell = pd.Series(mean[best].to_numpy(), index=best.index)
    se = of_cell * sd / np.sqrt(pd.Series(n[best].to_numpy(), index=best.index))
    return {"loss_mean": of_cell.reindex(index), "loss_se": se.reindex(index)}


def _rounded(column: pd.Series) -> pd.Series:
    """Positive numbers to six digits, NaN kept: equal settings that were printed differently."""
    return _log(column.where(_positive(column))).round(6).map(np.exp)


def _log(column: pd.Series) -> pd.Series:
    return pd.Series(np.log(column.to_numpy(float)), index=column.index)


def _count(sized: pd.DataFrame, mask: pd.Series, index: pd.Index) -> pd.Series:
    return mask[sized.index].groupby(sized["cell"]).sum().reindex(index).astype(int)


def _arrays(size: RunSize, rows: pd.DataFrame, failed: pd.DataFrame) -> CellTrials:
    return CellTrials(
        size=size,
        learning_rate=rows["learning_rate"].to_numpy(float),
        batch_tokens=rows["batch_tokens"].to_numpy(float),
        loss=rows["loss"].to_numpy(float),
        failed_learning_rate=failed["learning_rate"].to_numpy(float),
        failed_batch_tokens=failed["batch_tokens"].to_numpy(float),
    )
