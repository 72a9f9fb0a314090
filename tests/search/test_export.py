"""The Optuna journal: opened by Optuna itself."""

from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raysweep.errors import UserError
from raysweep.results.published import read_steplaw
from raysweep.search.export import export_optuna


def test_optuna_opens_what_was_exported(tmp_path: Path, shared_data: Path) -> None:
    rows = read_steplaw(shared_data / "steplaw_dense.csv")
    rows = rows[rows["cell"].isin(sorted(rows["cell"].unique())[:2])]
    path = tmp_path / "journal.log"
    assert export_optuna(rows, path) == len(rows)
    storage = JournalStorage(JournalFileBackend(str(path)))
    summaries = optuna.get_all_study_summaries(storage)
    assert {s.study_name for s in summaries} == {f"steplaw/{c}" for c in rows["cell"].unique()}
    for summary in summaries:
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        cell = rows[rows["cell"] == summary.study_name.partition("/")[2]]
        assert len(study.trials) == len(cell)
        usable = cell[cell["status"] == "finished"]
        assert study.best_value == usable["loss"].min()
        best = usable.sort_values("loss").iloc[0]
        assert study.best_params["learning_rate"] == best["learning_rate"]


def test_an_existing_file_or_nothing_to_export_is_refused(tmp_path: Path, shared_data) -> None:
    rows = read_steplaw(shared_data / "steplaw_dense.csv")
    (tmp_path / "there").write_text("")
    with pytest.raises(UserError, match="exists: name a new file"):
        export_optuna(rows, tmp_path / "there")
    with pytest.raises(UserError, match="nothing to export"):
        export_optuna(rows.iloc[:0], tmp_path / "new")
