"""A study on a real local Ray: through to the report, killed in the middle, continued, extended."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from raysweep.results import Results
from raysweep.search.run import run
from raysweep.study import Study

pytestmark = pytest.mark.ray

REPO = Path(__file__).resolve().parents[2]
SPACE = str(REPO / "search_spaces/smoke.yaml")


def command(folder: Path) -> list[str]:
    results, report = str(folder / "results"), str(folder / "report")
    base = [sys.executable, "-m", "raysweep", "run", SPACE, "--results", results]
    return [*base, "--report", report, "--set", "logging=[tensorboard]"]


@dataclass
class Ended:
    """What a command printed, and the process that it was."""

    stdout: str
    stderr: str
    pid: int


def complete(folder: Path) -> Ended:
    pipe = subprocess.PIPE
    env = {k: v for k, v in os.environ.items() if k != "CI"}  # where no page is kept live
    process = subprocess.Popen(
        command(folder), stdout=pipe, stderr=pipe, text=True, cwd=REPO, env=env
    )
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    return Ended(stdout, stderr, process.pid)


def last_scalars(events: bytes) -> dict[str, float]:
    """The last value of every scalar in a file of TensorBoard events: length, data, checksums."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

    values: dict[str, float] = {}
    while events:
        (length,) = struct.unpack("<Q", events[:8])
        event = Event.FromString(events[12 : 12 + length])
        values |= {v.tag: v.simple_value for v in event.summary.value}
        events = events[16 + length :]
    return values


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, int]:
    """A study whose driver was killed with SIGKILL, the rows that stood then, and the driver."""
    folder = tmp_path_factory.mktemp("study")
    with open(folder / "log", "w") as log:
        driver = subprocess.Popen(command(folder), stdout=log, stderr=log, cwd=REPO)
        deadline = time.monotonic() + 300
        trials = folder / "results" / "trials"
        while len(list(trials.glob("[!.]*.parquet"))) < 3:
            assert driver.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    time.sleep(3)  # workers notice that their driver is gone
    return folder, Results.open(folder / "results").to_pandas(), driver.pid


@pytest.fixture(scope="module")
def continued(killed: tuple[Path, pd.DataFrame, int]) -> tuple[Path, Ended]:
    folder, *_ = killed
    return folder, complete(folder)


def test_killed_and_continued_loses_and_repeats_nothing(
    killed, continued, assert_study_complete
) -> None:
    _, before, _ = killed
    folder, _ = continued
    frame = assert_study_complete(folder / "results")
    kept = frame[frame["trial_key"].isin(before["trial_key"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        kept.sort_values("trial_key", ignore_index=True),
        before.sort_values("trial_key", ignore_index=True),
    )


def test_rows_are_complete(continued) -> None:
    folder, _ = continued
    frame = Results.open(folder / "results").to_pandas()
    always = [
        *("loss", "loss_se", "train_loss", "bits_per_byte", "tokens_seen", "flops", "device"),
        *("seconds_wall", "seconds_train", "tokens_per_second", "peak_memory_bytes", "worker"),
        *("versions", "data_hash", "params_total", "recipe"),
    ]
    assert frame[always].notna().all().all()
    assert (frame["loss"] < 5.6).all()  # below ln 256: something was learned
    assert {"torch", "ray", "optuna"} <= set(json.loads(frame["versions"].iloc[0]))
    moe = frame[frame["architecture"] == "moe"]
    assert moe[["expert_load_entropy", "expert_load_max_over_mean"]].notna().all().all()
    curves = Results.open(folder / "results").curves()
    assert set(curves["trial_key"]) == set(frame["trial_key"])
    assert (frame["seconds_train"] <= frame["seconds_wall"]).all()


def test_a_report_stands_at_the_end(continued) -> None:
    folder, done = continued
    *answer, link = done.stdout.strip().splitlines()
    assert link == (folder / "report" / "index.html").as_uri()
    assert any(line.startswith("  learning rate") for line in answer)
    aside = [line for line in answer if "the cells do not tell" not in line]
    assert not any("published" in line for line in aside)
    assert f"live report, in a moment: {link}" in done.stderr
    assert (folder / "report" / "index.html").stat().st_size > 10_000


def test_tensorboard_has_every_trial(killed, continued) -> None:
    """Of the run that was not killed."""
    folder, _ = continued
    rows = Results.open(folder / "results").to_pandas()
    rows = rows[~rows["trial_key"].isin(killed[1]["trial_key"])]
    assert len(rows)
    for row in rows.itertuples():
        point = f"lr{row.learning_rate:.3e}-batch{row.batch_sequences}-seed{row.seed}"
        files = list((folder / "results/tensorboard" / str(row.cell) / point).iterdir())
        scalars = {k: v for file in files for k, v in last_scalars(file.read_bytes()).items()}
        assert scalars["loss"] == pytest.approx(row.loss)


def test_a_log_file_gets_plain_lines(continued) -> None:
    _, done = continued
    assert "\x1b" not in done.stderr
    assert "smoke: 4 cells" in done.stderr


def test_running_again_does_nothing_and_more_trials_extend(continued) -> None:
    """The added trials of the larger scale run on two workers: resources are not the result's."""
    folder, _ = continued
    before = Results.open(folder / "results").to_pandas()
    said = io.StringIO()
    run(Study.load(SPACE), results_uri=str(folder / "results"), console=Console(file=said))
    assert "nothing to run" in said.getvalue()
    changes = (
        "architectures={dense: {}}",
        "search.trials_per_cell=3",
        "search.strategy=qmc",
        "scales.1.resources={workers: 2}",
    )
    run(Study.load(SPACE, changes), results_uri=str(folder / "results"))
    frame = Results.open(folder / "results").to_pandas()
    assert len(frame) == len(before) + 2
    assert set(before["trial_key"]) < set(frame["trial_key"])
    added = frame[~frame["trial_key"].isin(before["trial_key"])].set_index("cell")
    assert (added["status"] == "finished").all()
    assert added["world_size"].to_dict() == {
        cell: 2 if "-b-" in cell else 1 for cell in sorted(added.index)
    }


def test_nothing_is_left_behind(killed, continued) -> None:
    """The scratch folder of a driver that ended, and that of one that was killed before it."""
    cache = Path(os.environ.get("RAYSWEEP_CACHE", Path.home() / ".cache/raysweep"))
    for folder in (cache, Path(tempfile.gettempdir())):
        assert not [pid for pid in (killed[2], continued[1].pid) if (folder / f"run{pid}").exists()]
