"""Other people's sweeps as rows of the results table: Step Law, Chinchilla, IsoFLOP, any CSV."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.flags import flags
from raysweep.results.schema import COLUMNS, FINISHED, SCHEMA_VERSION, STATUSES
from raysweep.results.store import Results
from raysweep.results.units import doubts
from raysweep.study.trials import Recipe
from raysweep.text import read_number, short

STEP_LAW_SEQUENCE_LENGTH = 2048

WHOLE = 0.98
"""A run that ends before this share of its steps or tokens was cut short: its learning rate had not
come down yet."""

_NUMERIC = tuple(n for n, c in COLUMNS.items() if str(c.type) in ("int64", "double"))
_WHOLE = tuple(n for n, c in COLUMNS.items() if str(c.type) == "int64")
_TEXT = tuple(n for n, c in COLUMNS.items() if str(c.type) == "string")


def read_steplaw(path: str | os.PathLike[str], study: str = "steplaw") -> pd.DataFrame:
    """Step Law's released grids (arXiv 2503.04715), dense or MoE, one row a run.

    `smooth loss`, the smoothed final training loss, becomes `loss`; `N` is non-embedding and, in
    the MoE file, total with `Na` active; batches are in sequences of 2048 tokens (or `seq_len`).
    Every number of experts and top-k is an architecture of its own. UserError where a column is
    missing.
    """
    table = _read(path)
    _need(table, ("h", "ffnh", "numh", "numl", "lr", "bs", "ti", "smooth loss", "N", "D"), path)
    moe = "nume" in table
    if moe:
        _need(table, ("nume", "topk", "Na"), path)
    get = _numbers(table)
    length = get("seq_len").fillna(STEP_LAW_SEQUENCE_LENGTH)
    experts, top_k = get("nume").fillna(1).clip(lower=1), get("topk").fillna(1).clip(lower=1)
    sparse = experts > 1
    rows = {
        "architecture": "steplaw-" + _routing(experts, top_k),
        "d_model": get("h"),
        "layers": get("numl"),
        "heads": get("numh"),
        "d_ff": get("ffnh"),
        "sequence_length": length,
        "experts": experts,
        "top_k": top_k,
        "shared_experts": (get("sed") > 0).astype(float).where(sparse, 0.0),
        "expert_ff": get("moeh").where(sparse, 0.0),
        "params_total_non_embedding": get("N"),
        "params_active_non_embedding": get("Na").where(sparse, get("N")) if moe else get("N"),
        "tokens": get("D"),
        "learning_rate": get("lr"),
        "batch_sequences": get("bs"),
        "batch_tokens": get("bs") * length,
        "steps": get("ti"),
        "tokens_seen": get("ti") * get("bs") * length,
        "loss": get("smooth loss"),
        "train_loss": get("smooth loss"),
        "recipe": json.dumps({"loss": "smoothed final training loss"}),
    }
    return _finish(table, rows, "steplaw", study, hyperparameters=True)


def read_chinchilla(path: str | os.PathLike[str], study: str = "chinchilla") -> pd.DataFrame:
    """Chinchilla's points as read off its figure 4 (arXiv 2404.10102): D = FLOPs / (6 N).

    They tell neither learning rate nor batch, so they enter laws of the loss only. How `Model
    Size` was counted is not stated: it fills every count. UserError where a column is missing.
    """
    table = _read(path)
    _need(table, ("Model Size", "Training FLOP", "loss"), path)
    get = _numbers(table)
    params, flops = get("Model Size"), get("Training FLOP")
    rows = {
        "architecture": pd.Series("chinchilla", index=table.index),
        **_every_count(params),
        "tokens": flops / (6 * params),
        "flops": flops,
        "flops_per_token": 6 * params,
        "loss": get("loss"),
    }
    return _finish(table, rows, "chinchilla", study)


def read_isoflop(path: str | os.PathLike[str], study: str = "isoflop") -> pd.DataFrame:
    """IsoFLOP runs (arXiv 2603.22339): `tokens, params, budget, loss`, and `outlier, reason` if
    there.

    Flagged outliers stay, excluded with their reason, if any. Experiments do not share data, so
    each `experiment` is an architecture and a set of data of its own. They enter laws of the loss
    only. How `params` were counted is not stated: they fill every count. UserError where a column
    is missing.
    """
    table = _read(path)
    _need(table, ("tokens", "params", "budget", "loss"), path)
    get = _numbers(table)
    params, tokens = get("params"), get("tokens")
    name = table["experiment"] if "experiment" in table else pd.Series("isoflop", index=table.index)
    rows = {
        "architecture": name.astype(object).fillna("isoflop"),
        **_every_count(params),
        "tokens": tokens,
        "flops": get("budget"),
        "flops_per_token": get("budget") / tokens,
        "loss": get("loss"),
        "excluded": _outliers(table),
        "data_hash": table.get("experiment"),
    }
    return _finish(table, rows, "isoflop", study)


def read_csv(
    path: str | os.PathLike[str], mapping: Mapping[str, str], study: str = "csv"
) -> pd.DataFrame:
    """Any table with one row a run (CSV or Parquet). `mapping`: our column -> the file's.

    A value that starts with "=" is a constant: {"tokens": "D", "status": "=finished"}; one that
    ends in "*" and a number is a column times it: {"tokens": "D*1e9"}. Columns of the file that
    bear our names, or those of our recipes' keys (optimizer, schedule, weight_decay, ...), need no
    mapping; "recipe.NAME" keeps any other of the recipe's. `loss`, `tokens` and
    `params_active_non_embedding` must come from one or the other; batches in tokens and sequences
    complete each other through `sequence_length`. Rows whose numbers cannot be in the units of
    their columns are excluded, and a file of such rows is refused. Without `status` rows count as
    finished; without `experts` as dense; without `architecture` each routing is one, such as
    moe-e8k2. Rows flagged in a column `outlier` stay, excluded, with the file's `reason`, if any.

    UserError names a column of ours or of the file that does not exist, and what is near it.
    """
    table = _read(path)
    rows, recipe = _mapped(table, mapping, path)
    if "outlier" in table:
        rows["excluded"] = _outliers(table)
    elif "excluded" in rows:
        rows["excluded"] = _reasons(rows["excluded"])
    if recipe:
        found = _recipes(pd.DataFrame(recipe), rows.get("recipe"))
        rows["recipe"] = pd.Series(found, index=table.index, dtype=object)
    for needed in ("loss", "tokens", "params_active_non_embedding"):
        if needed not in rows:
            near = _near(needed, table.columns)
            raise UserError(f"{path} has no column {needed!r}: map one with {needed}=NAME{near}")
    for name in _NUMERIC:
        if name in rows:
            rows[name] = pd.to_numeric(rows[name], errors="coerce")
    length, batch = rows.get("sequence_length"), rows.get("batch_tokens")
    sequences = rows.get("batch_sequences")
    if length is not None and sequences is not None and batch is None:
        rows["batch_tokens"] = sequences * length
    if length is not None and batch is not None and sequences is None:
        rows["batch_sequences"] = (batch / length).round()
    searched = "learning_rate" in rows and "batch_tokens" in rows
    return _finish(table, rows, "csv", study, hyperparameters=searched)


def _mapped(
    table: pd.DataFrame, mapping: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[dict[str, pd.Series], dict[str, pd.Series]]:
    """Columns of ours, and keys of the recipe, from a file's table."""
    rows: dict[str, pd.Series] = {}
    recipe: dict[str, pd.Series] = {}
    for ours, theirs in mapping.items():
        key = ours.removeprefix(_RECIPE)
        if ours not in COLUMNS and (key == ours or not key):
            raise UserError(f"--map: there is no column {ours!r} of results{_near(ours, COLUMNS)}")
        name, factor = _scaled(theirs, table)
        if theirs.startswith("="):
            found = pd.Series(theirs[1:], index=table.index, dtype=object)
        elif name not in table:
            raise UserError(f"{path} has no column {name!r}{_near(name, table.columns)}")
        elif factor is not None:
            found = pd.to_numeric(table[name], errors="coerce") * factor
        else:
            found = table[name]
        if ours in COLUMNS:
            rows[ours] = found
        else:
            recipe[key] = found
    own = [n for n in COLUMNS if n in table and n not in rows and n not in _FIXED]
    rows |= {n: table[n] for n in own}
    kept = [n for n in Recipe.model_fields if n in table and n not in recipe]
    recipe |= {n: table[n] for n in kept}
    return rows, recipe


