"""Ranges that a real run widened: kept beside its rows, and taken up by the next one."""

from pathlib import Path

import pytest

from raysweep.results import Results
from raysweep.search.run import run
from raysweep.study import Study

pytestmark = pytest.mark.ray


def make_study(**search) -> Study:
    return Study.from_dict(
        {
            "study": "edge",
            "model": {"sequence_length": 32},
            "scales": [{"d_model": 8, "layers": 1, "heads": 1}],
            "horizons": [{"tokens": 20_000}],
            "search": {
                "strategy": "qmc",
                "trials_per_cell": 4,
                "max_extensions": 1,
                "learning_rate": {"low": 1e-5, "high": 1e-4},
                "batch_sequences": {"low": 8, "high": 16},
                **search,
            },
            "data": {"max_megabytes": 1, "validation_sequences": 16},
        }
    )


def test_a_widened_range_is_taken_up_and_a_finished_study_stays_so(tmp_path: Path) -> None:
    uri = str(tmp_path / "r")
    assert run(make_study(), results_uri=uri).started == 4 + 2
    results = Results.open(uri)
    (kept,) = results.ranges("edge")["cells"].values()
    assert kept["learning_rate"][1] == pytest.approx(4e-4)
    assert kept["extensions"] == 1
    assert run(make_study(), results_uri=uri).started == 0
    assert run(make_study(trials_per_cell=6), results_uri=uri).started == 2
    (tmp_path / "r" / "studies" / "edge.ranges.json").write_text("damaged")
    assert results.ranges("edge") == {}
    assert run(make_study(trials_per_cell=6), results_uri=uri).started == 0
