"""Clusters that grow on demand: waiting trials are seen, fixed clusters are left alone."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd
import pytest

from benchmarks.nodes import Brake, Cluster
from raysweep.search.autoscaler import GRANTS_WITHOUT_GROWTH, MAX_WAITING, AutoscalerRequests
from raysweep.search.resources import ResourcePool, kind_of

ONE = kind_of([{"CPU": 1.0}])
TWO = kind_of([{"CPU": 1.0}, {"CPU": 1.0}])


@dataclass
class Asked:
    """What was asked for, and whether it is granted or withdrawn."""

    bundles: list[dict[str, float]]
    has: bool = False
    gone: bool = False

    def granted(self) -> bool:
        return self.has

    def withdraw(self) -> None:
        self.gone = True


@dataclass
class Room:
    asked: list[Asked] = field(default_factory=list)

    def ask(self, bundles, strict: bool) -> Asked:
        self.asked.append(Asked([dict(bundle) for bundle in bundles]))
        return self.asked[-1]

    @property
    def waiting(self) -> list[Asked]:
        return [each for each in self.asked if not each.gone]


def cluster(*nodes: str, cpus: int = 1) -> ResourcePool:
    return ResourcePool({node: {"CPU": cpus} for node in nodes})


def test_no_more_waits_than_the_cluster_has_and_than_is_wanted() -> None:
    room = Room()
    growth = AutoscalerRequests(room.ask)
    growth.update({ONE: 10, TWO: 1}, cluster())
    assert [len(each.bundles) for each in room.waiting] == [1]
    growth.update({ONE: 3, TWO: 10}, cluster("a", cpus=8))
    assert [len(each.bundles) for each in room.waiting] == [1, 1, 1, 2, 2]
    growth.update({ONE: 2}, cluster("a", cpus=8))
    assert [len(each.bundles) for each in room.waiting] == [1, 1]
    growth.update({ONE: 1000}, cluster("a", cpus=500))
    assert len(room.waiting) == MAX_WAITING
    growth.withdraw()
    assert room.waiting == []


def test_what_is_granted_is_given_back_and_asked_for_again_as_nodes_come() -> None:
    room = Room()
    growth = AutoscalerRequests(room.ask)
    for count in range(1, 3 * GRANTS_WITHOUT_GROWTH):
        growth.update({ONE: 1}, cluster(*map(str, range(count))))
        (waiting,) = room.waiting
        waiting.has = True


def test_a_fixed_cluster_is_not_asked_for_ever() -> None:
    room = Room()
    growth = AutoscalerRequests(room.ask)
    for _ in range(GRANTS_WITHOUT_GROWTH):
        growth.update({ONE: 1}, cluster("a"))
        (waiting,) = room.waiting
        waiting.has = True
    growth.update({ONE: 1}, cluster("a"))
    assert room.waiting == []
    growth.update({ONE: 1}, cluster("b"))
    assert len(room.waiting) == 1


@pytest.fixture
def growing(brake: Brake) -> Iterator[Cluster]:
    """A head without CPUs, whose autoscaler may start up to two nodes of one CPU here."""
    env = brake.env | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with Cluster(head_cpus=0, env=env) as cluster:
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        node = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
        config = {
            "cluster_name": "growing",
            "max_workers": 2,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 5,
            "provider": {
                "type": "fake_multinode",
                "gcs_address": cluster.address,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "auth": {"ssh_user": "nobody"},
            "available_node_types": {"ray.head.default": head, "node": node},
            "head_node_type": "ray.head.default",
            **{name: [] for name in ("initialization_commands", "setup_commands")},
            **{f"{of}_setup_commands": [] for of in ("head", "worker")},
            **{f"{of}_start_ray_commands": [] for of in ("head", "worker")},
            "file_mounts": {},
            "cluster_synced_files": [],
            "rsync_exclude": [],
        }
        file = cluster.root / "autoscaling.json"
        file.write_text(json.dumps(config))
        cluster.start_head("--autoscaling-config", str(file))
        yield cluster


@pytest.mark.ray
def test_a_cluster_without_nodes_grows_to_two(
    growing, driver, brake, assert_study_complete
) -> None:
    """The first node comes for the trial that waits in Tune; the second for those not yet in it."""
    running = driver("--address", growing.address, env=growing.env, search={"trials_per_cell": 4})
    running.until(lambda: len(running.checkpoints()) == 2)
    brake.release()
    assert running.wait() == 0, running.log
    rows = assert_study_complete(running.results, trials=4, cells=1)
    assert rows["worker"].nunique() >= 2
    rows = rows.sort_values("started_at")
    ends = rows["started_at"] + pd.to_timedelta(rows["seconds_wall"], unit="s")
    assert (rows["started_at"].to_numpy()[1:] < ends.to_numpy()[:-1]).any(), "never two at once"
