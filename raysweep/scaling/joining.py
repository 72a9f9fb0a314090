"""Which rows form one cell: runs of one architecture and size whose tokens agree."""

from __future__ import annotations

import numpy as np
import pandas as pd

from raysweep.text import short

TOKENS = 0.02
"""Runs whose tokens spread no further than this share a cell."""
STEPS_TIMES_BATCH = 0.001
"""So do runs whose steps x batch spread no further than this, whatever the table rounds D to."""
ROUNDED = 0.1
"""Where steps x batch is further than this from the tokens, it says nothing of them."""
SIZE = 0.001
"""Sizes that spread no further than this are one."""
SAME_SHAPE = 0.01
"""So are sizes of one shape (or of none stated), which differ by what was counted."""

_SHAPE = ("d_model", "layers", "heads", "d_ff", "expert_ff", "shared_experts")
_READ = (
    "cell",
    "source",
    "scale",
    "params_active_non_embedding",
    "params_total_non_embedding",
    "tokens",
    "steps",
    "learning_rate",
    "batch_tokens",
)
_BLOCK = ("dataset", "group", "architecture", "experts", "top_k")


def together(values: np.ndarray, spread: float) -> np.ndarray:
    """Clusters [n] of positive numbers [n], labels from 0, none wider than `spread` (relative).

    Of all ways with the fewest clusters, the one of least total width: a chain of near neighbours
    is cut at its widest gaps, where single linkage would run on and on.
    """
    logs, inverse = np.unique(np.log(values), return_inverse=True)
    n, widest = len(logs), np.log1p(spread)
    first = np.searchsorted(logs, logs - widest * (1 + 1e-6))
    cost, begin = np.zeros(n + 1), np.zeros(n + 1, dtype=int)
    scale = 0.5 / (max(n, 1) * widest)  # all widths together weigh less than one cluster more
    for end in range(n):
        start = np.arange(first[end], end + 1)
        costs = cost[start] + 1 + scale * (logs[end] - logs[start])
        best = int(costs.argmin())
        cost[end + 1], begin[end + 1] = costs[best], start[best]
    label, at, end = np.zeros(n, dtype=int), 0, n
    while end > 0:
        label[begin[end] : end] = at
        at, end = at + 1, begin[end]
    return (at - 1 - label)[inverse.ravel()]


def join_cells(rows: pd.DataFrame) -> pd.Series:
    """The cell of each row, by name.

    Cells lie within one data set, group, architecture and routing. A name that a study gave stands,
    and means runs of exactly one size and horizon. Rows without a name, and imported ones whose
    name merely repeats their size and tokens, are joined: sizes within 1 % and tokens within 2 %.
    `rows` has the schema's columns, `dataset` and `group`; what bears one name and is not one cell
    is told apart by its data set, its group, or a number. Where no run tells its learning rate and
    batch, as in IsoFLOP sweeps, only repeats share a cell: a law of the loss reads every run at its
    own N and D, and joining would only blur them.
    """
    rows = rows[[*_BLOCK, *_SHAPE, *_READ]]
    block = rows.groupby(list(_BLOCK), sort=False, dropna=False).ngroup()
    exact = ["params_active_non_embedding", "tokens"]
    given = rows["cell"].astype(object)
    free = _free(rows, block)
    named = given.where(~free, "")
    keys = [block, named, *(rows[e] for e in exact)]
    cell = rows.groupby(keys, sort=False, dropna=False).ngroup()
    sized = rows[exact].gt(0).all(axis=1) & rows[exact].lt(np.inf).all(axis=1)
    count = int(cell.max()) + 1 if len(cell) else 0
    for key, part in rows[free & sized].groupby(block[free & sized], sort=False):
        labels = _joined(part)
        study = rows[~free & sized & (block == key)]
        for label in np.unique(labels):
            members = part.index[labels == label]
            near = _nearest(study, part.loc[members]) if len(study) else None
            cell.loc[members] = count if near is None else cell.loc[near]
            count += 1
    return _names(rows, cell, free, given)


def _free(rows: pd.DataFrame, block: pd.Series) -> pd.Series:
    """Whether joining may rename a row: it has no name, or an import derived it from its tokens."""
    name = rows["cell"].astype(object)
    source = rows["source"].astype(object).where(rows["source"].notna(), "").astype(str)
    imported = source.str.startswith("import:") & name.notna()
    derived = pd.Series(
        [
            _derived(architecture, scale, tokens)
            for architecture, scale, tokens in zip(
                rows["architecture"], rows["scale"], rows["tokens"], strict=True
            )
        ],
        index=rows.index,
        dtype=object,
    )
    tokens = rows["tokens"].groupby([block, name.fillna("")], sort=False).transform("nunique")
    size = rows["params_active_non_embedding"]
    names = name.groupby([block, size, rows["tokens"]], sort=False).transform("nunique")
    return name.isna() | (imported & ((name == derived) | ((tokens == 1) & (names == 1))))


