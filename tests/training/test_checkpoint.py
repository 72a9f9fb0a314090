"""Checkpoints: on any storage, beside training, through kills; losing one loses time only."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from raysweep.errors import UserError
from raysweep.results.filesystem import Storage
from raysweep.results.store import CHECKPOINTS
from raysweep.training import checkpoint
from raysweep.training.checkpoint import NAME, Checkpoints, forget
from raysweep.training.loop import train
from raysweep.training.outcome import Silent

SCRIPT = Path(__file__).with_name("killed_runs.py")


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_newest_only_and_gone_at_the_end(where, tmp_path, bucket):
    storage = Storage.at(tmp_path / "results" if where == "folder" else bucket)
    checkpoints = Checkpoints(storage, "k")
    assert checkpoints.load() is None
    for step in (1, 2):
        checkpoints.save({"step": step, "x": torch.full((3,), float(step)), "curve": [1, None]})
    checkpoints.wait()
    assert [info.base_name for info in storage.list(CHECKPOINTS, "k")] == [NAME]
    state = Checkpoints(storage, "k").load()
    assert state is not None
    assert state["step"] == 2
    assert state["x"].tolist() == [2.0] * 3
    assert state["curve"] == [1, None]
    assert Checkpoints(storage, "another").load() is None
    if where == "folder":
        (tmp_path / "results" / CHECKPOINTS / "k" / f".{NAME}.half").write_bytes(
            b"of a killed process"
        )
    forget(storage, "k")
    forget(storage, "k")
    assert not storage.list(CHECKPOINTS, "k")
    assert not (tmp_path / "results" / CHECKPOINTS / "k").exists()


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path, monkeypatch):
    """Training goes on while the write waits; only one write is under way."""
    storage, go = Storage.at(tmp_path), threading.Event()
    write = Storage.write

    def slow(self, data, *parts):
        assert go.wait(20)
        write(self, data, *parts)

    monkeypatch.setattr(Storage, "write", slow)
    checkpoints = Checkpoints(storage, "k")
    weights, curve = torch.ones(3), [1.0]
    checkpoints.save({"weights": weights, "monitor": {"curve": curve}})
    assert checkpoints.writing
    weights.zero_()
    curve.append(2.0)
    go.set()
    checkpoints.wait()
    assert not checkpoints.writing
    state = checkpoints.load()
    assert state is not None
    assert state["weights"].tolist() == [1.0] * 3
    assert state["monitor"] == {"curve": [1.0]}


def test_a_write_under_way_is_not_joined_by_another(corpus, spec, tmp_path, monkeypatch):
    """A run on slow storage goes on, and saves again when the write is through."""
    under_way, most, saved = [0], [0], []
    write = Checkpoints._write

    def slow(self, state):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        saved.append(state["step"])
        time.sleep(0.02)
        write(self, state)
        under_way[0] -= 1

    monkeypatch.setattr(Checkpoints, "_write", slow)
    trial = spec(recipe={"checkpoint_seconds": 1e-9})
    assert train(trial, corpus, checkpoints=Storage.at(tmp_path)).status == "finished"
    assert most == [1]
    assert 2 <= len(saved) < trial.steps


def test_storage_that_fails_does_not_end_the_trial(corpus, spec, tmp_path, monkeypatch, caplog):
    def full(self, data, *parts):
        raise UserError("cannot write: no space left")

    monkeypatch.setattr(Storage, "write", full)
    trial = spec(recipe={"checkpoint_seconds": 1e-9})
    with caplog.at_level(logging.WARNING, "raysweep"):
        outcome = train(trial, corpus, checkpoints=Storage.at(tmp_path))
    assert outcome.status == "finished"
    assert "no new checkpoint: cannot write: no space left" in caplog.text


def test_a_damaged_checkpoint_means_starting_over(corpus, spec, tmp_path, caplog):
    trial = spec(recipe={"checkpoint_seconds": 600})
    Storage.at(tmp_path).write(b"PK damaged", CHECKPOINTS, trial.key, NAME)
    with caplog.at_level(logging.WARNING, "raysweep"):
        outcome = train(trial, corpus, checkpoints=Storage.at(tmp_path))
    assert outcome.status == "finished"
    assert "its checkpoint is lost" in caplog.text


class Dies(Silent):
    def report(self, step: int, tokens: int, loss: float) -> None:
        if step == 12:
            raise KeyboardInterrupt


def test_a_run_goes_on_from_an_object_store(corpus, spec, bucket):
    trial = spec("moe", recipe={"checkpoint_seconds": 1e-9})
    whole = train(trial, corpus)
    storage = Storage.at(bucket)
    with pytest.raises(KeyboardInterrupt):
        train(trial, corpus, reporter=Dies(), checkpoints=storage)
    assert Checkpoints(storage, trial.key).load() is not None
    resumed = train(trial, corpus, checkpoints=Storage.at(bucket))
    assert resumed.loss == whole.loss
    assert resumed.curve == whole.curve
    assert Checkpoints(storage, trial.key).load() is not None, "its row is not written yet"


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory, repo):
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    subprocess.run(command, env=environment, timeout=240, check=True)
    return folder


@pytest.mark.parametrize("architecture", ["dense", "moe"])
def test_killed_again_and_again_ends_bit_identical(killed_runs, architecture):
    """Processes ended by SIGKILL at random moments of one run, each going on with it."""
    firsts = json.loads((killed_runs / "firsts.json").read_text())[architecture]
    assert firsts[0] == 1
    assert firsts == sorted(firsts)
    assert firsts[-1] > 1, "it began anew each time"
    whole, resumed = (
        json.loads((killed_runs / f"{architecture}-{name}" / "outcome.json").read_text())
        for name in ("quiet", "killed")
    )
    assert whole["weights"] == resumed["weights"]
    assert whole == resumed
    assert whole["noise_trace"] > 0


def test_timer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    timer, never = checkpoint.Timer(10), checkpoint.Timer(0)
    due = []
    for now[0] in (105.0, 110.0, 115.0, 120.0):
        due.append(timer.due())
        assert not never.due()
    assert due == [False, True, False, True]
