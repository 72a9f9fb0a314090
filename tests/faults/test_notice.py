"""A node that is told to go, as by a spot notice: its trials leave a checkpoint and go on."""

import signal
import time

import pytest

from benchmarks.nodes import in_trial

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("nodes")]


@pytest.mark.parametrize(("workers", "tokens"), [(1, 3_000_000), (2, 1_500_000)])
def test_a_trial_goes_on_elsewhere_from_where_it_was(
    nodes, driver, marks, assert_study_complete, workers, tokens
) -> None:
    """No checkpoint is due for long; the node has half a minute."""
    running = driver(
        "--address",
        nodes.address,
        env=nodes.env,
        resources={"workers": workers, "cpus_per_worker": 1},
        recipe={"checkpoint_seconds": 600},
        horizons=[{"tokens": tokens}],
        search={"trials_per_cell": 1},
    )
    running.until(lambda: any(in_trial(node.pids()) for node in nodes.workers))
    time.sleep(8)  # of imports, most of it
    going = next(node for node in nodes.workers if in_trial(node.pids()))
    nodes.workers.remove(going)
    nodes.add_worker()
    going.process.send_signal(signal.SIGTERM)
    running.until(running.checkpoints, 30)
    left = marks.put(running.checkpoints())
    assert running.wait() == 0, running.log
    assert going.process.wait(60) is not None
    rows = assert_study_complete(running.results, trials=1, cells=1)
    assert left == marks.found(rows)
    going.kill()
