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
from raysweep.training.parallel import Workers

SCRIPT = Path(__file__).with_name("killed_runs.py")


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_newest_only_and_gone_at_the_end(where, tmp_path, bucket):
    storage = Storage.at(tmp_path / "results" if where == "folder" else bucket)
    checkpoints = Checkpoints(storage, "k")
    assert checkpoints.load() is None
    for step in (1, 2, 3):
        parts = {"w": (0, torch.full((3,), float(step)))}
        checkpoints.save({"step": step, "parts": parts, "curve": [1, None]})
    checkpoints.wait()
    assert len(storage.list(CHECKPOINTS, "k")) == 5, "the newest, and one that may be written over"
    state = Checkpoints(storage, "k").load_on_all({"w": (0, torch.empty(3))})
    assert state is not None
    assert state["step"] == 3
    assert state["parts"]["w"][1].tolist() == [3.0] * 3
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


def test_parts_are_put_together_for_another_number_of_workers(tmp_path, monkeypatch):
    """Four workers write a stretch each, in files of a few numbers; one and three read."""
    monkeypatch.setattr(checkpoint, "FILE_NUMBERS", 5)
    storage, whole = Storage.at(tmp_path), torch.arange(32.0)
    writers = [Checkpoints(storage, "k", Workers(rank, 4, sharded=True)) for rank in range(4)]
    for rank, writer in enumerate(writers):
        span = slice(8 * rank, 8 * rank + 8)
        parts = {"a": (span.start, whole[span]), "b": (span.start, -whole[span])}
        writer.save(
            {"step": 7, "parts": parts, "trunk": {"parts": {"a": (span.start, parts["b"][1])}}}
        )
    for writer in writers:
        writer.wait()
        writer.commit(writer.failed)
    assert len(storage.list(CHECKPOINTS, "k")) > 12
    for first, last in ((0, 32), (0, 11), (11, 22), (22, 32)):
        wanted = {"a": (first, torch.empty(last - first))}
        state = Checkpoints(storage, "k").load_on_all(wanted)
        assert state is not None
        assert torch.equal(state["parts"]["a"][1], whole[first:last])
        assert torch.equal(state["trunk"]["parts"]["a"][1], -whole[first:last])


def test_a_checkpoint_counts_only_once_all_workers_have_written(tmp_path, caplog):
    storage = Storage.at(tmp_path)
    whole = torch.arange(4.0)

    def write(step: int, ranks: range, failed: bool = False) -> None:
        for rank in ranks:
            writer = Checkpoints(storage, "k", Workers(rank, 2, sharded=True))
            writer._slot = step % 2
            part = whole[2 * rank : 2 * rank + 2] + step
            writer.save({"step": step, "parts": {"a": (2 * rank, part)}})
            writer.wait()
            writer.commit(failed)

    wanted = {"a": (0, whole)}
    write(0, range(1, -1, -1))
    write(1, range(2), failed=True)
    state = Checkpoints(storage, "k").load_on_all(wanted)
    assert state is not None
    assert state["step"] == 0
    assert torch.equal(state["parts"]["a"][1], whole)
    with caplog.at_level(logging.WARNING, "raysweep"):
        write(2, range(1, 2))  # and the first is lost before it has written
        assert Checkpoints(storage, "k").load_on_all(wanted) is None
    assert "starts over" in caplog.text


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
    checkpoints.save({"step": 1, "parts": {"w": (0, weights)}, "monitor": {"curve": curve}})
    assert checkpoints.writing
    weights.zero_()
    curve.append(2.0)
    go.set()
    checkpoints.wait()
    assert not checkpoints.writing
    state = checkpoints.load_on_all({"w": (0, weights)})
    assert state is not None
    assert state["parts"]["w"][1].tolist() == [1.0] * 3
    assert state["monitor"] == {"curve": [1.0]}


def test_a_write_under_way_is_not_joined_by_another(corpus, spec, tmp_path, monkeypatch):
    """A run on slow storage goes on, and saves again when the write is through."""
    under_way, most, saved = [0], [0], []
    write = Checkpoints._write

    def slow(self, slot, step, parts):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        saved.append(step)
        time.sleep(0.02)
        write(self, slot, step, parts)
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


@pytest.mark.slow
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
