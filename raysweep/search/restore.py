"""Taking up what stands in the results folder: the study's own rows, and sweeps to learn from."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from raysweep.errors import UserError
from raysweep.results.columns import record_of
from raysweep.results.schema import FINISHED, is_loss
from raysweep.scaling.runs import size_of
from raysweep.search.cells import CellState, Point
from raysweep.search.history import TrialHistory
from raysweep.study import Study

RUNNING = "running"
"""Status of a row that stands for a trial handed out and not told (`raysweep ask`)."""

_log = logging.getLogger("raysweep")


def restore_trials(
    rows: pd.DataFrame,
    study: Study,
    data_hash: str,
    states: Mapping[str, CellState],
    *,
    keep_crashes: bool = False,
) -> float:
    """Rebuild the trials of earlier runs of this study in its cells; crashed ones are run again,
    at the same points where their cell still wants trials, unless `keep_crashes` counts them as if
    this run had seen them. A finished one whose loss cannot be one counts as diverged.

    Returns the FLOPs spent on them. Raises UserError where rows of these cells were made otherwise
    than the study says now: losses of two recipes must not be compared.
    """
    other_recipe: list[str] = []
    ran: defaultdict[tuple[str, str], set[tuple[Point, int]]] = defaultdict(set)
    spent = 0.0
    for row in rows.to_dict("records"):
        state = states.get(row["cell"])
        if state is None:
            continue
        crashed = row["status"] == "crashed"
        rate, sequences = row["learning_rate"], int(row["batch_sequences"])
        also = further_values(row["recipe"], study)
        spec = study.trial(state.cell, data_hash, rate, sequences, int(row["seed"]), also)
        point = Point(rate, math.log2(sequences), spec.also)
        if crashed and not keep_crashes:
            if spec.key == row["trial_key"] and state.stable_run is None:
                state.crashed.append((point, spec.seed))
            continue
        if spec.key != row["trial_key"]:
            other_recipe.append(row["cell"])
            continue
        if crashed:
            state.add_row(point, "crashed", None)
            state.crashes += 1
            state.take_back(point)
            continue
        ran[(state.stable_run or state).cell.name, state.cell.name].add((point, spec.seed))
        lost = row["status"] == FINISHED and not is_loss(row["loss"])
        status = "diverged" if lost else row["status"]
        number = state.add_row(point, status, row["loss"])
        if status == RUNNING:
            state.running.add(number)
        else:
            state.crashes = 0
        spent += state.flops
    if other_recipe:
        raise UserError(
            f"the results hold {len(other_recipe)} trials of study {study.name} (first in cell "
            f"{other_recipe[0]}) made with another recipe, shape, seed or corpus: give the study "
            "another name, or name another --results"
        )
    for (stable_run, cell), of_branch in list(ran.items()):
        if cell != stable_run:
            unfinished = states[stable_run].unfinished
            unfinished += sorted(of_branch - ran[stable_run, stable_run] - set(unfinished))
    return spent


def restore_in_flight(
    trials: Iterable[Mapping[str, Any]],
    rows: pd.DataFrame,
    study: Study,
    data_hash: str,
    states: Mapping[str, CellState],
) -> None:
    """Have the cells first take up the trials that an earlier run had started, from its record of
    them: but for those whose row stands, or that the search space rules out now."""
    ended = rows[rows["status"] != "crashed"]
    over = set(zip(ended["cell"], ended["trial_key"], strict=True))
    for trial in trials:
        try:
            state = states[trial["cell"]]
            spec, key = study.trial_of(trial, data_hash), trial["trial_key"]
            point = Point(spec.learning_rate, math.log2(spec.batch_sequences), spec.also)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        run = point, spec.seed
        known = spec.key != key or (state.cell.name, key) in over or run in state.unfinished
        if not known and state.stable_run is None and point in state.bounds:
            state.unfinished.append(run)
            if run in state.crashed:
                state.crashed.remove(run)


def further_values(recipe: Any, study: Study) -> dict[str, float]:
    """What a row's recipe says of the further hyperparameters that a study searches."""
    names = study.space.search.also
    given: dict[str, Any] = record_of(recipe) if names else {}
    try:
        return {name: float(given[name]) for name in names if name in given}
    except (ValueError, TypeError):
        return {}


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
        history.add_imported(
            size_of(f"{first['source']}:{name}", first),
            cell["learning_rate"].to_numpy(float),
            cell["batch_tokens"].to_numpy(float),
            cell["loss"].to_numpy(float),
            (cell["status"] == "diverged").to_numpy(),
        )
