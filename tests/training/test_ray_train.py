"""The loop on two workers of a real local Ray, alone and inside a Tune trial."""

import pytest

from raysweep.training.loop import train
from raysweep.training.outcome import TrialOutcome

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def _ray(repo):
    import ray
    from ray._private.authentication_test_utils import reset_auth_token_state

    reset_auth_token_state()  # an earlier test may have used another token
    environment = {"PYTHONPATH": f"{repo}:{repo / 'tests' / 'training'}"}
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_ray")
def test_inside_a_tune_trial(corpus, spec, tmp_path):
    import pickle

    from ray import tune

    trial = spec(resources={"workers": 2})
    seen = []

    class Listener(tune.Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            seen.append(result)

    def trainable(config):
        from raysweep.training.ray_train import train_distributed

        storage = str(tmp_path / "ray")
        outcome = train_distributed(trial, corpus, storage_path=storage)
        assert isinstance(outcome, TrialOutcome)
        tune.report({"outcome": pickle.dumps(outcome)})

    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0.01}),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0, callbacks=[Listener()]),
    )
    results = tuner.fit()
    assert not results.errors
    metrics = results[0].metrics
    assert metrics is not None
    outcome = pickle.loads(metrics["outcome"])
    one = train(spec(), corpus)
    assert outcome.status == "finished"
    assert outcome.world_size == 2
    assert outcome.loss == pytest.approx(one.loss, rel=1e-5)
    shares = [r["percent"] for r in seen if "percent" in r]
    assert shares == sorted(shares)
    assert shares[-1] == 100
