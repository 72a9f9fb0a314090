"""Other people's sweeps as rows of the results table: Step Law, Chinchilla, IsoFLOP, any CSV."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.schema import COLUMNS, FINISHED, SCHEMA_VERSION, STATUSES
from raysweep.text import read_number, short

STEP_LAW_SEQUENCE_LENGTH = 2048

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

    Flagged outliers stay, excluded with their reason. Experiments do not share data, so each
    `experiment` is an architecture of its own. They enter laws of the loss only. How `params`
    were counted is not stated: they fill every count. UserError where a column is missing.
    """
    table = _read(path)
    _need(table, ("tokens", "params", "budget", "loss"), path)
    get = _numbers(table)
    params, tokens = get("params"), get("tokens")
    name = table["experiment"] if "experiment" in table else pd.Series("isoflop", index=table.index)
    excluded = pd.Series(None, index=table.index, dtype=object)
    if "outlier" in table:
        flagged = table["outlier"].astype(str).str.strip().str.lower().isin(("true", "1", "yes"))
        why = table["reason"].astype(str) if "reason" in table else "no reason given"
        excluded = excluded.mask(flagged, "outlier: " + why)
    rows = {
        "architecture": name.astype(object).fillna("isoflop"),
        **_every_count(params),
        "tokens": tokens,
        "flops": get("budget"),
        "flops_per_token": get("budget") / tokens,
        "loss": get("loss"),
        "excluded": excluded,
    }
    return _finish(table, rows, "isoflop", study)


def read_csv(
    path: str | os.PathLike[str], mapping: Mapping[str, str], study: str = "csv"
) -> pd.DataFrame:
    """Any table with one row a run (CSV or Parquet). `mapping`: our column -> the file's.

    A value that starts with "=" is a constant: {"tokens": "D", "status": "=finished"}. Columns of
    the file that bear our names need no mapping. `loss`, `tokens` and
    `params_active_non_embedding` must come from one or the other; batches in tokens and sequences
    complete each other through `sequence_length`. Without `status` rows count as finished;
    without `experts` as dense; without `architecture` each routing is one, such as moe-e8k2.

    UserError names a column of ours or of the file that does not exist, and what is near it.
    """
    table = _read(path)
    rows: dict[str, object] = {}
    for ours, theirs in mapping.items():
        if ours not in COLUMNS:
            raise UserError(f"--map: there is no column {ours!r} of results{_near(ours, COLUMNS)}")
        if theirs.startswith("="):
            rows[ours] = pd.Series(theirs[1:], index=table.index, dtype=object)
        elif theirs in table:
            rows[ours] = table[theirs]
        else:
            raise UserError(f"{path} has no column {theirs!r}{_near(theirs, table.columns)}")
    fixed = ("trial_key", "schema_version", "source")
    rows |= {n: table[n] for n in COLUMNS if n in table and n not in rows and n not in fixed}
    for needed in ("loss", "tokens", "params_active_non_embedding"):
        if needed not in rows:
            near = _near(needed, table.columns)
            raise UserError(f"{path} has no column {needed!r}: map one with {needed}=NAME{near}")
    for name in _NUMERIC:
        if name in rows:
            rows[name] = pd.to_numeric(pd.Series(rows[name], index=table.index), errors="coerce")
    length = rows.get("sequence_length")
    if isinstance(length, pd.Series):
        batch, sequences = rows.get("batch_tokens"), rows.get("batch_sequences")
        if isinstance(sequences, pd.Series) and batch is None:
            rows["batch_tokens"] = sequences * length
        if isinstance(batch, pd.Series) and sequences is None:
            rows["batch_sequences"] = (batch / length).round()
    searched = "learning_rate" in rows and "batch_tokens" in rows
    return _finish(table, rows, "csv", study, hyperparameters=searched)


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


def import_file(
    format: str, path: str | os.PathLike[str], mapping: str | None = None
) -> pd.DataFrame:
    """Read a file of a named format; `mapping` is the text of `--map`, for `csv` only."""
    if format == "csv":
        return read_csv(path, parse_mapping([mapping] if mapping else []))
    if format not in IMPORTERS:
        known = ", ".join((*IMPORTERS, "csv"))
        raise UserError(f"unknown import format {format!r}; known: {known}")
    if mapping:
        raise UserError(f"--map goes with csv only: the columns of {format} are known")
    return IMPORTERS[format](path)


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
    return excluded.where(excluded.notna(), None)
