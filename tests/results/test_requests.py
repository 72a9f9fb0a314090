"""How many requests an object store gets: of a trial, of `status`, of a study that is resumed."""

import datetime as dt
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.object_store import ObjectStore
from raysweep.data.corpus import prepare
from raysweep.results import Results
from raysweep.results.lock import study_lock
from raysweep.results.progress import status
from raysweep.results.schema import make_row
from raysweep.results.store import _opened
from raysweep.search.callback import TIDY_ROWS_EVERY
from raysweep.search.record import RunningRecord
from raysweep.search.run import run
from raysweep.search.trial import TrialContext, run_trial
from raysweep.study import Study
from raysweep.training.record import spec_columns

ROWS = 600
"""Of the resumed study: what counts is how many files they are in."""


def trained_elsewhere(folder: Path) -> Study:
    (folder / "nothing.py").write_text("def train(run):\n    return 3.0\n")
    space = {
        "study": "s",
        "training": {"function": "nothing:train"},
        "scales": [{"name": "s", "params": 1e6, "flops_per_token": 6e6}],
        "horizons": [{"tokens": 1e9}],
        "search": {"strategy": "random", "trials_per_cell": ROWS, "extend_edges": False},
    }
    return Study.from_dict(space, folder)


@pytest.mark.slow
def test_status_and_resume_of_a_study_that_is_under_way(
    bucket: str, store: ObjectStore, tmp_path: Path
) -> None:
    """Rows come as its driver would have them: merged but for the newest."""
    study = trained_elsewhere(tmp_path)
    results = Results.open(bucket, create=True)
    results.save_search_space("s", study.resolved().as_yaml())
    rows = []
    for i in range(ROWS):
        at = dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=i)
        spec = study.trial(study.cells[0], study.own_data, 1e-3 * 1.001**i, 64, 0)
        rows.append(
            make_row(**spec_columns(spec), status="finished", loss=3.0 + i / ROWS, started_at=at)
        )
    early = len(rows) - 5 * TIDY_ROWS_EVERY + 1
    results.write_many(pd.DataFrame(rows[:early]))
    for i, row in enumerate(rows[early:], 1):
        results.write(row)
        if i % TIDY_ROWS_EVERY == 0:
            results.compact_rows(kept=lambda: {row["trial_key"]})  # noqa: B023
    _opened.pop(bucket)  # as in a new process
    store.requests = 0
    cells, _ = status(bucket)
    assert cells[0].statuses == {"finished": ROWS}
    assert store.requests <= 20

    store.requests = 0
    with study_lock(results.storage):  # of which the waiting is no matter here
        lock = store.requests
    store.requests = 0
    assert run(study, results_uri=bucket).started == 0, "all trials are done"
    assert store.requests - lock <= 40


def test_a_trial(bucket: str, store: ObjectStore, tmp_path: Path) -> None:
    """The second of a process, which lives too short for a checkpoint, with what the driver notes
    of it."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of many\n" for i in range(2000)))
    space = {
        "study": "s",
        "model": {"sequence_length": 16},
        "scales": [{"d_model": 16, "layers": 1, "heads": 2}],
        "horizons": [{"tokens": 16 * 8 * 30}],
        "data": {"source": "text", "paths": ["text.txt"], "validation_sequences": 8},
    }
    study = Study.from_dict(space, tmp_path)
    corpus = prepare(study.space.data, tmp_path, cache=tmp_path / "cache", sequence_length=16)
    results = Results.open(bucket, create=True)
    context = TrialContext(study, corpus, bucket)
    for seed in (0, 1):
        store.requests = 0
        at = {"cell": study.cells[0].name, "learning_rate": 0.01, "batch_sequences": 8}
        with RunningRecord(results, "s") as record:
            record.keep({"trials": [at]})
            assert run_trial(context, {**at, "seed": seed})["status"] == "finished"
    assert store.requests <= 6
