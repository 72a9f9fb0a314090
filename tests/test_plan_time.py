"""The time of a study on this machine: arithmetic of paces, and a real calibration."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.study import Study
from raysweep.study.plan import (
    START_SECONDS,
    TRIAL_SECONDS,
    Calibration,
    Pace,
    make_plan,
    time_words,
    with_times,
)
from raysweep.training import calibrate as calibrating

REPO = Path(__file__).resolve().parents[1]
SPACE = {
    "study": "timed",
    "architectures": {"dense": {}},
    "model": {"sequence_length": 32},
    "scales": [
        {"name": "a", "d_model": 8, "layers": 1, "heads": 1},
        {"name": "b", "d_model": 16, "layers": 2, "heads": 2},
        {"name": "c", "d_model": 32, "layers": 4, "heads": 2},
    ],
    "horizons": [{"tokens": 32000}],
    "search": {
        "trials_per_cell": 3,
        "extend_edges": False,
        "repeats_at_optimum": 0,
        "learning_rate": {"low": 1e-3, "high": 1e-1},
        "batch_sequences": {"low": 4, "high": 16},
    },
    "data": {"source": "machine", "validation_sequences": 30},
}


@pytest.fixture
def study() -> Study:
    return Study.from_dict(SPACE)


def pace(study: Study, index: int, step: float, token: float) -> Pace:
    cell = study.cells[index]
    return Pace(cell.name, cell.architecture, cell.counts.flops_per_token, step, token, 0.1)


def test_a_timed_cell_takes_its_steps_and_tokens(study: Study) -> None:
    paces = (pace(study, 0, 1e-3, 1e-6), pace(study, 2, 4e-3, 9e-6))
    plan = with_times(make_plan(study), study, Calibration(2, paces, 2))
    steps = np.mean([32000 / (b * 32) for b in (4, 8, 16)])
    tokens = 32000 + 30 * 32 / 3
    first = 3 * (0.1 + TRIAL_SECONDS + steps * 1e-3 + tokens * 1e-6)
    last = 3 * (0.1 + TRIAL_SECONDS + steps * 4e-3 + tokens * 9e-6)
    assert plan.seconds[0] == pytest.approx(first)
    assert plan.seconds[2] == pytest.approx(last)
    assert first < plan.seconds[1] < last
    assert plan.wall_seconds == pytest.approx(START_SECONDS + sum(plan.seconds) / 2)
    said = plan.to_dict()["this_machine"]
    assert said["worker_seconds_by_cell"][study.cells[1].name] == plan.seconds[1]
    assert "2 trials at once" in time_words(plan)


def test_larger_cells_than_those_timed_grow_with_their_cost(study: Study) -> None:
    plan = with_times(make_plan(study), study, Calibration(1, (pace(study, 0, 0.0, 1e-6),), 1))
    fixed = 3 * (0.1 + TRIAL_SECONDS)
    costs = [c.counts.flops_per_token for c in study.cells]
    assert (plan.seconds[2] - fixed) / (plan.seconds[0] - fixed) == pytest.approx(
        costs[2] / costs[0]
    )


def test_without_a_calibration_no_time_is_claimed(study: Study) -> None:
    plan = make_plan(study)
    assert np.isnan(plan.wall_seconds)
    assert plan.to_dict()["this_machine"] is None


@pytest.mark.slow
def test_paces_of_a_real_machine_foretell_a_real_trial(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysweep.training.loop import train

    monkeypatch.setattr(calibrating, "SECONDS", 0.1)
    paces = calibrating.measure(study)
    assert [p.cell for p in paces] == [study.cells[0].name, study.cells[-1].name]
    cell = study.cells[-1]
    spec = replace(study.trial(cell, "x", 1e-3, 8, 0), validation_sequences=1)
    begun = time.perf_counter()
    train(spec, calibrating.noise(cell.shape.vocab_size, 2112))
    real = time.perf_counter() - begun
    found = paces[-1]
    foretold = spec.steps * found.seconds_per_step + cell.tokens * found.seconds_per_token
    assert 0.2 < (foretold + found.seconds_fixed) / real < 5  # the machine may be busy with others


def test_gpus_that_are_not_here_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "_gpus", lambda: 0)
    study = Study.from_dict({**SPACE, "resources": {"gpus_per_worker": 1}})
    with pytest.raises(UserError, match="none is here"):
        calibrating.calibrate(study)
