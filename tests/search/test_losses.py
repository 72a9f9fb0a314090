"""How often a trial is started again: not often if it fails, as often as it takes if nodes die."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.nodes import Brake, Cluster, in_trial
from raysweep.search.callback import RETRIES, StudyCallback
from raysweep.search.cells import CRASHES_ALLOWED
from raysweep.search.run import run
from raysweep.study import Study

pytestmark = pytest.mark.ray

PROGRESS = "raysweep.search.progress.Progress.refresh"


def make_study(folder: Path, tokens: int) -> Study:
    """One trial, on token shards that stay where they are."""
    (folder / "tokens").mkdir()
    shard = np.random.default_rng(0).integers(0, 64, 100_000).astype(np.uint16)
    shard.tofile(folder / "tokens" / "train.bin")
    return Study.from_dict(
        {
            "study": "losses",
            "model": {"sequence_length": 32},
            "scales": [{"d_model": 16, "layers": 1, "heads": 1}],
            "horizons": [{"tokens": tokens}],
            "search": {
                "strategy": "qmc",
                "trials_per_cell": 1,
                "extend_edges": False,
                "batch_sequences": {"low": 4, "high": 4},
            },
            "recipe": {"checkpoint_seconds": 1},
            "data": {
                "source": "tokens",
                "paths": ["tokens"],
                "vocab_size": 64,
                "validation_sequences": 16,
            },
        },
        folder,
    )


@pytest.fixture(scope="module")
def brake(tmp_path_factory: pytest.TempPathFactory) -> Brake:
    return Brake(tmp_path_factory.mktemp("brake"))


@pytest.fixture(scope="module")
def head(brake: Brake) -> Iterator[Cluster]:
    with Cluster(env=brake.env) as started:
        started.start_head()
        yield started


@pytest.fixture
def cluster(head: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """One node, with this process's environment set to reach it."""
    for name, value in head.env.items():
        monkeypatch.setenv(name, value)
    return head


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each trial was started."""
    counted: Counter[str] = Counter()
    on_trial_start = StudyCallback.on_trial_start

    def count(self, iteration, trials, trial, **info) -> None:
        counted[trial.trial_id] += 1
        on_trial_start(self, iteration, trials, trial, **info)

    monkeypatch.setattr(StudyCallback, "on_trial_start", count)
    return counted


def test_lost_workers_do_not_end_a_trial(
    cluster, brake, tmp_path: Path, starts, monkeypatch
) -> None:
    killed: set[int] = set()

    def kill(*_: object) -> None:
        for pid in in_trial(cluster.head.pids()) if len(killed) < RETRIES + 2 else ():
            if pid not in killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
        if len(killed) == RETRIES + 2:
            brake.release()

    monkeypatch.setattr(PROGRESS, kill)
    study = make_study(tmp_path, 40_000)
    results = run(study, results_uri=str(tmp_path / "r"), address=cluster.address).results
    assert results.to_pandas()["status"].tolist() == ["finished"]
    assert list(starts.values()) == [RETRIES + 3]


def test_a_trial_that_fails_each_time_is_a_row_with_its_reason(
    cluster, tmp_path: Path, starts, monkeypatch
) -> None:
    study = make_study(tmp_path, 20_000)
    shard = tmp_path / "tokens" / "train.bin"
    monkeypatch.setattr(PROGRESS, lambda *_, **__: shard.unlink(missing_ok=True))
    results = run(study, results_uri=str(tmp_path / "r"), address=cluster.address).results
    (row,) = results.to_pandas().to_dict("records")
    assert row["status"] == "crashed"
    assert "token shard" in row["reason"]
    assert list(starts.values()) == [RETRIES + 1] * CRASHES_ALLOWED
