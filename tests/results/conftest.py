"""Rows to store, and a real S3 server on loopback to store them on."""

import datetime as dt
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.object_store import ObjectStore
from raysweep.results.schema import make_row


def _make(key: str, **values: Any) -> dict[str, Any]:
    base = {
        "trial_key": key,
        "study": "s",
        "cell": "dense-a",
        "architecture": "dense",
        "architecture_kind": "dense",
        "scale": "a",
        "source": "raysweep",
        "experts": 1,
        "top_k": 1,
        "params_active_non_embedding": 1e6,
        "tokens": 2e7,
        "status": "finished",
        "loss": 3.0,
        "started_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    }
    return make_row(**{**base, **values})


CURVE = {
    "step": [1, 2],
    "tokens": [10.0, 20.0],
    "train_loss": [4.0, 3.0],
    "learning_rate": [0.1, 0.1],
    "grad_norm": [1.0, 1.0],
}


@pytest.fixture
def a_row() -> Callable[..., dict[str, Any]]:
    """Makes a row of a key; other columns may be given."""
    return _make


@pytest.fixture
def curve() -> dict[str, list[float]]:
    return CURVE


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    found = ObjectStore()
    yield found
    found.close()


@pytest.fixture
def bucket(store: ObjectStore, request: pytest.FixtureRequest) -> Iterator[str]:
    """A URI of this test alone, on a server that works until told otherwise."""
    store.share = 0.0
    yield store.uri(re.sub(r"\W", "-", request.node.name))
    store.share = 0.0
