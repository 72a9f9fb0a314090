"""A study of a few trials that a brake holds back, its driver as a process, and nodes for it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.nodes import Brake, Cluster, Driver

if TYPE_CHECKING:
    import pandas as pd

MARK = 10_000.0
"""Seconds that no trial takes."""


def _search_space(**changes: Any) -> dict[str, Any]:
    """One cell of two trials; `changes` go to its sections."""
    space: dict[str, Any] = {
        "study": "faults",
        "model": {"sequence_length": 32},
        "scales": [{"name": "a", "d_model": 16, "layers": 1, "heads": 1}],
        "horizons": [{"tokens": 40_000}],
        "search": {
            "strategy": "ladder",
            "trials_per_cell": 2,
            "extend_edges": False,
            "learning_rate": {"low": 1e-3, "high": 1e-2},
            "batch_sequences": {"low": 4, "high": 4},
        },
        "recipe": {"checkpoint_seconds": 1},
        "data": {"max_megabytes": 2, "validation_sequences": 64},
    }
    for section, values in changes.items():
        whole = not isinstance(values, dict)
        space[section] = values if whole else {**space.get(section, {}), **values}
    return space


@pytest.fixture
def search_space() -> Callable[..., dict[str, Any]]:
    """Makes a search space: `search_space(**changes)`."""
    return _search_space


@pytest.fixture(scope="session")
def _brake(tmp_path_factory: pytest.TempPathFactory) -> Brake:
    return Brake(tmp_path_factory.mktemp("brake"))


@pytest.fixture
def brake(_brake: Brake) -> Brake:
    """Holds all trials of the test until it is released."""
    _brake.press()
    return _brake


@pytest.fixture(scope="module")
def nodes(_brake: Brake) -> Iterator[Cluster]:
    """A head that runs no trials, and two nodes of one CPU."""
    # Ray gives a head that is gone a minute to come back.
    env = _brake.env | {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
    with Cluster(head_cpus=0, env=env) as cluster:
        cluster.start_head()
        cluster.add_worker()
        cluster.add_worker()
        yield cluster


@pytest.fixture
def driver(tmp_path: Path, brake: Brake) -> Iterator[Callable[..., Driver]]:
    """Starts a driver in the test's folder: `driver(*options, env=..., **changes)`, the changes
    being to the search space. What is left of it ends with the test."""
    started: list[Driver] = []

    def start(*options: str, env: dict[str, str] | None = None, **changes: Any) -> Driver:
        env = env or os.environ | brake.env
        started.append(Driver(tmp_path, _search_space(**changes), *options, env=env))
        return started[-1]

    yield start
    for each in started:
        each.kill()


class Marks:
    """Marks checkpoints, so that rows show which were taken up."""

    def put(self, checkpoints: list[Path]) -> set[str]:
        """Add to the time that the checkpoints' runs have taken. Returns the trials' keys."""
        import torch

        keys = set()
        for path in checkpoints:
            state = torch.load(path, weights_only=True)
            state["seconds"] += MARK
            torch.save(state, path)
            keys.add(state["key"])
        return keys

    def found(self, rows: "pd.DataFrame") -> set[str]:
        """Keys of the trials that went on from a marked checkpoint."""
        return set(rows[rows["seconds_train"] > MARK]["trial_key"])


@pytest.fixture
def marks() -> Marks:
    return Marks()
