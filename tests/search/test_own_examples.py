"""The examples of own training, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.nodes import Driver, command_of, in_trial, session_pids
from raysweep.results import Results

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("own_examples")]

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "search_spaces/own_training"


FEW = {
    "huggingface": {
        "search.trials_per_cell": "2",
        "search.batch_sequences": "{low: 8, high: 32}",
        "horizons": "[{tokens: 100k}]",
    },
    "torchrun": {
        "search.trials_per_cell": "1",
        "search.batch_sequences": "{low: 8, high: 8}",
        "horizons": "[{tokens: 400k}]",
    },
}


class Example(Driver):
    """An example as a user runs it, with a few trials, each of a second or more."""

    def __init__(self, name: str, folder: Path) -> None:
        sets = [word for at, value in FEW[name].items() for word in ("--set", f"{at}={value}")]
        super().__init__(folder, EXAMPLES / f"{name}.yaml", *sets)

    @property
    def folders(self) -> list[Path]:
        """Of trials that have begun and are not over."""
        return sorted((self.results / "checkpoints").glob("*"))

    def workers(self) -> list[int]:
        return in_trial(session_pids(self.process.pid))

    def commands(self) -> list[int]:
        """All processes that commands have started."""
        pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if f"{self.results}/checkpoints/" in command_of(pid)]

    def kill_driver(self) -> None:
        """And see that all it has started ends."""
        self.kill()
        deadline = time.monotonic() + 60
        while left := [*session_pids(self.process.pid), *self.commands()]:
            assert time.monotonic() < deadline, [command_of(pid) for pid in left]
            time.sleep(0.1)

    def finish(self) -> pd.DataFrame:
        assert self.wait() == 0, self.log
        assert (self.results.parent / "report/index.html").stat().st_size > 10_000
        assert not self.commands()
        assert not self.folders
        return self.rows()


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Callable[[str], Example]]:
    started: list[Example] = []

    def start(name: str) -> Example:
        started.append(Example(name, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_huggingface_by_a_function(
    example: Callable[[str], Example], assert_study_complete: Callable[..., pd.DataFrame]
) -> None:
    """A worker is killed as it trains, then the driver; then it is run again."""
    running = example("huggingface")
    running.until(lambda: len(running.folders) == 2)  # two train at once
    before = running.workers()
    os.kill(before[0], signal.SIGKILL)
    running.until(lambda: len(running.rows()) >= 2 and set(running.workers()) - set(before))
    running.kill_driver()
    rows = running.rows()
    running.start()
    running.finish()
    frame = assert_study_complete(running.results, trials=2, cells=3)
    assert set(rows["trial_key"]) < set(frame["trial_key"])
    assert (frame["loss"] < 5.0).all()
    assert frame["loss_se"].between(0.001, 0.5).all()
    assert frame["params_total"].gt(frame["params_total_non_embedding"]).all()
    curves = Results.open(running.results).curves()
    assert curves.groupby("trial_key").size().min() > 1
    assert not curves.duplicated(["trial_key", "step"]).any()
    assert curves["grad_norm"].gt(0).all()


def test_torchrun_by_a_command(
    example: Callable[[str], Example], assert_study_complete: Callable[..., pd.DataFrame]
) -> None:
    """A worker is killed as its command trains, then the driver; then it is run again. Each time
    all that torchrun has started ends, and the trial goes on from its checkpoint."""
    running = example("torchrun")

    def lines() -> int:
        told = [folder / "progress.jsonl" for folder in running.folders]
        return sum(len(path.read_bytes().splitlines()) for path in told if path.exists())

    running.until(lines)
    begun = running.commands()
    assert len(begun) >= 4  # the supervisor, torchrun, and its two
    os.kill(running.workers()[0], signal.SIGKILL)
    running.until(lambda: not set(begun) & set(running.commands()))
    once = lines()
    running.until(lambda: lines() > once)
    running.kill_driver()
    (killed,) = (folder.name for folder in running.folders)
    running.start()
    running.finish()
    frame = assert_study_complete(running.results, trials=1, cells=2)
    assert (frame["loss"] < 5.0).all()
    assert frame["train_loss"].notna().all()
    at = {
        key: json.loads(text)["started_at"]
        for key, text in zip(frame["trial_key"], frame["metrics"], strict=True)
    }
    assert at.pop(killed) > 20  # of 20 steps between two checkpoints
    assert list(at.values()) == [0]
    assert len(list((running.results / "logs").iterdir())) == 2


def test_ask_and_tell_from_a_shell_loop(tmp_path: Path) -> None:
    command = tmp_path / "bin/raysweep"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m raysweep.cli "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(EXAMPLES / "loop.sh"), str(tmp_path / "results")],
        cwd=REPO,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    frame = Results.open(tmp_path / "results").to_pandas()
    assert frame.groupby("cell").size().tolist() == [2, 2]
    assert set(frame["status"]) == {"finished"}
    assert (frame["loss"] < 5.5).all()
