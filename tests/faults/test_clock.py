"""A wall clock that jumps by a day, forward and back, while trials run."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.nodes import at_each_step, in_trial, session_pids

pytestmark = pytest.mark.ray

SHIM = """
import os, time

def _time(real=time.time, file=os.environ["CLOCK_FILE"]):
    try:
        with open(file) as stream:
            return real() + float(stream.read() or 0)
    except OSError:
        return real()

time.time = _time
"""
"""Loaded by every Python process of the run before anything else."""

DAY = 86_400


def test_nothing_hangs_on_the_wall_clock(
    driver, brake, tmp_path: Path, assert_study_complete
) -> None:
    clock = tmp_path / "clock"
    env = os.environ | at_each_step(tmp_path / "shim", SHIM + brake.code)
    env["CLOCK_FILE"] = str(clock)
    running = driver(env=env, search={"stall_seconds": 300})
    running.until(lambda: in_trial(session_pids(running.process.pid)))
    for jump in (DAY, -DAY, 0):
        clock.write_text(str(jump))
        time.sleep(2)
    clock.write_text(str(-DAY))
    brake.release()
    begun = time.monotonic()
    assert running.wait() == 0, running.log
    assert "crashed" not in running.log
    rows = assert_study_complete(running.results, cells=1)
    took = time.monotonic() - begun + 30
    assert rows["seconds_train"].between(0, took).all()
    assert rows["seconds_wall"].between(0, took).all()
