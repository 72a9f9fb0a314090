"""One trial as a Tune actor runs it: what is lost, and what is not, when its process is."""

from pathlib import Path

import pytest

from raysweep.config import Study
from raysweep.data.corpus import prepare
from raysweep.results import Results
from raysweep.search.trial import RowWriter, TrialContext, run_trial

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def _ray():
    import ray
    from ray._private.authentication_test_utils import reset_auth_token_state

    reset_auth_token_state()  # an earlier test may have used another token
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_ray")
def test_lost_between_its_outcome_and_its_row_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of many\n" for i in range(2000)))
    study = Study.from_dict(
        {
            "study": "lost",
            "architectures": {"dense": {}},
            "model": {"sequence_length": 16},
            "scales": [{"d_model": 16, "layers": 1, "heads": 2}],
            "horizons": [{"tokens": 16 * 8 * 30}],
            "data": {"source": "text", "paths": ["text.txt"], "validation_sequences": 8},
            "recipe": {"checkpoint_seconds": 1e-9},
        },
        tmp_path,
    )
    corpus = prepare(study.space.data, tmp_path, cache=tmp_path / "cache", sequence_length=16)
    uri = str(tmp_path / "results")
    results = Results.open(uri, create=True)
    context = TrialContext(study, corpus, uri)
    point = {
        "cell": study.cells[0].name, "learning_rate": 0.01, "batch_sequences": 8, "seed": 0
    }  # fmt: skip
    kept = tmp_path / "results" / "checkpoints"

    def lost(self, spec, outcome):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "__call__", lost)
        with pytest.raises(KeyboardInterrupt):
            run_trial(context, point)
    assert list(kept.glob("*/checkpoint.pt"))
    row = run_trial(context, point)
    assert row["status"] == "finished"
    standing = results.find(row["trial_key"])
    assert standing is not None
    assert standing["loss"] == row["loss"]
    assert not list(kept.iterdir())