_RECIPE = "recipe."
_FIXED = ("trial_key", "schema_version", "source")


def _scaled(theirs: str, table: pd.DataFrame) -> tuple[str, float | None]:
    """The column and factor of "NAME*1e9"; the text itself where that is a column."""
    name, star, factor = theirs.rpartition("*")
    if theirs in table or not star:
        return theirs, None
    try:
        return name.strip(), float(factor)
    except ValueError:
        return theirs, None


def _recipes(values: pd.DataFrame, given: pd.Series | None) -> list[str | None]:
    """Recipes as JSON, a row each: what the file's own say, and these values."""
    known = list(given) if given is not None else [None] * len(values)
    found = []
    for text, row in zip(known, values.astype(object).to_dict("records"), strict=True):
        try:
            own = json.loads(text) if isinstance(text, str) else {}
        except ValueError:
            own = {}
        own = own if isinstance(own, dict) else {}
        own |= {str(k): v for k, v in row.items() if not pd.isna(v)}
        found.append(json.dumps(own, sort_keys=True, default=str) if own else None)
    return found


def _outliers(table: pd.DataFrame) -> pd.Series:
    """Why flagged rows are excluded: their flag counts, whatever the reason says."""
    if "outlier" not in table:
        return pd.Series(None, index=table.index, dtype=object)
    flagged = flags(table["outlier"])
    why = pd.Series("", index=table.index, dtype=object)
    if "reason" in table:
        why = table["reason"].astype(object).where(flags(table["reason"]), "")
    text = ("outlier: " + why.astype(str)).where(why != "", "outlier")
    return text.astype(object).where(flagged, None)


