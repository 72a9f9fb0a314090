"""Trials on two workers, whose group loses a node, its driver, or memory."""

import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks.nodes import TRAIN_WORKER, in_trial, session_pids
from raysweep.results import Results

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("nodes")]

TWO = {"workers": 2, "cpus_per_worker": 1}

SHORT_OF_MEMORY = """
import os, resource, sys
from importlib.abc import MetaPathFinder

class Limit(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "raysweep.training.learner":
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20), resource.RLIM_INFINITY))

sys.meta_path.insert(0, Limit())
"""
"""Loaded by every process of a run: one that trains may grow by 400 MB only."""


def group_workers(pids: list[int]) -> list[int]:
    return in_trial(pids, (TRAIN_WORKER,))


def test_a_node_of_a_group_is_killed(nodes, driver, marks, assert_study_complete) -> None:
    """The group begins anew with the node that comes instead, and the trial at its checkpoint."""
    running = driver("--address", nodes.address, env=nodes.env, resources=TWO)
    running.until(running.checkpoints)
    lost = nodes.workers[0]
    assert group_workers(lost.pids()), "the group spans both nodes"
    nodes.kill(lost)
    marked = marks.put(running.checkpoints())
    nodes.add_worker()
    assert running.wait() == 0, running.log
    rows = assert_study_complete(running.results, cells=1)
    assert (rows["world_size"] == 2).all()
    assert marked == marks.found(rows)
    assert not running.checkpoints()


def test_sigterm_to_the_driver_of_a_group(driver, marks, assert_study_complete) -> None:
    """The trial leaves a checkpoint although none was due, and the next run takes it up."""
    running = driver(recipe={"checkpoint_seconds": 600}, resources=TWO)
    running.until(lambda: len(group_workers(session_pids(running.process.pid))) == 2)
    time.sleep(3)
    begun = time.monotonic()
    running.process.terminate()
    assert running.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 30
    assert "Traceback" not in running.log
    stopped = marks.put(running.checkpoints())
    assert len(stopped) == 1
    running.start()
    assert running.wait() == 0, running.log
    rows = assert_study_complete(running.results, cells=1)
    assert stopped == marks.found(rows)
    assert not running.checkpoints()


def test_a_group_goes_on_after_a_trial_without_memory(driver, tmp_path: Path) -> None:
    """The one that lacks it is a row that says what to set; those after it finish."""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(SHORT_OF_MEMORY)
    paths = [str(tmp_path / "shim"), os.environ.get("PYTHONPATH", "")]
    scales = [
        {"name": "a", "d_model": 16, "layers": 1, "heads": 1},
        {"name": "b", "d_model": 2048, "layers": 4, "heads": 2},
    ]
    running = driver(
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        resources=TWO,
        scales=scales,
        horizons=[{"tokens": 30_000}],
    )
    assert running.wait() == 0, running.log
    rows = Results.open(running.results).to_pandas()
    of = dict(list(rows.groupby("scale")))
    assert of["a"]["status"].tolist() == ["finished"] * 2
    assert of["b"]["status"].tolist() == ["out_of_memory"] * 2
    assert of["b"]["reason"].str.contains("is out of memory: set resources.strategy to fsdp").all()
    assert of["a"]["started_at"].max() > of["b"]["started_at"].min(), "a group outlives it"
