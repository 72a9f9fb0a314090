"""A small corpus and trials on it, as fixtures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import ToyCorpus, make_spec
from workers import run_workers

from raysweep.study import TrialSpec


@pytest.fixture(scope="session")
def corpus() -> Any:
    return ToyCorpus()


@pytest.fixture(scope="session")
def spec() -> Callable[..., TrialSpec]:
    return make_spec


@pytest.fixture(scope="session")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two workers of `of_two` leave their checkpoints."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="session")
def of_two(folder_of_two: Path) -> list[dict[str, Any]]:
    """What each of two workers of a process group found, by script."""
    return run_workers("all_of_two.py", folder_of_two)