def _reasons(excluded: pd.Series) -> pd.Series:
    """Texts of a column `excluded`, which may hold flags instead."""
    said = flags(excluded)
    text = excluded.astype(str).str.strip()
    bare = (
        text.str.lower().isin(("true", "yes", "y", "t"))
        | pd.to_numeric(text, errors="coerce").notna()
    )
    return text.astype(object).mask(bare, "flagged in the file").where(said, None)


def parse_mapping(texts: Sequence[str]) -> dict[str, str]:
    """`["loss=val_loss,tokens=D", "architecture==dense"]` as the mapping that `read_csv` takes."""
    mapping = {}
    for part in (p.strip() for text in texts for p in text.split(",")):
        ours, equals, theirs = part.partition("=")
        if not (ours and equals and theirs):
            raise UserError(f"--map: {part!r} is not column=name (or column==constant)")
        mapping[ours.strip()] = theirs.strip()
    return mapping


IMPORTERS: dict[str, Callable[..., pd.DataFrame]] = {
    "steplaw": read_steplaw,
    "chinchilla": read_chinchilla,
    "isoflop": read_isoflop,
}
"""By format, beside `csv`. Every row of a file becomes a row; what cannot be used is `excluded`."""


@dataclass(frozen=True)
class Imported:
    """The rows of a file, and which of its columns they were read from."""

    rows: pd.DataFrame
    used: tuple[str, ...]
    ignored: tuple[str, ...]


def import_results(
    file: str | os.PathLike[str],
    results: str | os.PathLike[str] | Results,
    format: str = "csv",
    *,
    columns: Mapping[str, str] | None = None,
    study: str | None = None,
    data: str | None = None,
) -> Results:
    """Bring the runs of a file into a results folder, which is made where there is none.

    Args:
        file: a CSV or Parquet table with one row a run, or a published sweep of another `format`.
        results: the folder or URI.
        format: csv, steplaw, chinchilla or isoflop.
        columns: for csv, our columns to the file's: {"tokens": "D*1e9", "loss": "val_loss"}.
        study: name of the rows' study; by default the format's, or of csv the file's.
        data: name of the data; studies of one name are fitted together.

    Raises:
        UserError: the file will not do, or its numbers cannot be in the units of their columns.
    """
    mapping = ",".join(f"{ours}={theirs}" for ours, theirs in (columns or {}).items())
    found = read_file(format, file, mapping or None, study=study, data=data)
    store = results if isinstance(results, Results) else Results.open(results, create=True)
    store.write_many(found.rows)
    return store


def import_file(
    format: str,
    path: str | os.PathLike[str],
    mapping: str | None = None,
    *,
    study: str | None = None,
    data: str | None = None,
) -> pd.DataFrame:
    """Read a file of a named format; see `read_file`."""
    return read_file(format, path, mapping, study=study, data=data).rows


