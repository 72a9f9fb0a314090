"""A Ray cluster of two nodes on this machine, with a token, on ports of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from benchmarks import nodes
from benchmarks.nodes import Brake, Cluster


@dataclass(frozen=True)
class LocalCluster:
    """Where its Jobs API listens, and an environment to call it from."""

    address: str
    env: dict[str, str]
    nodes: Cluster
    brake: Brake
    """Off, unless a test presses it."""


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    return nodes.free_ports


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A head and a worker node, started by `ray start` as on real machines; one CPU each."""
    brake = Brake(tmp_path_factory.mktemp("brake"))
    brake.release()
    with Cluster(dashboard=True, env=brake.env) as local:
        local.start_head()
        local.add_worker()
        yield LocalCluster(local.jobs_address, local.env, local, brake)
