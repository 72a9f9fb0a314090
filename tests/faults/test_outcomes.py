"""Trials that end badly are rows that say why; a results folder has one driver."""

import pytest

from raysweep.results import Results
from raysweep.results.lock import LOCK, study_lock
from raysweep.study import Study
from raysweep.training.single import train_one


@pytest.mark.parametrize(
    ("learning_rate", "reason"), [(1e30, "non-finite"), (30.0, "is far above the first")]
)
def test_divergence_is_a_row_with_a_reason(search_space, tmp_path, learning_rate, reason) -> None:
    space = search_space(recipe={"clip_norm": None, "warmup_fraction": 0})
    study, uri = Study.from_dict(space), str(tmp_path / "r")
    train_one(study, study.cells[0].name, learning_rate, 128, results_uri=uri)
    row = Results.open(uri).to_pandas().iloc[0]
    assert row["status"] == "diverged"
    assert reason in row["reason"]
    assert row["step"] < row["steps"]
    assert row[["loss", "loss_se"]].isna().all()


def test_a_lock_left_behind_holds_nobody(tmp_path) -> None:
    results = Results.open(tmp_path / "r", create=True)
    (tmp_path / "r" / LOCK).write_text("process 1 on another-host\n")
    with study_lock(results.storage):
        pass


@pytest.mark.slow
def test_a_second_driver_is_refused_in_one_line(driver, tmp_path) -> None:
    results = Results.open(tmp_path / "results", create=True)
    with study_lock(results.storage):
        second = driver()
        assert second.wait() == 2
    assert second.log.startswith(f"error: {tmp_path / 'results'} is in use by process ")
    assert second.log.count("\n") == 1
    with study_lock(results.storage):
        pass
