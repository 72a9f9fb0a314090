"""A small corpus and trials on it, as fixtures."""

from collections.abc import Callable
from typing import Any

import pytest
from toys import ToyCorpus, make_spec

from raysweep.study import TrialSpec


@pytest.fixture(scope="session")
def corpus() -> Any:
    return ToyCorpus()


@pytest.fixture(scope="session")
def spec() -> Callable[..., TrialSpec]:
    return make_spec
