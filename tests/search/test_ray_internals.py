"""What is used of Ray beyond its public API is still there. When one of these fails, Ray was moved
to a version that keeps things elsewhere: each says what to do."""

import inspect

import pytest
from ray import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.util import placement_group

from raysweep.search import ray_internals
from raysweep.search.runtime import ray_runtime


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


def test_a_placement_group_takes_a_hint() -> None:
    """Else name the node by `bundle_label_selector`, and place trials anew whose node is gone."""
    assert "_soft_target_node_id" in inspect.signature(placement_group).parameters
    hint = ray_internals.placement_hint("0" * 56)
    one, other = (tune.PlacementGroupFactory([{"CPU": 1}], **hint) for _ in range(2))
    assert one == other, "an actor is used again for a trial of the same node"
    assert hash(one) == hash(other)
    assert one != tune.PlacementGroupFactory([{"CPU": 1}])


@pytest.mark.ray
def test_nodes_that_are_about_to_go_are_told() -> None:
    """Else find what `ray.train`'s PreemptionWatcher asks; a whole study with such a node is in
    tests/faults/test_notice.py."""
    with ray_runtime(None, cpus=1):
        assert ray_internals.draining_nodes() == frozenset()
        ray_internals.put_word("key", b"word", "raysweep")
        assert ray_internals.get_word("key", "raysweep") == b"word"
        assert ray_internals.get_word("none", "raysweep") is None


def test_sixteen_trials_may_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else find how Tune limits trials that are pending (`_get_max_pending_trials`)."""
    from raysweep.search.runtime import _SETTINGS

    name = "TUNE_MAX_PENDING_TRIALS_PG"
    monkeypatch.setenv(name, _SETTINGS[name])
    limit = inspect.getmodule(TuneController)._get_max_pending_trials(Searcher())  # type: ignore
    assert limit == 16
