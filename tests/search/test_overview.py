"""What a team is told of a running study: its cost so far and to come, and the time left."""

import pandas as pd
import pytest

from raysweep.search.overview import overview
from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import StudyScheduler
from raysweep.study import Study
from tests.search.test_scheduler import rows_of

STUDY = {
    "study": "priced",
    "price_per_gpu_hour": 2.5,
    "scales": [
        {"name": "a", "d_model": 16, "layers": 1, "heads": 1},
        {"name": "b", "d_model": 32, "layers": 1, "heads": 1, "resources": {
            "workers": 2, "gpus_per_worker": 1}},
    ],
    "horizons": [{"tokens": 100_000}],
    "resources": {"gpus_per_worker": 0.5},
    "search": {"strategy": "qmc", "trials_per_cell": 2, "extend_edges": False},
}  # fmt: skip


def test_gpu_hours_cost_and_time_left_follow_the_clock() -> None:
    study = Study.from_dict(STUDY)
    small, large = study.cells
    now = [0.0]
    pool = ResourcePool({"n": {"CPU": 8.0, "GPU": 2.0}})
    scheduler = StudyScheduler(study, "data", pool, clock=lambda: now[0])
    assert overview(scheduler)["seconds_left"] is None
    first = scheduler.ask("t0")
    assert first is not None
    assert first.spec.cell == small
    now[0] = 3600.0
    scheduler.tell("t0", "finished", 3.0)
    for _ in range(50):  # nothing is left to guess
        scheduler.durations.add(small, 3600.0)
        scheduler.durations.add(large, 7200.0)
    second = scheduler.ask("t1")
    assert second is not None
    now[0] += 1800.0
    half = 0.5 if second.spec.cell == small else 2.0
    told = overview(scheduler)
    assert told["gpu_hours"] == pytest.approx(0.5 + half * 0.5)
    whole = 0.5 + 0.5 + 2 * 2 * 2  # two trials of an hour on half a GPU, two of two hours on two
    assert told["gpu_hours"] + told["gpu_hours_to_come"] == pytest.approx(whole, rel=0.02)
    assert told["cost"] == pytest.approx(2.5 * told["gpu_hours"])
    assert told["seconds_left"] == pytest.approx(3600 * told["gpu_hours_to_come"] / 2)
    assert told["gpu_use"] == half / 2
    assert told["cells"][small.name]["done"] == 1
    assert told["cells"][second.spec.cell.name]["running"] == 1

    rows = rows_of([(first, "finished", 3.0)]).assign(seconds_train=[7200.0])
    again = StudyScheduler(study, "data", pool, rows=pd.DataFrame(rows))
    assert overview(again)["gpu_hours"] == pytest.approx(1.0), "what earlier runs took counts"
