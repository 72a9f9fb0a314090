"""import_results(...): other people's runs, from files and trackers, into a results folder."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.mapping import (
    OF_ONE_PASS,
    guess,
    last_part,
    map_columns,
    near,
    numbers,
    outliers,
    parse_mapping,
    plain,
    reasons,
    recipes,
)
from raysweep.results.published import PUBLISHED, USED
from raysweep.results.rows import finish, first_line, read_table
from raysweep.results.schema import CURVE_SCHEMA, FINISHED
from raysweep.results.shapes import N, count_shapes
from raysweep.results.store import Results
from raysweep.results.trackers import RUN, TRACKERS
from raysweep.results.trend import off_trend
from raysweep.results.units import BUDGET_OFF

TABLES = ("csv", "jsonl", "parquet")
"""Files with one row a run; their names tell them apart, whatever the format is called."""
FORMATS = (*PUBLISHED, *TABLES, *TRACKERS)
NEEDED = ("loss", "tokens", "params_active_non_embedding")


@dataclass(frozen=True)
class Imported:
    """Rows of the schema, and what became of a table's columns.

    `used` and `ignored` are its columns; `guessed` says of ours that nobody told which of its they
    were taken from; `notes` are sentences on what a reader must know. `curves` are loss curves with
    `CURVE_SCHEMA`'s columns, where the source has them.
    """

    rows: pd.DataFrame
    used: tuple[str, ...]
    ignored: tuple[str, ...]
    guessed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    curves: pd.DataFrame = field(default_factory=lambda: CURVE_SCHEMA.empty_table().to_pandas())


def import_results(
    source: str | os.PathLike[str] | pd.DataFrame,
    results: str | os.PathLike[str] | Results,
    format: str = "csv",
    *,
    columns: Mapping[str, str] | None = None,
    study: str | None = None,
    data: str | None = None,
) -> Results:
    """Bring runs that exist already into a results folder, which is made where there is none.

    Args:
        source: a DataFrame or table (CSV, JSON lines, Parquet) with one row a run; a published
            sweep of another `format`; or what a tracker is told by: ENTITY/PROJECT of W&B, a
            tracking URI of MLflow, an Optuna storage, a results folder of Ray Tune or LossCast.
        results: the folder or URI.
        format: csv (any table), steplaw, chinchilla, isoflop, wandb, mlflow, optuna, ray, losscast.
        columns: our columns to the source's, before what their names tell:
            {"tokens": "D*1e9", "loss": "val_loss"}.
        study: name of the rows' study; by default the format's, or of a table the file's, or of a
            tracker that of its project, experiment, study or folder.
        data: name of the data; studies of one name are fitted together.

    Raises:
        UserError: the source will not do, or its numbers cannot be in the units of their columns.
    """
    mapping = ",".join(f"{ours}={theirs}" for ours, theirs in (columns or {}).items())
    found = read_source(format, source, mapping or None, study=study, data=data)
    store = results if isinstance(results, Results) else Results.open(results, create=True)
    store.write_many(found.rows, found.curves)
    return store


def import_file(
    format: str,
    path: str | os.PathLike[str],
    mapping: str | None = None,
    *,
    study: str | None = None,
    data: str | None = None,
) -> pd.DataFrame:
    """The rows that `read_source` reads."""
    return read_source(format, path, mapping, study=study, data=data).rows


def read_source(
    format: str,
    source: str | os.PathLike[str] | pd.DataFrame,
    mapping: str | None = None,
    *,
    study: str | None = None,
    data: str | None = None,
    curves: bool = True,
) -> Imported:
    """Read a table, a published sweep or a tracker; `mapping` is the text of `--map`.

    `study` and `data` are those of `import_results`; `curves` asks a tracker for its curves.

    Raises:
        UserError: the source will not do, or its numbers cannot be in the units of their columns.
    """
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"unknown import format {format!r}{near(format, FORMATS)}; known: {known}")
    if format in PUBLISHED:
        if mapping:
            raise UserError(f"--map goes with tables and trackers: {format}'s columns are known")
        if isinstance(source, pd.DataFrame):
            raise UserError(f"{format} is read from a file: a DataFrame is of format csv")
        found = _published(format, source, study)
    else:
        told = parse_mapping([mapping] if mapping else [])
        if isinstance(source, pd.DataFrame) or format in TABLES:
            name = "table" if isinstance(source, pd.DataFrame) else Path(source).stem
            table, where, line = _table(source)
            found = read_rows(table, told, where, study or name, first_line=line)
        else:
            found = _tracked(format, os.fspath(source), told, study, curves)
    if study is not None:
        found.rows["study"] = study
    if data is not None:
        known = found.rows["data_hash"]
        found.rows["data_hash"] = known.where(known.notna(), data)
    return found


def read_runs(
    source: str | os.PathLike[str] | pd.DataFrame,
    mapping: str | None = None,
    *,
    needed: Sequence[str] = NEEDED,
) -> pd.DataFrame:
    """Runs to hold against a fit: of a table (see `read_rows`), a DataFrame, or a results folder.

    Raises:
        UserError: the source will not do.
    """
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        return Results.open(source).to_pandas()
    if isinstance(source, pd.DataFrame) and "trial_key" in source and mapping is None:
        return source  # rows of results already
    table, where, line = _table(source)
    told = parse_mapping([mapping] if mapping else [])
    return read_rows(table, told, where, "runs", first_line=line, needed=needed).rows


def read_rows(
    table: pd.DataFrame,
    mapping: Mapping[str, str],
    where: str,
    study: str,
    source: str = "csv",
    first_line: int = 1,
    needed: Sequence[str] = NEEDED,
) -> Imported:
    """Any table with one row a run. `mapping`: our column -> the table's.

    A value that starts with "=" is a constant: {"tokens": "D", "status": "=finished"}; one that
    ends in "*" and a number is a column times it: {"tokens": "D*1e9"}. Columns of the table that
    bear our names, those of our recipes' keys (optimizer, schedule, weight_decay, ...) or common
    ones (`mapping.COMMON_NAMES`) need no mapping; "recipe.NAME" keeps any other of the recipe's.
    Each of `needed` must come from one of these, or N from the shape and D from steps and batch;
    batches in tokens and sequences complete each other through `sequence_length`, and those of one
    pass are multiplied by the passes that a step accumulates. Counts that are told go before those
    of the shape.

    Rows whose numbers cannot be in the units of their columns are excluded, and a table of such
    rows is refused; so are rows far below the trend of the others. Runs of infinite loss diverged.
    Without `status` rows count as finished; without `experts` as dense; without `architecture` each
    routing is one, such as moe-e8k2. Rows flagged in a column `outlier` stay, excluded, with the
    `reason`, if any.

    UserError names a column of ours or of the table that does not exist, and what is near it.
    """
    known = map_columns(table, mapping, where, first_line)
    rows, notes = dict(known.rows), list(known.notes)
    if "outlier" in table:
        rows["excluded"] = outliers(table)
    elif "excluded" in rows:
        rows["excluded"] = reasons(rows["excluded"])
    if known.recipe:
        said = recipes(pd.DataFrame(known.recipe), rows.get("recipe"))
        rows["recipe"] = pd.Series(said, index=table.index, dtype=object)
    notes += _accumulate(rows, known.guessed, table)
    notes += _complete(rows)
    notes += _of_experts(rows, known.guessed)
    counted, said = count_shapes(rows, known.recipe)
    rows |= counted
    _imply(rows, known.rows)
    notes += said
    for name in needed:
        if name not in rows:
            raise UserError(
                f"{where} has no column {name!r}: map one with --map {name}=NAME; it has "
                f"{', '.join(map(str, table.columns))}"
            )
    searched = "learning_rate" in rows and "batch_tokens" in rows
    made = finish(table, rows, source, study, hyperparameters=searched)
    notes += _suspects(made, table, first_line)
    used = {*known.sources.values(), *({"outlier", "reason"} if "outlier" in table else ())}
    return Imported(made, *_sorted_out(table, used), guessed=known.guessed, notes=tuple(notes))


def _table(source: str | os.PathLike[str] | pd.DataFrame) -> tuple[pd.DataFrame, str, int]:
    """A table, what errors call it, and the line of its first row."""
    if isinstance(source, pd.DataFrame):
        table = source.reset_index(drop=True).rename(columns=lambda c: str(c).strip())
        return table, "the table", 1
    return read_table(source), str(source), first_line(source)


def _published(format: str, path: str | os.PathLike[str], study: str | None) -> Imported:
    # No two IsoFLOP files need have anything in common.
    name = study or (Path(path).stem if format == "isoflop" else format)
    rows = PUBLISHED[format](path, name)
    return Imported(rows, *_sorted_out(read_table(path), USED[format]))


def _sorted_out(
    table: pd.DataFrame, used: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a table's columns that are used, and of the others."""
    names = [str(c) for c in table.columns]
    return tuple(n for n in names if n in used), tuple(n for n in names if n not in used)


