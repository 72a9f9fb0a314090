"""One real Ray that several tests join, one after the other."""

from collections.abc import Iterator

import pytest

from benchmarks.nodes import Cluster


@pytest.fixture(scope="session")
def _head() -> Iterator[Cluster]:
    # On a busy machine Ray takes longer to start than the 30 s that it gives itself.
    with Cluster(head_cpus=2, env={"RAY_raylet_start_wait_time_s": "120"}) as started:
        started.start_head()
        yield started


@pytest.fixture
def cluster(_head: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """One node of two CPUs, which `run` joins from here. Tests that use it name the
    `xdist_group` "head"."""
    for name, value in (_head.env | {"RAY_ADDRESS": _head.address}).items():
        monkeypatch.setenv(name, value)
    return _head
