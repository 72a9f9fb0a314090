"""Every trial for the page's table: columns of plain values, as many rows as the page can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from raysweep.results.schema import FINISHED
from raysweep.scaling.fits import Fits
from raysweep.scaling.quantities import QUANTITIES

MAX_ROWS = 8000
"""Rows in the page. Beyond it the worst losses of each cell are left to the Parquet table."""

CURVE_NUMBERS = 30_000
"""Points of curves in the page, shared by all trials that have one."""

_NUMBERS = ("params_active_non_embedding", "tokens", "learning_rate", "batch_tokens", "loss")

COLUMNS: dict[str, tuple[str, str]] = {
    "trial_key": ("trial", "key"),
    "cell": ("cell", "text"),
    "architecture": ("architecture", "text"),
    **{name: (QUANTITIES[name].label, QUANTITIES[name].style) for name in _NUMBERS},
    "gap": ("above best", "percent"),
    "status": ("status", "text"),
    "seed": ("seed", "count"),
    "seconds_train": ("seconds", "seconds"),
    "tokens_per_second": ("tokens/s", "batch"),
    "why": ("why", "text"),
}
"""Column -> heading and kind."""


def trial_table(
    frame: pd.DataFrame, curves: pd.DataFrame, fits: Fits, most: int = MAX_ROWS
) -> dict[str, Any]:
    """{"columns": [...], "rows": n, "shown": n, "curves": [...], "cells": [...], "of": [...]} of a
    table of trials and their loss curves; text columns are coded as words and indices. `of` is each
    trial's place in `cells`, those of the fit, -1 where it does not count."""
    finished = frame["status"].astype(str) == FINISHED
    loss = pd.to_numeric(frame["loss"], errors="coerce").astype(float).where(finished)
    best = loss.where(frame["excluded"].isna()).groupby(frame["cell"]).transform("min")
    table = frame.assign(
        gap=loss / best - 1,
        why=frame["excluded"].astype(object).where(frame["excluded"].notna(), frame["reason"]),
    )
    if len(table) > most:
        table = table.sort_values("gap", na_position="first", kind="stable").iloc[:most]
    order = {str(c): i for i, c in enumerate(fits.cells.index)}
    place = table["cell"].astype(str).map(order).fillna(len(order))
    table = table.assign(_place=place).sort_values(["_place", "loss"], kind="stable")
    columns = []
    for name, (heading, kind) in COLUMNS.items():
        values = table[name]
        if not values.notna().any():
            continue
        columns.append({"name": name, "heading": heading, "kind": kind, **_coded(values, kind)})
    return {
        "columns": columns,
        "rows": len(frame),
        "shown": len(table),
        "curves": _curves(table["trial_key"], curves),
        "cells": list(order),
        "of": table["trial_key"]
        .astype(str)
        .map(_cell_of(fits, order))
        .fillna(-1)
        .astype(int)
        .tolist(),
    }


def _cell_of(fits: Fits, order: Mapping[str, int]) -> dict[str, int]:
    """The place of each trial's cell by its key."""
    rows = pd.concat([fits.table.trials, fits.table.failed])[["trial_key", "cell"]]
    return {str(k): order[str(c)] for k, c in rows.itertuples(index=False) if str(c) in order}


def _curves(keys: pd.Series, curves: pd.DataFrame) -> list[list[float] | None]:
    """Each trial's training loss at even steps in tokens, from the first logged to the last."""
    known = curves[curves["trial_key"].isin(set(keys)) & np.isfinite(curves["train_loss"])]
    groups = {str(key): part for key, part in known.groupby("trial_key") if len(part) > 1}
    points = int(np.clip(CURVE_NUMBERS // max(len(groups), 1), 6, 48))
    return [_thinned(groups[key], points) if key in groups else None for key in keys.astype(str)]


def _thinned(curve: pd.DataFrame, points: int) -> list[float]:
    tokens = curve["tokens"].to_numpy(float)
    at = np.linspace(tokens[0], tokens[-1], points)
    losses = np.interp(at, tokens, curve["train_loss"].to_numpy(float))
    return [float(f"{v:.4g}") for v in losses]


def _coded(values: pd.Series, kind: str) -> dict[str, Any]:
    if kind == "key":
        return {"values": [None if pd.isna(v) else str(v) for v in values]}
    if kind == "text":
        codes, words = pd.factorize(values.astype(object))
        return {"codes": codes.tolist(), "words": [str(w) for w in words]}
    digits = 5 if kind in ("loss", "percent") else 6
    return {"values": [_rounded(v, digits) for v in pd.to_numeric(values, errors="coerce")]}


def _rounded(value: float, digits: int) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
