"""Loggers as options: what cannot be used is one line that says how to mend it."""

import dataclasses
import importlib.util

import pytest
from pyarrow import fs

from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.search.loggers import check_loggers
from raysweep.study import Study

SPACE = {
    "study": "logged",
    "scales": [{"d_model": 16, "layers": 1, "heads": 1}],
    "horizons": [{"tokens": 10_000}],
}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(name: str, tmp_path, monkeypatch) -> None:
    study = Study.from_dict(SPACE | {"logging": [name]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"pip install {name}, or drop it from logging"):
        check_loggers(study, Results.open(tmp_path / "r", create=True))


def test_tensorboard_needs_a_folder(tmp_path) -> None:
    study = Study.from_dict(SPACE | {"logging": ["tensorboard"]})
    results = Results.open(tmp_path / "r", create=True)
    check_loggers(study, results)
    elsewhere = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    results.storage = dataclasses.replace(results.storage, uri="s3://b/r", filesystem=elsewhere)
    with pytest.raises(UserError, match="s3://b/r is no folder: use wandb or mlflow"):
        check_loggers(study, results)
