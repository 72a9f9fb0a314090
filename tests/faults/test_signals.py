"""SIGINT and SIGTERM: nothing is lost, the rest goes on where it stood."""

import os
import signal
import time

import pytest

from benchmarks.nodes import command_of, in_trial, session_pids

pytestmark = pytest.mark.ray

CONTINUE = "run the same command again to continue"


def processes(driver) -> list[int]:
    """The driver and its local Ray."""
    return session_pids(driver.process.pid)


def assert_all_end(driver) -> None:
    """Within ten seconds: Ray's agents end when they see that their raylet has."""
    deadline = time.monotonic() + 10
    while left := processes(driver):
        assert time.monotonic() < deadline, [command_of(pid) for pid in left]
        time.sleep(0.2)


def test_sigterm_then_sigint_then_to_the_end(driver, brake, assert_study_complete) -> None:
    """Checkpoints stand although none was due; Ctrl-C reaches all of a terminal's processes."""
    running = driver(recipe={"checkpoint_seconds": 600})
    running.until(lambda: len(in_trial(processes(running))) == 2)
    time.sleep(3)
    begun = time.monotonic()
    running.process.terminate()
    assert running.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 30
    assert running.log.splitlines()[-1] == f"interrupted: {CONTINUE}"
    assert "Traceback" not in running.log
    stopped = running.checkpoints()
    assert len(stopped) + len(running.rows()) == 2

    running.start()
    running.until(lambda: in_trial(processes(running)))
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.wait() == 128 + signal.SIGINT
    assert running.log.splitlines()[-1] == f"interrupted: {CONTINUE}"
    assert_all_end(running)

    brake.release()
    running.start()
    assert running.wait() == 0, running.log
    rows = assert_study_complete(running.results, cells=1)
    taken_up = rows[rows["trial_key"].isin([path.parent.name for path in stopped])]
    assert len(taken_up) == len(stopped), "every trial that was in flight is taken up"
    assert (taken_up["seconds_train"] > 2).all()  # of all attempts
    assert not running.checkpoints()


def test_a_second_signal_ends_at_once(driver) -> None:
    """Trials without checkpoints are given time; unless the user wants none of it."""
    running = driver(recipe={"checkpoint_seconds": 0})
    running.until(lambda: len(in_trial(processes(running))) == 2)
    running.process.terminate()
    time.sleep(2)
    assert running.process.poll() is None
    begun = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    assert running.wait(15) == 128 + signal.SIGINT
    assert time.monotonic() - begun < 10, "not the 25 s that the first one grants"
    assert f"ended at once: {CONTINUE}" in running.log
    assert_all_end(running)
