"""What is used of Ray beyond its public API, in one place: each part has a test that fails when Ray
moves it, and says there what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial


def drop_snapshot(trial: Trial) -> None:
    """Spare Tune the pickling of a concluded trial when the run ends: it would serve to restore
    what nobody restores."""
    trial._state_json = "{}"


def forget_results(trial: Trial, kept: Collection[str]) -> None:
    """Drop the running means that Tune keeps of a concluded trial to the end, and of its last
    result all but the keys `kept`: most of the driver's memory."""
    trial.run_metadata.metric_analysis.clear()
    trial.run_metadata.metric_n_steps.clear()
    result: Mapping[str, Any] = trial.last_result or {}
    trial.run_metadata.last_result = {key: result[key] for key in kept if key in result}


def actor_of(trial: Trial) -> Any:
    """The actor in which a trial runs; None while it waits."""
    return trial.temporary_state.ray_actor


def drop_cached_actors(controller: TuneController) -> None:
    """Have Tune end the actors that it keeps for trials to come: each holds its resources, while
    nothing is staged for ever."""
    controller._cleanup_cached_actors(force_all=True)


def allow_another_failure(trial: Trial) -> None:
    """Let Tune start a trial again once more than it would."""
    trial.max_failures += 1


def placement_hint(node: str) -> dict[str, str]:
    """Options of a placement group that goes to a node if it has room there, and else to another:
    Ray's public labels would have it wait for a node that is gone."""
    return {"strategy": "STRICT_PACK", "_soft_target_node_id": node}


def give_back_orphans() -> None:
    """Remove placement groups whose actor is dead: Ray keeps them, and moves them to other nodes,
    until the job ends. Ray Train's own cleaner knows only of groups whose workers have started."""
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    messages: Any = gcs_pb2  # generated: it has no types to check
    entries: Any = messages.PlacementGroupTableData
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for entry in state._connect_and_get_accessor().get_placement_group_table():
        group = entries.FromString(entry)
        orphan = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
        there = group.state != entries.REMOVED
        if orphan and there and group.creator_job_id == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def put_word(key: str, word: bytes, namespace: str) -> None:
    """Leave a word at the head, for all processes of the cluster, in place of the one before."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, word, namespace=namespace)


def get_word(key: str, namespace: str) -> bytes | None:
    """What was left; None where nothing was, or the head is away."""
    from ray.exceptions import RaySystemError, RpcError
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        return _internal_kv_get(key, namespace=namespace)
    except (RpcError, RaySystemError):
        return None


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are about to go: their machines are to be taken away, or were told to
    shut down. Ray puts nothing there any more."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def dashboard_url() -> str | None:
    """Where the Ray dashboard listens; None where there is none, as in a local Ray."""
    from ray._private.worker import get_dashboard_url

    url = get_dashboard_url()
    return f"http://{url}" if url else None


def read_token_again() -> None:
    """Make Ray look at the environment once more: where it was imported before, in a notebook say,
    it has settled on another token, or on none, and would knock in vain for 20 s."""
    import ray
    from ray import _raylet

    if not ray.is_initialized():
        raylet: Any = _raylet  # compiled: it has no types to check
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def few_processes() -> Iterator[None]:
    """Have a Ray that is started in the block leave out what a machine by itself has no use for:
    the autoscaler, the server of a dashboard that is off, what copies workers' logs, and all of its
    agent but what Ray itself asks. They take longer to start than the rest."""
    from ray._private import utils
    from ray._private.node import Node

    def nothing(*_: object, **__: object) -> None: ...

    instead: list[tuple[Any, str, Any]] = [
        (Node, "start_monitor", nothing),
        (Node, "start_api_server", nothing),
        (Node, "start_log_monitor", nothing),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not wanted")),
    ]
    with _replaced(instead):
        yield


@contextmanager
def no_usage_tags() -> Iterator[None]:
    """Spare Tune the import of all loggers that are installed, to count those in use for usage
    statistics that are off: 1.5 s with Weights & Biases and MLflow."""
    from ray.air._internal import usage

    with _replaced([(usage, "tag_callbacks", lambda callbacks: False)]):
        yield


@contextmanager
def _replaced(instead: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(of, name, getattr(of, name)) for of, name, _ in instead]
    try:
        for of, name, value in instead:
            setattr(of, name, value)
        yield
    finally:
        for of, name, value in before:
            setattr(of, name, value)