def _tracked(
    format: str, place: str, told: Mapping[str, str], study: str | None, curves: bool
) -> Imported:
    tracked = TRACKERS[format](place, curves)
    found = read_rows(tracked.table, told, place, study or format, source=format)
    notes = list(found.notes)
    if tracked.running:
        notes.append(f"{_many(tracked.running, 'run')} not over, left out: import again later")
    made = _curves(
        tracked.curves, found.rows, dict(zip(tracked.table[RUN], found.rows.index, strict=True))
    )
    ignored = tuple(n for n in found.ignored if n != RUN)
    return replace(found, notes=tuple(notes), ignored=ignored, curves=made)


def _curves(points: pd.DataFrame, rows: pd.DataFrame, at: Mapping[str, int]) -> pd.DataFrame:
    """A tracker's points with the columns of `CURVE_SCHEMA`; tokens follow from the steps."""
    empty = CURVE_SCHEMA.empty_table().to_pandas()
    if not len(points):
        return empty
    row = rows.loc[points[RUN].map(at)].reset_index(drop=True)
    points = points.reset_index(drop=True)
    each = row["tokens"] / row["steps"].astype(float)
    each = each.where(np.isfinite(each), row["batch_tokens"])
    guessed = guess(points, set(), {RUN, "step"})
    loss = [guessed[n] for n in ("train_loss", "loss") if n in guessed]
    if not loss:
        return empty
    made: dict[str, Any] = {"trial_key": row["trial_key"], "step": numbers(points["step"])}
    made["tokens"] = made["step"] * each
    made["train_loss"] = points[loss].apply(numbers).bfill(axis=1).iloc[:, 0]
    rate = guessed.get("learning_rate")
    made["learning_rate"] = numbers(points[rate]) if rate else np.nan
    norm = next((n for n in points if n in ("grad_norm", "gradient_norm")), None)
    made["grad_norm"] = numbers(points[norm]) if norm else np.nan
    found = pd.DataFrame(made)
    found = found[np.isfinite(found["train_loss"]) & found["step"].notna()]
    # A tracker may have a row a metric: the last of each step is as good as any.
    found = found.drop_duplicates(["trial_key", "step"], keep="last")
    return found.assign(step=found["step"].round().astype("int64")).reset_index(drop=True)


