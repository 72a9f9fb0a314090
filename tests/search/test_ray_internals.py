"""What is used of Ray beyond its public API is still there. When one of these fails, Ray was moved
to a version that keeps things elsewhere: each says what to do."""

import inspect
import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import _raylet, tune
from ray._private import utils
from ray._private.node import Node
from ray.air._internal import usage
from ray.core.generated import autoscaler_pb2
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.util import placement_group

from benchmarks.nodes import command_of
from raysweep.search import interruption, ray_internals
from raysweep.search.interruption import StopRequest, tell_trials_to_leave, tell_trials_to_stop
from raysweep.search.runtime import cluster_nodes, ray_runtime


def test_a_concluded_trial_is_not_pickled_and_keeps_little() -> None:
    """Else look for what Tune keeps of a trial (`Trial.run_metadata`, `Trial.get_json_state`):
    `benchmarks.driver_memory` shows whether it is small."""
    trial = Trial("raysweep", stub=True)
    trial.update_last_result({"loss": 1.0, "done": True, "training_iteration": 1})
    assert trial.run_metadata.metric_analysis
    ray_internals.forget_results(trial, ("done",))
    ray_internals.drop_snapshot(trial)
    assert trial.run_metadata.metric_analysis == trial.run_metadata.metric_n_steps == {}
    assert trial.last_result["done"]
    assert "loss" not in trial.last_result
    assert trial.get_json_state()[0] == "{}"


def test_a_lost_worker_gives_a_trial_another_start() -> None:
    """Else find what `TuneController._process_trial_failure` asks before it starts one again."""
    trial = Trial("raysweep", stub=True, max_failures=1)
    trial.run_metadata.num_failures = 2
    assert not trial.should_recover()
    ray_internals.allow_another_failure(trial)
    assert trial.should_recover()
    assert ray_internals.actor_of(trial) is None


def test_tune_drops_the_actors_that_it_keeps() -> None:
    """Else find what ends the actors of `reuse_actors`: `TuneController._actor_cache`."""
    parameters = inspect.signature(TuneController._cleanup_cached_actors).parameters
    assert list(parameters) == ["self", "force_all"]


def test_a_placement_group_takes_a_hint() -> None:
    """Else name the node by `bundle_label_selector`, and place trials anew whose node is gone."""
    assert "_soft_target_node_id" in inspect.signature(placement_group).parameters
    hint = ray_internals.placement_hint("0" * 56)
    one, other = (tune.PlacementGroupFactory([{"CPU": 1}], **hint) for _ in range(2))
    assert one == other, "an actor is used again for a trial of the same node"
    assert hash(one) == hash(other)
    assert one != tune.PlacementGroupFactory([{"CPU": 1}])


@pytest.mark.ray
def test_the_users_own_runs_of_tune_are_left_as_they_were() -> None:
    before = {name: value for name, value in os.environ.items() if name.startswith("TUNE_")}
    with ray_runtime(None, cpus=1):
        assert os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] == "1"
    after = {name: value for name, value in os.environ.items() if name.startswith("TUNE_")}
    assert after == before


@pytest.mark.ray
def test_a_local_ray_is_few_processes() -> None:
    """Else find what `ray.init` starts besides (`Node.start_head_processes`, `start_raylet`) and
    what of it `few_processes` may leave out."""

    def parts() -> list[Any]:
        daemons = (Node.start_monitor, Node.start_api_server, Node.start_log_monitor)
        return [*daemons, utils.get_dashboard_dependency_error, usage.tag_callbacks]

    def started(parent: int) -> list[int]:
        found: list[int] = []  # not what tests beside this one start
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):  # a thread that has ended
                found += map(int, file.read_text().split())
        return found + [pid for child in found for pid in started(child)]

    before, others = parts(), set(started(os.getpid()))  # a cluster of other tests
    with ray_runtime(None, cpus=2):
        assert parts() == before, "a Ray that others start in this process is whole"
        assert placement_group([{"CPU": 1}]).wait(60)  # the raylet is at work
        commands = [command_of(pid) for pid in {*started(os.getpid())} - others]
    assert any("raylet --raylet_socket_name" in each for each in commands)
    scripts = {Path(each.split(" --")[0]).name for each in commands}
    assert not scripts & {"dashboard.py", "log_monitor.py", "monitor.py"}
    assert not scripts & {"default_worker.py", "ray::IDLE"}, "no worker before it is needed"
    with ray_internals.no_usage_tags():
        assert not usage.tag_callbacks([tune.Callback()])
    assert parts() == before


@pytest.mark.ray
def test_room_that_a_dead_actor_reserved_is_given_back() -> None:
    """Such room Ray itself keeps until the job ends: if no longer, `give_back_orphans` can go."""

    class Reserves:
        def reserve(self) -> str:
            group = ray.util.placement_group([{"CPU": 1}])
            ray.get(group.ready())
            return group.id.hex()

        def leave(self) -> None:
            os._exit(1)

    def reserved() -> set[str]:
        table = ray.util.placement_group_table()
        return {key for key, entry in table.items() if entry["state"] == "CREATED"}

    with ray_runtime(None, cpus=3):
        actor: Any = ray.remote(num_cpus=0)(Reserves)
        one, other = actor.remote(), actor.remote()
        lost, kept = ray.get([one.reserve.remote(), other.reserve.remote()])
        own = ray.util.placement_group([{"CPU": 1}])
        ray.get(own.ready())
        one.leave.remote()
        begun = time.monotonic()
        while lost in reserved():
            assert time.monotonic() < begun + 60
            time.sleep(0.5)
            if time.monotonic() > begun + 3:  # by now Ray has noticed
                ray_internals.give_back_orphans()
        assert time.monotonic() > begun + 3, "Ray has done it"
        assert reserved() == {kept, own.id.hex()}


@pytest.mark.ray
def test_nodes_that_are_about_to_go_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else find what `ray.train`'s PreemptionWatcher asks."""
    with ray_runtime(None, cpus=1):
        node = ray.get_runtime_context().get_node_id()
        assert ray_internals.draining_nodes() == frozenset()
        assert list(cluster_nodes()) == [node]
        actor: Any = ray.remote(num_cpus=1)(Counter)
        holder = actor.remote()  # an idle node would be gone at once
        ray.get(holder.total.remote())
        raylet: Any = _raylet  # both are compiled: they have no types to check
        messages: Any = autoscaler_pb2
        client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        reason = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        assert client.drain_node(node, reason, "spot", 0)[0]
        assert ray_internals.draining_nodes() == {node}
        assert cluster_nodes() == {}
        assert ray_internals.get_word("none", "raysweep") is None
        request = StopRequest()
        monkeypatch.setattr(interruption, "ASK_SECONDS", 0.0)
        assert not request()
        tell_trials_to_leave({"another"})
        assert not request()
        tell_trials_to_leave({"another", node})
        assert request()
        assert request.leaves
        tell_trials_to_stop()
        stops = StopRequest()
        assert stops()
        assert not stops.leaves


def test_sixteen_trials_may_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else find how Tune limits trials that are pending (`_get_max_pending_trials`)."""
    from raysweep.search.runtime import _SETTINGS

    name = "TUNE_MAX_PENDING_TRIALS_PG"
    monkeypatch.setenv(name, _SETTINGS[name])
    limit = inspect.getmodule(TuneController)._get_max_pending_trials(Searcher())  # type: ignore
    assert limit == 16