def read_file(
    format: str,
    path: str | os.PathLike[str],
    mapping: str | None = None,
    *,
    study: str | None = None,
    data: str | None = None,
) -> Imported:
    """Read a file of a named format; `mapping` is the text of `--map`, for `csv` only.

    `study` names the rows' study; by default the format, or for `csv` and `isoflop`, where no two
    files need have anything in common, the file's name. `data` names the data of rows that do not
    tell theirs: studies that share data are fitted together. Raises UserError where the file will
    not do, or its numbers cannot be in the units of their columns.
    """
    if format not in (*IMPORTERS, "csv"):
        known = ", ".join((*IMPORTERS, "csv"))
        raise UserError(f"unknown import format {format!r}; known: {known}")
    if mapping and format != "csv":
        raise UserError(f"--map goes with csv only: the columns of {format} are known")
    name = study or (Path(path).stem if format in ("csv", "isoflop") else format)
    names = [str(c) for c in _read(path).columns]
    if format == "csv":
        known = parse_mapping([mapping] if mapping else [])
        rows = read_csv(path, known, name)
        table = pd.DataFrame(columns=names)
        sources = {_scaled(theirs, table)[0] for theirs in known.values()}
        own = {n for n in COLUMNS if n not in known and n not in _FIXED}
        used = sources | own | set(Recipe.model_fields) | {"outlier"}
    else:
        rows = IMPORTERS[format](path, name)
        used = set(_USED[format])
    if study is not None:
        rows["study"] = study
    if data is not None:
        rows["data_hash"] = rows["data_hash"].where(rows["data_hash"].notna(), data)
    return Imported(
        rows,
        used=tuple(n for n in names if n in used),
        ignored=tuple(n for n in names if n not in used),
    )


_USED = {
    "steplaw": (
        "h", "ffnh", "numh", "numl", "lr", "bs", "ti", "smooth loss", "N", "D", "seq_len",
        "nume", "topk", "sed", "moeh", "Na",
    ),
    "chinchilla": ("Model Size", "Training FLOP", "loss"),
    "isoflop": ("tokens", "params", "budget", "loss", "experiment", "outlier", "reason"),
}  # fmt: skip


# --- shared ------------------------------------------------------------------------------------