def _accumulate(
    rows: dict[str, pd.Series], guessed: Mapping[str, str], table: pd.DataFrame
) -> list[str]:
    """Multiply, in place, a batch of one pass by the passes that a step accumulates, and say so.

    It is one where its name was guessed and does not say global, but where the numbers say that it
    is: it holds as many micro-batches as a step has, or is nearer to what tokens a batch, or tokens
    and steps, tell.
    """
    name = next((n for n in ("batch_sequences", "batch_tokens") if n in guessed), "")
    theirs, passes = guessed.get(name, ""), rows.get("accumulation")
    if last_part(theirs) not in OF_ONE_PASS or passes is None:
        return []
    several = (passes > 1) & np.isfinite(passes)
    if not several.any():
        return []
    passes, batch = passes[several], rows[name][several]
    for column in table:
        if re.search("micro.*batch|batch.*micro|per_(device|gpu).*batch", plain(str(column))):
            micro = numbers(table[column])[several]
            if (batch % (micro * passes) == 0).all():
                return []
    told = pd.DataFrame(rows)[several].reindex(
        columns=["tokens", "steps", "batch_tokens", "sequence_length"]
    )
    implied = told["tokens"] / told["steps"]
    if name == "batch_sequences":
        implied = told["batch_tokens"].fillna(implied) / told["sequence_length"]
    implied, batch = implied.where(implied > 0), batch.where(batch > 0)
    whole = np.abs(np.log(implied / batch)) < np.abs(np.log(implied / (batch * passes)))
    if whole.sum() > implied.notna().sum() / 2:
        return []
    rows[name] = rows[name].where(~several, rows[name] * rows["accumulation"])
    of = "tokens" if name == "batch_tokens" else "sequences"
    return [
        f"the batch is {theirs} x {guessed.get('accumulation', 'accumulation')} "
        f"({batch.iloc[0]:g} x {passes.iloc[0]:g} {of}, say): where {theirs} is the global batch, "
        f"--map {name}={theirs}"
    ]