def _joined(part: pd.DataFrame) -> np.ndarray:
    """Labels of the cells among rows of one block, by size and then by tokens."""
    searched = (part[["learning_rate", "batch_tokens"]] > 0).all(axis=1).any()
    size = _sizes(part, SAME_SHAPE if searched else SIZE)
    found = np.zeros(len(part), dtype=int)
    for label in np.unique(size):
        at = np.flatnonzero(size == label)
        horizon = together(_horizons(part.iloc[at]), TOKENS if searched else STEPS_TIMES_BATCH)
        found[at] = horizon + found.max() + 1
    return found


def _sizes(part: pd.DataFrame, spread: float) -> np.ndarray:
    """Labels of sizes, none wider than `spread` nor of several shapes or totals."""
    total = part["params_total_non_embedding"].to_numpy(float)
    known = np.isfinite(total) & (total > 0)
    apart = np.full(len(part), -1)
    if known.any():
        apart[known] = together(total[known], SAME_SHAPE)
    params = part["params_active_non_embedding"].to_numpy(float)
    same = together(params, SIZE)
    shape = part[list(_SHAPE)].astype(float).fillna(-1.0)
    of_one = shape.groupby(same).transform("max").assign(total=apart).to_numpy(float)
    kind = np.unique(of_one, axis=0, return_inverse=True)[1].ravel()
    found = np.zeros(len(part), dtype=int)
    for k in range(kind.max() + 1):
        at = np.flatnonzero(kind == k)
        found[at] = together(params[at], spread) + found.max() + 1
    return found


def _horizons(part: pd.DataFrame) -> np.ndarray:
    """The tokens [n] by which rows of one size are joined: their own, or the mean of the rows whose
    steps x batch agree."""
    tokens = part["tokens"].to_numpy(float)
    trained = part["steps"].to_numpy(float) * part["batch_tokens"].to_numpy(float)
    told = np.isfinite(trained) & (abs(trained / tokens - 1) < ROUNDED)
    if told.any():
        label = together(trained[told], STEPS_TIMES_BATCH)
        mean = np.bincount(label, np.log(tokens[told])) / np.bincount(label)
        tokens = tokens.copy()
        tokens[told] = np.exp(mean[label])
    return tokens


def _nearest(study: pd.DataFrame, members: pd.DataFrame) -> int | None:
    """A row of the study's own cell that these rows belong to, or None."""
    off = np.abs(
        np.log(study[["params_active_non_embedding", "tokens"]].to_numpy(float))
        - np.log(members[["params_active_non_embedding", "tokens"]].to_numpy(float)).mean(0)
    )
    fits = (off <= [SAME_SHAPE / 2, TOKENS / 2]).all(1)
    return (
        int(study.index[int(np.where(fits, off.sum(1), np.inf).argmin())]) if fits.any() else None
    )


def _derived(architecture: object, scale: object, tokens: float) -> str:
    return f"{architecture}-{scale}-{_number(tokens)}tok"


def _number(value: float) -> str:
    return short(value) if np.isfinite(value) and value > 0 else "unknown"


def _names(rows: pd.DataFrame, cell: pd.Series, free: pd.Series, given: pd.Series) -> pd.Series:
    names: dict[object, str] = {}
    for key, part in rows.groupby(cell, sort=False):
        own = given[part.index].dropna().unique()
        fixed = given[part.index][~free[part.index]].unique()
        if len(fixed):
            names[key] = str(fixed[0])
        elif len(own) == 1:
            names[key] = str(own[0])
        else:
            first = part.iloc[0]
            params = np.exp(np.log(part["params_active_non_embedding"]).mean())
            tokens = float(np.exp(np.log(part["tokens"]).mean()))
            scale = part["scale"].dropna().unique()
            named = scale[0] if len(scale) == 1 else _number(params)
            names[key] = _derived(first["architecture"], named, tokens)
    named = cell.map(names).astype(object)
    several = rows["dataset"].groupby(named, sort=False).transform("nunique") > 1
    said = [
        ", ".join(part for part in (data if many else "", group) if part)
        for data, many, group in zip(rows["dataset"], several, rows["group"], strict=True)
    ]
    named = pd.Series(
        [f"{n} ({s})" if s else n for n, s in zip(named, said, strict=True)],
        index=rows.index,
        dtype=object,
    )
    first = cell.groupby(named, sort=False).transform("first")
    order = pd.Series(pd.factorize(cell)[0], index=rows.index)
    rank = order.groupby(named, sort=False).rank("dense").astype(int)
    return named.where(cell == first, named + " #" + rank.astype(str))
