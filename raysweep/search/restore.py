"""Taking up what stands in the results folder: the study's own rows, and sweeps to learn from."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pandas as pd

from raysweep.errors import UserError
from raysweep.results.schema import FINISHED
from raysweep.search.cells import CellState
from raysweep.search.history import TrialHistory
from raysweep.study import Study
from raysweep.study.shape import RunSize

_log = logging.getLogger("raysweep")


def restore_trials(
    rows: pd.DataFrame, study: Study, data_hash: str, states: Mapping[str, CellState]
) -> float:
    """Rebuild the trials of earlier runs of this study in its cells; crashed ones are run again.

    Returns the FLOPs spent on them. Raises UserError where rows of these cells were made otherwise
    than the study says now: losses of two recipes must not be compared.
    """
    other_recipe: list[str] = []
    points: defaultdict[tuple[str, str], set[tuple[float, int, int]]] = defaultdict(set)
    spent = 0.0
    for row in rows.to_dict("records"):
        state = states.get(row["cell"])
        if state is None or row["status"] == "crashed":
            continue
        rate, sequences = row["learning_rate"], int(row["batch_sequences"])
        spec = study.trial(state.cell, data_hash, rate, sequences, int(row["seed"]))
        if spec.key != row["trial_key"]:
            other_recipe.append(row["cell"])
            continue
        log2_batch = math.log2(sequences)
        points[(state.stable_run or state).cell.name, state.cell.name].add(
            (rate, int(log2_batch), spec.seed)
        )
        state.add_row(rate, log2_batch, row["status"], row["loss"])
        spent += state.flops
    if other_recipe:
        raise UserError(
            f"the results hold {len(other_recipe)} trials of study {study.name} (first in cell "
            f"{other_recipe[0]}) made with another recipe, shape, seed or corpus: give the study "
            "another name, or name another --results"
        )
    for (stable_run, cell), of_branch in list(points.items()):
        if cell != stable_run:
            missing = (
                of_branch - points[stable_run, stable_run] - set(states[stable_run].unfinished)
            )
            states[stable_run].unfinished += sorted(missing)
    return spent


def widened(study: Study, states: Mapping[str, CellState]) -> dict[str, Any]:
    """The ranges that were widened so far, as plain values, with those of the search space."""
    found = {name: state.widened for name, state in states.items()}
    return _given(study) | {"cells": {name: each for name, each in found.items() if each}}


def restore_bounds(study: Study, kept: Mapping[str, Any], states: Mapping[str, CellState]) -> None:
    """Search the ranges again that earlier runs widened, unless the search space gives others now
    or wants none widened."""
    given = _given(study)
    if not study.space.search.extend_edges or {k: kept.get(k) for k in given} != given:
        return
    try:
        for name in states.keys() & kept["cells"].keys():
            states[name].restore_bounds(kept["cells"][name])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        _log.warning("the ranges that %s had widened are unreadable: found anew", study.name)


def _given(study: Study) -> dict[str, Any]:
    rate, batch = study.space.search.learning_rate, study.space.search.batch_sequences
    return {"learning_rate": [rate.low, rate.high], "batch_sequences": [batch.low, batch.high]}


def add_imported_trials(history: TrialHistory, rows: pd.DataFrame) -> None:
    """Add other rows, with the schema's columns: imported sweeps, say."""
    usable = rows[rows["learning_rate"].notna() & rows["batch_tokens"].notna()]
    usable = usable[usable["status"].isin([FINISHED, "diverged"]) & usable["excluded"].isna()]
    for name, cell in usable.groupby("cell", sort=True):
        first = cell.iloc[0]
        total = first["params_total_non_embedding"]
        size = RunSize(
            params_active_non_embedding=float(first["params_active_non_embedding"]),
            tokens=float(first["tokens"]),
            experts=int(first["experts"]),
            top_k=int(first["top_k"]),
            params_total_non_embedding=math.nan if pd.isna(total) else float(total),
            name=f"{first['source']}:{name}",
        )
        history.add_imported(
            size,
            cell["learning_rate"].to_numpy(float),
            cell["batch_tokens"].to_numpy(float),
            cell["loss"].to_numpy(float),
            (cell["status"] == "diverged").to_numpy(),
        )