def _complete(rows: dict[str, pd.Series]) -> list[str]:
    """Fill in place what follows from other columns; say of the horizon that it does, and of
    batches that nothing follows."""
    length, batch = rows.get("sequence_length"), rows.get("batch_tokens")
    sequences = rows.get("batch_sequences")
    if length is not None and sequences is not None:
        made = sequences * length
        rows["batch_tokens"] = made if batch is None else batch.where(batch.notna(), made)
    if length is not None and batch is not None and sequences is None:
        rows["batch_sequences"] = (batch / length).round()
    said = []
    if sequences is not None and length is None and batch is None:
        said.append(
            "batches are in sequences and their length is not told: without it no run tells its "
            "batch (--map sequence_length==2048, say)"
        )
    if "tokens" in rows or "steps" not in rows or "batch_tokens" not in rows:
        return said
    rows["tokens"] = rows["steps"] * rows["batch_tokens"]
    return ["tokens are steps x batch"]


def _of_experts(rows: Mapping[str, pd.Series], guessed: Mapping[str, str]) -> list[str]:
    """Sentences on what rows with experts leave open: top-k, and whether N is of active ones; that
    is told by its name, by a larger total, or by the shape."""
    known = pd.DataFrame(rows).reindex(
        columns=["experts", "top_k", N, "params_total", "params_total_non_embedding"]
    )
    known = known[known["experts"] > 1]
    said = []
    untold = int(known["top_k"].isna().sum())
    if untold:
        said.append(
            f"top_k is not told in {_many(untold, 'row')} with experts: one expert a token is "
            "assumed (--map top_k==2, say)"
        )
    theirs = guessed.get(N)
    totals = known[["params_total", "params_total_non_embedding"]].max(axis=1)
    unsure = int((known[N].notna() & ~(totals > known[N])).sum())
    shape = {"d_model", "layers"} <= rows.keys()
    checked = shape and bool({"d_ff", "expert_ff"} & rows.keys())
    if unsure and theirs and "active" not in plain(theirs) and not checked:
        mend = f"--map params_total={theirs}"
        mend += " and N is counted from the shape" if shape else f",{N}=COLUMN of active ones"
        said.append(
            f"{theirs} is read as active parameters in {_many(unsure, 'row')} with experts: where "
            f"it counts all experts, {mend}"
        )
    return said


def _imply(rows: dict[str, pd.Series], told: Mapping[str, pd.Series]) -> None:
    """Fill in place what counts that are told imply, before what a shape counts: where there are
    experts, all parameters but embeddings, and where FLOPs are near 6 N D, those of a token."""
    known = pd.DataFrame(rows).reindex(
        columns=["experts", N, "params_active", "flops", "tokens", "tokens_seen"]
    )
    missing = pd.Series(np.nan, index=known.index)
    embeddings = (known["params_active"] - known[N]).clip(lower=0).fillna(0)
    total = told.get("params_total", missing) - embeddings
    each = known["flops"] / known["tokens_seen"].fillna(known["tokens"])
    near = (each / (6 * known[N])).between(1 / BUDGET_OFF, BUDGET_OFF)
    implied = {
        "params_total_non_embedding": total.where((known["experts"] > 1) & (total > known[N])),
        "flops_per_token": each.where(near),
    }
    for name, found in implied.items():
        counted = rows.get(name, missing)
        rows[name] = told.get(name, missing).fillna(found).fillna(counted)


def _suspects(rows: pd.DataFrame, table: pd.DataFrame, first_line: int) -> list[str]:
    """Keep out, in place, rows far below the trend of their kind, but for those whose learning rate
    may be the reason; name both, and those above."""
    counted = rows[(rows["status"] == FINISHED) & rows["excluded"].isna()]
    found = off_trend(counted)
    off, below = found["off"], found["off"] < 0
    out = below & ~found["alone"]
    rows.loc[out.index[out], "excluded"] = "suspect: its loss is far below the trend of N and D"
    said = []
    for part, where, what in (
        (off[out], "below", "kept out"),
        (
            off[below & ~out],
            "below",
            "at learning rates far from the others', still counted: exclude what is wrong",
        ),
        (off[~below], "above", "still counted: exclude what is wrong"),
    ):
        if not len(part):
            continue
        worst = part.abs().sort_values(ascending=False).index[:_NAMED]
        told = [
            f"{_called(table, i, first_line)} (loss {rows.at[i, 'loss']:.4g}, "
            f"{np.exp(off[i]):.2f} of the trend's)"
            for i in worst
        ]
        rest = f" and {len(part) - len(worst)} more" if len(part) > len(worst) else ""
        said.append(
            f"suspects: {_many(len(part), 'row')} far {where} the trend of loss against N and D, "
            f"{what}: {', '.join(told)}{rest}"
        )
    return said


_NAMED = 5


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _called(table: pd.DataFrame, row: int, first_line: int) -> str:
    if RUN in table:
        return str(table.at[row, RUN])
    return f"line {int(row) + first_line}"
