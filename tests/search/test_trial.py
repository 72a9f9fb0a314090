"""One trial as a Tune actor runs it: what is lost, and what is not, when its process is."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from raysweep.data.corpus import prepare
from raysweep.errors import StorageError, UserError
from raysweep.results import Results
from raysweep.search.trial import RowWriter, TrialContext, run_trial
from raysweep.study import Study


def in_folder(folder: Path, name: str = "lost") -> tuple[TrialContext, dict[str, Any]]:
    """What a trial of a study is given, with the point it runs at."""
    (folder / "text.txt").write_text("".join(f"line {i} of many\n" for i in range(2000)))
    study = Study.from_dict(
        {
            "study": name,
            "architectures": {"dense": {}},
            "model": {"sequence_length": 16},
            "scales": [{"d_model": 16, "layers": 1, "heads": 2}],
            "horizons": [{"tokens": 16 * 8 * 30}],
            "data": {"source": "text", "paths": ["text.txt"], "validation_sequences": 8},
            "recipe": {"checkpoint_seconds": 1e-9},
        },
        folder,
    )
    corpus = prepare(study.space.data, folder, cache=folder / "cache", sequence_length=16)
    uri = str(folder / "results")
    Results.open(uri, create=True)
    at = {"cell": study.cells[0].name, "learning_rate": 0.01, "batch_sequences": 8, "seed": 0}
    return TrialContext(study, corpus, uri), at


def test_lost_between_its_outcome_and_its_row_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, point = in_folder(tmp_path)
    results = Results.open(context.results_uri)
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
    standing = results.find(row["trial_key"], row["study"])
    assert standing is not None
    assert standing["loss"] == row["loss"]
    assert not list(kept.iterdir())


def test_a_storage_that_fails_is_no_end_of_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune starts it anew."""
    context, point = in_folder(tmp_path)

    def fails(*arguments: object) -> None:
        raise StorageError("cannot write")

    with monkeypatch.context() as patch:
        patch.setattr("raysweep.search.trial._train", fails)
        with pytest.raises(StorageError):
            run_trial(context, point)
    assert Results.open(context.results_uri).to_pandas().empty
    assert run_trial(context, point)["status"] == "finished"


def test_a_row_written_on_another_host_has_sensible_seconds(tmp_path: Path) -> None:
    """Monotonic clocks of hosts have nothing in common."""
    context, _ = in_folder(tmp_path)
    spec = context.study.trial(context.study.cells[0], "data", 0.01, 8, 0)
    writer = RowWriter(
        context.results_uri, "ladder", None, datetime.now(UTC), begun=1e9, host="another"
    )
    assert 0 <= writer.refused(spec, UserError("no"))["seconds_wall"] < 60


def test_studies_in_one_folder_that_run_the_same_trial_have_a_row_each(tmp_path: Path) -> None:
    for name in ("one", "two", "two"):
        run_trial(*in_folder(tmp_path, name))
    rows = Results.open(tmp_path / "results").to_pandas()
    assert rows["study"].tolist() == ["one", "two"]
    assert rows["trial_key"].nunique() == 1
    assert len(list((tmp_path / "results" / "trials").iterdir())) == 2


@pytest.mark.parametrize("early", [True, False])
def test_what_a_user_must_mend_is_a_row_at_once(tmp_path: Path, early: bool) -> None:
    """A trial that would fail so again ends with its reason, before it trains."""
    context, point = in_folder(tmp_path)
    if early:  # the validation data are too few for the slice
        data = context.study.space.data.model_copy(update={"validation_sequences": 10_000})
        context.study.space = context.study.space.model_copy(update={"data": data})
        reason = "10000 sequences of 16 need"
    else:
        resources = context.study.cells[0].resources.model_copy(update={"gpus_per_worker": 1.0})
        cell = dataclasses.replace(context.study.cells[0], resources=resources)
        context.study.cells = (cell,)
        reason = "PyTorch sees no GPU here"
    row = run_trial(context, point)
    assert row["status"] == "crashed"
    assert reason in row["reason"]
    assert row["step"] is None
    standing = Results.open(context.results_uri).find(row["trial_key"], row["study"])
    assert standing is not None
    assert standing["status"] == "crashed"
