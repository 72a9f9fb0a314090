"""Trials on two workers, whose group loses a node."""

import pytest

from benchmarks.nodes import TRAIN_WORKER, in_trial

pytestmark = pytest.mark.ray

TWO = {"workers": 2, "cpus_per_worker": 1}


def group_workers(pids: list[int]) -> list[int]:
    return in_trial(pids, (TRAIN_WORKER,))


def test_a_node_of_a_group_is_killed(nodes, driver, brake, marks, assert_study_complete) -> None:
    """The group begins anew with the node that comes instead, and the trial at its checkpoint."""
    running = driver("--address", nodes.address, env=nodes.env, resources=TWO)
    running.until(running.checkpoints)
    lost = nodes.workers[0]
    assert group_workers(lost.pids()), "the group spans both nodes"
    nodes.kill(lost)
    marked = marks.put(running.checkpoints())
    nodes.add_worker()
    brake.release()
    assert running.wait() == 0, running.log
    rows = assert_study_complete(running.results, cells=1)
    assert (rows["world_size"] == 2).all()
    assert marked == marks.found(rows)
    assert not running.checkpoints()
