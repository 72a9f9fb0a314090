"""Loggers as options: each gets what trials say, and what cannot be used is one line."""

import importlib.util
import logging
import time
from pathlib import Path

import pytest

from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.search.loggers import (
    Logger,
    LoggerThread,
    MLflow,
    TensorBoard,
    WeightsAndBiases,
    check_loggers,
    name_of,
)
from raysweep.study import Study

SPACE = {
    "study": "logged",
    "scales": [{"d_model": 16, "layers": 1, "heads": 1}],
    "horizons": [{"tokens": 10_000}],
}
CONFIG = {"cell": "dense-a", "learning_rate": 1e-3, "batch_sequences": 8, "seed": 0}
NAME = "dense-a/lr1.000e-03-batch8-seed0"


def log_two_trials(logger: Logger) -> None:
    """As a driver does: both run at once, and one begins again."""
    thread = LoggerThread([logger])
    other = CONFIG | {"seed": 1}
    for config in (CONFIG, other, CONFIG):
        thread.put("start", name_of(config), config)
    for step in (1, 2):
        thread.put("log", name_of(CONFIG), step, {"train_loss": 3.0 / step})
        thread.put("log", name_of(other), step, {"train_loss": 5.0 / step})
    thread.put("end", name_of(CONFIG), False)
    thread.put("end", name_of(other), True)
    thread.close()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(name: str, monkeypatch) -> None:
    study = Study.from_dict(SPACE | {"logging": [name]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"pip install {name}, or drop it from logging"):
        check_loggers(study)


def test_tensorboard_events_lie_beside_the_rows_in_a_bucket_too(tmp_path: Path, bucket) -> None:
    for results in (Results.open(tmp_path / "r", create=True), Results.open(bucket, create=True)):
        log_two_trials(TensorBoard(results))
        files = results.storage.list("tensorboard", *NAME.split("/"))
        assert files
        read = [results.storage.read("tensorboard", *NAME.split("/"), f.base_name) for f in files]
        assert b"".join(data or b"" for data in read).count(b"train_loss") == 2


@pytest.mark.slow
def test_mlflow_has_a_run_a_trial(tmp_path: Path, monkeypatch) -> None:
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    results = Results.open(tmp_path / "r", create=True)
    logger = MLflow("logged", results)
    log_two_trials(logger)
    client = logger._client
    experiment = client.get_experiment_by_name("raysweep-logged")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 2
    assert runs[NAME].data.params["learning_rate"] == "0.001"
    assert runs[NAME].data.metrics == {"train_loss": 1.5}
    assert {run.info.status for run in runs.values()} == {"FINISHED", "FAILED"}


@pytest.mark.slow
def test_wandb_has_a_run_a_trial_offline(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb").teardown()  # else it holds to what it read for another test
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    log_two_trials(WeightsAndBiases("logged"))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    deadline = time.monotonic() + 30  # a process of W&B's own writes them
    while not all(b"raysweep-logged" in path.read_bytes() for path in runs):
        assert time.monotonic() < deadline, [path.read_bytes() for path in runs]
        time.sleep(0.2)


def test_a_logger_that_fails_ends_and_the_others_go_on(caplog) -> None:
    class Broken:
        def __getattr__(self, name: str):
            raise OSError("the server is away")

    class Kept:
        def __init__(self) -> None:
            self.told: list[str] = []

        def __getattr__(self, name: str):
            return lambda *arguments: self.told.append(name)

    kept = Kept()
    thread = LoggerThread([Broken(), kept])  # type: ignore[list-item]
    with caplog.at_level(logging.WARNING, "raysweep"):
        thread.put("start", NAME, CONFIG)
        thread.put("end", NAME, False)
        thread.close()
    assert kept.told == ["start", "end", "close"]
    assert [r.message for r in caplog.records] == [
        "logging to Broken ends here: the server is away"
    ]
