"""SIGKILL, SIGSTOP: to a trial's worker, a node, the head. Trials go on from their checkpoints."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray.util import placement_group_table

from benchmarks.nodes import in_trial, session_pids
from raysweep.search import hangs
from raysweep.search.run import placement, run
from raysweep.search.runtime import cluster_nodes, ray_runtime
from raysweep.study import Study
from raysweep.training.single import train_one

pytestmark = pytest.mark.ray

OUTCOME = ("loss", "loss_se", "train_loss", "step", "tokens_seen", "noise_trace", "noise_grad_sq")


def undisturbed(space: dict[str, Any], row: Any) -> dict[str, Any]:
    """The same trial in this process, in one go."""
    study = Study.from_dict(space)
    return train_one(study, row.cell, row.learning_rate, int(row.batch_tokens), seed=int(row.seed))


def workers_of(nodes) -> list[int]:
    return in_trial(pid for node in nodes.workers for pid in node.pids())


def test_a_killed_worker_loses_a_second(
    nodes, driver, brake, marks, search_space, assert_study_complete
) -> None:
    """The trial goes on in another worker from its checkpoint, to the very same row."""
    running = driver("--address", nodes.address, env=nodes.env)
    running.until(lambda: running.checkpoints() and workers_of(nodes))
    for pid in workers_of(nodes):
        os.kill(pid, signal.SIGKILL)
    marked = marks.put(running.checkpoints())
    brake.release()
    assert running.wait() == 0, running.log
    rows = assert_study_complete(running.results, cells=1)
    for row in rows.itertuples():
        alone = undisturbed(search_space(), row)
        assert {name: getattr(row, name) for name in OUTCOME} == {n: alone[n] for n in OUTCOME}
        assert alone["trial_key"] == row.trial_key
    assert marked
    assert marked == marks.found(rows)
    assert not running.checkpoints()


def test_the_head_is_killed_and_the_study_continued_on_another(
    nodes, driver, brake, marks, assert_study_complete
) -> None:
    """The driver gives up by itself; the same command goes on."""
    running = driver("--address", nodes.address, env=nodes.env)
    running.until(lambda: len(running.checkpoints()) == 2)
    for node in (nodes.head, *nodes.workers):
        nodes.kill(node)
    assert running.wait() != 0
    left = marks.put(running.checkpoints())
    assert left
    brake.release()
    nodes.start_head()
    nodes.add_worker()
    nodes.add_worker()
    running.start()
    assert running.wait() == 0, running.log
    rows = assert_study_complete(running.results, cells=1)
    assert left == marks.found(rows)
    assert not running.checkpoints()


def test_a_killed_driver_is_followed_by_one_that_takes_up_its_trials(
    driver, brake, marks, assert_study_complete
) -> None:
    """Four trials of two cells, of which two run; a checkpoint that nobody knows goes."""
    running = driver(horizons=[{"tokens": 40_000}, {"tokens": 50_000}])
    running.until(lambda: len(running.checkpoints()) == 2)
    for pid in session_pids(running.process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    running.process.wait()
    left = marks.put(running.checkpoints())
    unknown = running.results / "checkpoints" / "unknown"
    unknown.mkdir()
    brake.release()
    running.start()
    running.until(lambda: not unknown.exists())
    assert running.wait() == 0, running.log
    rows = assert_study_complete(running.results, cells=2)
    assert len(left) == 2
    assert left == marks.found(rows)
    assert not running.checkpoints()


def test_a_worker_that_hangs_is_replaced(
    nodes, brake, search_space, tmp_path: Path, monkeypatch, assert_study_complete
) -> None:
    """Stopped before its first sign of life; the limits are small here, in this driver."""
    for name, value in nodes.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hangs, "TIMES_AT_START", 1.0)
    study = Study.from_dict(search_space(search={"trials_per_cell": 1, "stall_seconds": 25}))
    stopped: list[int] = []

    def stop_the_first(*_: object) -> None:
        if not stopped:
            stopped.extend(workers_of(nodes))
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
                brake.release()

    monkeypatch.setattr("raysweep.search.progress.Progress.refresh", stop_the_first)
    begun = time.monotonic()
    run(study, results_uri=str(tmp_path / "r"), address=nodes.address)
    assert len(stopped) == 1
    assert time.monotonic() - begun > 25
    assert_study_complete(tmp_path / "r", trials=1, cells=1)
    assert not Path(f"/proc/{stopped[0]}/fd").exists() or not workers_of(nodes)


def test_trials_go_to_the_node_that_is_named_while_it_has_room(
    nodes, search_space, monkeypatch
) -> None:
    """Ray by itself takes the emptiest node, and groups would find none that is whole."""
    for name, value in nodes.env.items():
        monkeypatch.setenv(name, value)
    half = search_space(resources={"cpus_per_worker": 0.5})
    (cell,) = Study.from_dict(half).cells
    with ray_runtime(nodes.address):
        first, *_ = sorted(n for n, has in cluster_nodes().items() if has.get("CPU"))
        placed = []
        for _ in range(3):
            group = placement(cell, first).to_placement_group()
            assert group.wait(60)
            placed += placement_group_table(group)["bundles_to_node_id"].values()
    assert placed[:2] == [first, first]
    assert placed[2] != first, "it is full, and the hint no command"
