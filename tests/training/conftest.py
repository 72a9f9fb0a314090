"""A small corpus and trials on it, as fixtures."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from toys import ToyCorpus, make_spec
from workers import run_workers, workers_said

from raysweep.study import TrialSpec


@pytest.fixture(scope="session")
def corpus() -> Any:
    return ToyCorpus()


@pytest.fixture(scope="session")
def spec() -> Callable[..., TrialSpec]:
    return make_spec


@pytest.fixture(scope="session")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two workers of `of_two` leave their checkpoints: one folder for all processes that
    run tests side by side."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def of_two(folder_of_two: Path) -> list[dict[str, Any]]:
    """What each of two workers of a process group found, by script; started by whoever is first."""
    with FileLock(folder_of_two.with_suffix(".lock")):
        return workers_said(folder_of_two) or run_workers("all_of_two.py", folder_of_two)
