"""Rows of the results table made of somebody else's: names, keys, and which of them count."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from raysweep.errors import UserError
from raysweep.results.mapping import NUMERIC
from raysweep.results.schema import COLUMNS, FINISHED, SCHEMA_VERSION, STATUSES
from raysweep.results.units import doubts
from raysweep.text import short

WHOLE = 0.98
"""A run that ends before this share of its steps or tokens was cut short: its learning rate had not
come down yet."""

AS_PLANNED = ("steplaw", "chinchilla", "isoflop")
"""Formats of published sweeps, whose rows are finished runs."""

_WHOLE = tuple(n for n, c in COLUMNS.items() if str(c.type) == "int64")
_TEXT = tuple(n for n, c in COLUMNS.items() if str(c.type) == "string")


def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A table (CSV, Parquet, or JSON lines) with at least one row, or a UserError that says what is
    wrong with the file."""
    file = Path(path)
    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
        elif file.suffix in JSON_LINES:
            table = _json_lines(file)
        else:
            table = pd.read_csv(file)
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


JSON_LINES = (".jsonl", ".ndjson")


def first_line(path: str | os.PathLike[str]) -> int:
    """The line of a table's first row in its file: CSV has a header."""
    return 1 if Path(path).suffix in (".parquet", *JSON_LINES) else 2


def _json_lines(file: Path) -> pd.DataFrame:
    """One object a line; nested ones by their path, `optimizer.lr`."""
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            each = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(each, dict):
            raise ValueError(f"line {number} is no object: {line[:40]}")
        found.append(each)
    return pd.json_normalize(found)


def finish(
    table: pd.DataFrame,
    rows: Mapping[str, object],
    source: str,
    study: str,
    hyperparameters: bool = False,
) -> pd.DataFrame:
    """Rows of the schema: names derived, keys given, unusable rows excluded with a reason. Runs of
    infinite loss diverged."""
    frame = pd.DataFrame(dict(rows), index=table.index).reindex(columns=list(COLUMNS))
    for name in _TEXT:
        said = zip(frame[name], frame[name].notna(), strict=True)
        texts = [_text(value) if known else None for value, known in said]
        frame[name] = pd.Series(texts, frame.index, dtype=object)
    for name in NUMERIC:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    frame["experts"] = frame["experts"].fillna(1.0)
    frame["top_k"] = frame["top_k"].fillna(1.0)
    kind = pd.Series(np.where(frame["experts"] > 1, "moe", "dense"), index=frame.index)
    frame["architecture_kind"] = frame["architecture_kind"].fillna(kind)
    names = routing(frame["experts"], frame["top_k"])
    frame["architecture"] = frame["architecture"].fillna(names)
    frame["status"] = frame["status"].fillna(FINISHED)
    infinite = frame["loss"] == np.inf
    broken = infinite & (frame["status"] == FINISHED)
    frame["status"] = frame["status"].mask(broken, "diverged")
    frame["reason"] = frame["reason"].mask(broken & frame["reason"].isna(), "its loss is infinite")
    frame["loss"] = frame["loss"].mask(infinite)
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
        fits = frame[name].where(frame[name].abs() < 2.0**63)
        frame[name] = fits.round().astype("Int64")
    return frame


def _text(value: object) -> str:
    """What a column of text holds of a value: whole numbers, floats where some are missing, plain,
    and structures as JSON."""
    if isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True, default=str)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def routing(experts: pd.Series, top_k: pd.Series) -> pd.Series:
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
    # In published sweeps these are computed from planned steps.
    counted = finished & ~frame["source"].isin([f"import:{name}" for name in AS_PLANNED])
    short = counted & (frame["tokens_seen"] < WHOLE * frame["tokens"])
    leave_out(short, f"cut short: tokens_seen is below {WHOLE:.0%} of tokens")
    told = frame["steps"] * frame["batch_tokens"] / frame["tokens"]
    if (told >= WHOLE).sum() > told.notna().sum() / 2:  # else the three are in other units
        short = counted & frame["tokens_seen"].isna() & frame["step"].isna() & (told < WHOLE)
        leave_out(short, f"cut short: steps x batch is below {WHOLE:.0%} of tokens")
        leave_out(counted & (told > 1.5), "tokens is in another unit than elsewhere")
    return excluded.where(excluded.notna(), None)
