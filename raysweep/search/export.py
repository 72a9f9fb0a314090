"""Results as an Optuna journal, for optuna-dashboard and whoever else reads Optuna storages."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from raysweep.errors import UserError
from raysweep.results.schema import FINISHED
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH
from raysweep.search.strategies import search_space


def export_optuna(frame: pd.DataFrame, path: Path) -> int:
    """Write one Optuna study a cell, named STUDY/CELL, to a new journal file.

    Every trial with a learning rate and a batch goes in; those that did not finish are failed
    trials with their status and reason as user attributes. Returns the number of trials written.
    Raises UserError where the file stands already or nothing can be exported.
    """
    if path.exists():
        raise UserError(f"{path} exists: name a new file, or remove it")
    rows = frame[frame["learning_rate"].notna() & frame["batch_sequences"].notna()]
    if rows.empty:
        raise UserError("no trial with a learning rate and batch_sequences: nothing to export")
    path.parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path)))
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        for (study_name, cell), group in rows.groupby(["study", "cell"], sort=False):
            study = optuna.create_study(
                study_name=f"{study_name}/{cell}", storage=storage, direction="minimize"
            )
            study.add_trials(_trials(group))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return len(rows)


def _trials(rows: pd.DataFrame) -> list[FrozenTrial]:
    rate = rows["learning_rate"].astype(float)
    log2 = rows["batch_sequences"].astype(float).map(math.log2)
    whole = bool((log2 == log2.round()).all())
    bounds = (int(log2.min()), int(log2.max())) if whole else (log2.min(), log2.max())
    space = search_space((rate.min(), rate.max()), bounds)
    trials = []
    for row, log2_batch in zip(rows.to_dict("records"), log2, strict=True):
        usable = row["status"] == FINISHED and math.isfinite(row["loss"])
        notes = {k: row[k] for k in ("trial_key", "status", "reason", "seed", "excluded")}
        trials.append(
            optuna.create_trial(
                params={
                    LEARNING_RATE: row["learning_rate"],
                    LOG2_BATCH: int(log2_batch) if whole else log2_batch,
                },
                distributions=space,
                value=row["loss"] if usable else None,
                state=TrialState.COMPLETE if usable else TrialState.FAIL,
                user_attrs={k: v for k, v in notes.items() if not pd.isna(v)},
            )
        )
    return trials
