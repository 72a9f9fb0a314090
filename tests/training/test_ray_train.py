"""The loop on two workers of a real local Ray, alone and inside a Tune trial."""

import dataclasses

import pytest

from raysweep.data.corpus import prepare
from raysweep.data.shipping import publish
from raysweep.results.filesystem import Storage
from raysweep.study import Data
from raysweep.training.loop import train
from raysweep.training.outcome import TrialOutcome

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def _ray(repo, tmp_path_factory):
    import ray
    from ray._private.authentication_test_utils import reset_auth_token_state

    reset_auth_token_state()  # an earlier test may have used another token
    environment = {
        "PYTHONPATH": f"{repo}:{repo / 'tests' / 'training'}",
        "RAYSWEEP_CACHE": str(tmp_path_factory.mktemp("node") / "cache"),
    }
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


@pytest.fixture
def corpus(tmp_path):
    """A small one of text, in the driver's cache."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of many\n" for i in range(1000)))
    data = Data(source="text", paths=(str(tmp_path / "text.txt"),), validation_sequences=33)
    return prepare(data, tmp_path, cache=tmp_path / "cache", sequence_length=16)


@pytest.mark.usefixtures("_ray")
def test_inside_a_tune_trial_on_nodes_that_lack_the_corpus(corpus, spec, tmp_path):
    import pickle

    from ray import tune

    def fitting(trial):
        shape = dataclasses.replace(trial.cell.shape, vocab_size=corpus.vocab_size)
        return dataclasses.replace(trial, cell=dataclasses.replace(trial.cell, shape=shape))

    trial = fitting(spec(resources={"workers": 2}))
    results = Storage.at(tmp_path / "results")
    publish(corpus, results)
    elsewhere = dataclasses.replace(corpus, path=tmp_path / "only where the driver is")
    seen = []

    class Listener(tune.Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            seen.append(result)

    def trainable(config):
        from raysweep.training.ray_train import train_distributed

        storage = str(tmp_path / "ray")
        outcome = train_distributed(trial, elsewhere, checkpoints=results, storage_path=storage)
        assert isinstance(outcome, TrialOutcome)
        tune.report({"outcome": pickle.dumps(outcome)})

    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0.01}),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0, callbacks=[Listener()]),
    )
    ended = tuner.fit()
    assert not ended.errors
    metrics = ended[0].metrics
    assert metrics is not None
    outcome = pickle.loads(metrics["outcome"])
    one = train(fitting(spec()), corpus)
    assert outcome.status == "finished"
    assert outcome.world_size == 2
    assert outcome.loss == pytest.approx(one.loss, rel=1e-5)
    shares = [r["percent"] for r in seen if "percent" in r]
    assert shares == sorted(shares)
    assert shares[-1] == 100
