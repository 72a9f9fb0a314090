"""A forecast of cells before they are trained, and what became of it: plain JSON values, kept with
the results (`Results.save_forecast`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from raysweep.results.schema import FINISHED
from raysweep.scaling.fits import Fits
from raysweep.scaling.plain import plain_dict
from raysweep.scaling.quantities import ANSWERS, TARGETS
from raysweep.study.study import Study


def forecast(fits: Fits, study: Study, scale: str) -> dict[str, Any]:
    """What the fits say of each cell of a scale.

    Under `cells`, by name: `architecture`, `verdict`, the batch to run in `batch_sequences` (a
    power of two), and of each of `ANSWERS` `value`, `low` and `high`; null where not
    determined."""
    cells = {}
    for cell in (c for c in study.cells if c.scale == scale):
        n = cell.counts.params_active_non_embedding
        told = fits.recommend(cell.architecture, float(n), float(cell.tokens))
        row: dict[str, Any] = {"architecture": cell.architecture, "verdict": told.verdict}
        for name in ANSWERS:
            low, high = getattr(told, f"{name}_interval")
            row[name] = {"value": getattr(told, name), "low": low, "high": high}
        exact = told.batch_tokens_exact / cell.shape.sequence_length
        row["batch_sequences"] = max(1, 2 ** round(math.log2(exact)))
        cells[cell.name] = row
    return plain_dict({"scale": scale, "rows": fits.n_rows, "cells": cells})


def outcome(
    told: Mapping[str, Any], fits: Fits, trials: pd.DataFrame, check: pd.DataFrame
) -> dict[str, Any]:
    """What became of a forecast, by cell: how many `trials` finished and, where any did, of each of
    `ANSWERS` what all rows together tell now (`value`, `low`, `high`), the `best` trial's, and
    whether the value lies `inside` what was forecast.

    `check` are the `checked` runs of the forecast's settings. `regret` is their mean loss over the
    best trial's, less 1: luck helps the best of many, so it errs to the high side. `regret_sd` is
    its standard error by the fitted noise of a run. `loss_error` is the forecast loss over the one
    found, less 1."""
    found = {}
    for name, row in told["cells"].items():
        own = trials[(trials["cell"] == name) & (trials["status"] == FINISHED)]
        again = check[(check["cell"] == name) & (check["status"] == FINISHED)]["loss"]
        found[name] = {"trials": len(own)}
        if not len(own) or name not in fits.cells.index:
            continue
        now = _found(fits, name)
        best = own.loc[own["loss"].idxmin(), list(ANSWERS)].astype(float).to_dict()
        surface = fits.evidence_of(row["architecture"]).surface
        noise = surface.mode.widths.noise if surface is not None else math.nan
        found[name] |= {
            **now,
            "best": best,
            "inside": {q: _inside(now[q]["value"], row[q]) for q in ANSWERS},
            "loss_error": _number(row["loss"]["value"]) / now["loss"]["value"] - 1,
            "checked": len(again),
            "regret": float(again.mean()) / best["loss"] - 1,
            "regret_sd": noise * math.sqrt(1 + 1 / len(again)) if len(again) else math.nan,
        }
    return plain_dict({"scale": told["scale"], "cells": found})


def _found(fits: Fits, name: str) -> dict[str, dict[str, float]]:
    """Optimum and loss of a trained cell, with 95 % intervals."""
    cell = fits.cells.to_dict("index")[name]
    evidence = fits.evidence_of(str(cell["architecture"]))
    loss, reach = float(cell["loss"]), 1.96 * float(cell["loss_se"])
    found = {"loss": {"value": loss, "low": loss - reach, "high": loss + reach}}
    optimum = evidence.optimum(evidence.sizes[name])
    for axis, quantity in enumerate(TARGETS):
        value = float(cell[quantity])
        low, high = (math.nan, math.nan)
        if optimum is not None:
            e = optimum.estimates()[axis]
            low, high = e.low, e.high
        found[quantity] = {"value": value, "low": low, "high": high}
    return found


def _inside(value: float, interval: Mapping[str, Any]) -> bool:
    return _number(interval["low"]) <= value <= _number(interval["high"])


def _number(value: float | None) -> float:
    """JSON has no NaN: what was not determined stands as null."""
    return math.nan if value is None else float(value)