def _read(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A table with at least one row, or a UserError that says what is wrong with the file."""
    file = Path(path)
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    except FileNotFoundError:
        raise UserError(f"{file} not found: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder: name the file in it") from None
    except (OSError, ValueError, UnicodeDecodeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file} cannot be read as a table: {first}") from None
    if not len(table):
        raise UserError(f"{file} has no rows")
    return table.rename(columns=lambda c: str(c).strip())


def _need(table: pd.DataFrame, names: Sequence[str], path: str | os.PathLike[str]) -> None:
    missing = [n for n in names if n not in table]
    if missing:
        listed = ", ".join(f"{n!r}{_near(n, table.columns)}" for n in missing)
        raise UserError(f"{path} lacks the column{'s' * (len(missing) > 1)} {listed}")


def _near(name: str, known: Sequence[str] | pd.Index | Mapping[str, object]) -> str:
    found = difflib.get_close_matches(name, [str(k) for k in known], n=2, cutoff=0.5)
    return f" (near: {', '.join(found)})" if found else ""


def _numbers(table: pd.DataFrame) -> Callable[[str], pd.Series]:
    """A column as numbers, NaN where it holds none or is not there."""

    def get(name: str) -> pd.Series:
        if name not in table:
            return pd.Series(np.nan, index=table.index)
        column = table[name]
        if not pd.api.types.is_numeric_dtype(column):
            column = column.map(_number)
        return column.astype(float)

    return get


def _number(value: object) -> float:
    """As people write it; NaN for what is none."""
    try:
        return read_number(value) if isinstance(value, str | float | int) else math.nan
    except UserError:
        return math.nan


def _every_count(params: pd.Series) -> dict[str, pd.Series]:
    names = [n for n in COLUMNS if n.startswith("params_") and n != "params_dense"]
    return dict.fromkeys(names, params)


def _finish(
    table: pd.DataFrame,
    rows: Mapping[str, object],
    source: str,
    study: str,
    hyperparameters: bool = False,
) -> pd.DataFrame:
    """Rows of the schema: names derived, keys given, unusable rows excluded with a reason."""
    frame = pd.DataFrame(dict(rows), index=table.index).reindex(columns=list(COLUMNS))
    for name in _TEXT:
        frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
    for name in _NUMERIC:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    frame["experts"] = frame["experts"].fillna(1.0)
    frame["top_k"] = frame["top_k"].fillna(1.0)
    kind = pd.Series(np.where(frame["experts"] > 1, "moe", "dense"), index=frame.index)
    frame["architecture_kind"] = frame["architecture_kind"].fillna(kind)
    routing = _routing(frame["experts"], frame["top_k"])
    frame["architecture"] = frame["architecture"].fillna(routing)
    frame["status"] = frame["status"].fillna(FINISHED)
    frame["study"] = frame["study"].fillna(study)
    frame["scale"] = frame["scale"].fillna(frame["params_active_non_embedding"].map(_named))
    horizon = frame["tokens"].map(_named) + "tok"
    frame["cell"] = frame["cell"].fillna(
        frame["architecture"] + "-" + frame["scale"] + "-" + horizon
    )
    rough = 6 * frame["params_active_non_embedding"] * frame["tokens_seen"].fillna(frame["tokens"])
    frame["flops_6nd"] = frame["flops_6nd"].fillna(rough)
    frame["schema_version"] = SCHEMA_VERSION
    frame["source"] = f"import:{source}"
    for doubt in doubts(frame[frame["excluded"].isna()]):
        if doubt.impossible and doubt.most:
            raise UserError(doubt.text)
        if doubt.impossible:
            frame.loc[doubt.rows, "excluded"] = f"{doubt.column} is in another unit than elsewhere"
    frame["trial_key"], copies = _keys(table, source)
    frame["excluded"] = _excluded(frame, hyperparameters, copies)
    frame["started_at"] = pd.to_datetime(frame["started_at"], utc=True, errors="coerce")
    for name in _WHOLE:
        finite = frame[name].where(np.isfinite(frame[name]))
        frame[name] = finite.round().astype("Int64")
    return frame


def _routing(experts: pd.Series, top_k: pd.Series) -> pd.Series:
    """Names of architectures by routing: every number of experts and top-k is one of its own."""
    names = "moe-e" + experts.map("{:g}".format) + "k" + top_k.map("{:g}".format)
    return names.where(experts > 1, "dense")


def _named(value: float) -> str:
    return short(value) if np.isfinite(value) and value > 0 else "unknown"


def _keys(table: pd.DataFrame, source: str) -> tuple[list[str], pd.Series]:
    """A key a row, hashed from its content and the number of equal rows before; and that number."""
    columns = sorted(table.columns)
    values = table[columns].itertuples(index=False, name=None)
    lines = pd.Series(["\x1f".join(map(str, row)) for row in values], index=table.index)
    copies = lines.groupby(lines).cumcount()
    head = f"{source}\x1f" + "\x1f".join(columns)
    keys = [
        hashlib.sha256(f"{head}\x1e{line}\x1e{copy}".encode()).hexdigest()[:20]
        for line, copy in zip(lines, copies, strict=True)
    ]
    return keys, copies


def _excluded(frame: pd.DataFrame, hyperparameters: bool, copies: pd.Series) -> pd.Series:
    """Why a finished row is kept out of fits; None where it counts."""
    excluded = frame["excluded"].copy()

    def leave_out(bad: pd.Series, why: str) -> None:
        nonlocal excluded
        excluded = excluded.mask(bad & excluded.isna(), why)

    finished = frame["status"] == FINISHED
    leave_out(~frame["status"].isin(STATUSES), "its status is none of " + ", ".join(STATUSES))
    numbers = ["params_active_non_embedding", "tokens", "loss"]
    numbers += ["learning_rate", "batch_tokens"] if hyperparameters else []
    for name in numbers:
        value = frame[name]
        lost = name == "loss"
        where = finished if lost else pd.Series(True, index=frame.index)
        leave_out(where & value.isna(), f"{name} is missing or not a number")
        leave_out(where & ~np.isfinite(value) & value.notna(), f"{name} is not finite")
        leave_out(where & (value <= 0), f"{name} is zero or negative")
    leave_out(copies > 0, "the same as an earlier row of the file")
    short = finished & (frame["step"] < WHOLE * frame["steps"])
    leave_out(short, f"cut short: step is below {WHOLE:.0%} of steps")
    counted = frame["source"] == "import:csv"  # in others it is computed from planned steps
    short = finished & counted & (frame["tokens_seen"] < WHOLE * frame["tokens"])
    leave_out(short, f"cut short: tokens_seen is below {WHOLE:.0%} of tokens")
    return excluded.where(excluded.notna(), None)
