"""A study whose driver is gone: every trial that was in flight is asked for again."""

import json

import numpy as np
import pandas as pd
import pytest

from raysweep.search.resources import ResourcePool
from raysweep.search.scheduler import Proposal, StudyScheduler
from raysweep.study import Study
from tests.search.test_scheduler import planted, rows_of


def make_study(strategy: str, cells: int, **search) -> Study:
    scales = [{"params": 2e5 * 1.6**i} for i in range(cells // 2)]
    return Study.from_dict(
        {
            "study": "left",
            "model": {"sequence_length": 64},
            "scales": scales,
            "horizons": [{"tokens_per_param": 20}, {"tokens_per_param": 60}],
            "search": {
                "strategy": strategy,
                "trials_per_cell": 12,
                "learning_rate": {"low": 1e-4, "high": 1e-1},
                "batch_sequences": {"low": 4, "high": 256},
                **search,
            },
        }
    )


def fill(scheduler: StudyScheduler, name: str) -> list[Proposal]:
    """All that can be started now."""
    found = []
    while (proposal := scheduler.ask(f"{name}{len(found)}")) is not None:
        found.append(proposal)
    return found


def cut_off(
    study: Study, workers: int, finished: int
) -> tuple[StudyScheduler, list[Proposal], pd.DataFrame]:
    """A study on so many workers after so many trials: it, the trials in flight, and the rows."""
    scheduler = StudyScheduler(study, "data", ResourcePool({"n": {"CPU": float(workers)}}))
    rng = np.random.default_rng(1)
    running, log = fill(scheduler, "t"), []
    while len(log) < finished:
        proposal = running.pop(int(rng.integers(len(running))))
        status, loss = planted(proposal)
        scheduler.tell(proposal.id, status, loss)
        log.append((proposal, status, loss))
        running += fill(scheduler, f"t{len(log)}-")
    return scheduler, running, rows_of(log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "cells", "workers", "finished"),
    [
        *((strategy, 6, 16, 20) for strategy in ("ladder", "gp", "qmc", "random")),
        ("tpe", 20, 64, 80),
    ],
)
def test_all_that_was_in_flight_is_asked_again_first(
    strategy: str, cells: int, workers: int, finished: int
) -> None:
    """Also if the driver that took it up is gone before it has handed all of it out."""
    study = make_study(strategy, cells)
    pool = {"n": {"CPU": float(workers)}}
    scheduler, running, rows = cut_off(study, workers, finished)
    kept = json.loads(json.dumps(scheduler.in_flight))
    assert {trial["trial_key"] for trial in kept} == {p.spec.key for p in running}
    ranges = scheduler.widened
    second = StudyScheduler(study, "data", ResourcePool(pool), rows, ranges=ranges, running=kept)
    assert [second.ask(f"u{i}") is not None for i in range(5)] == [True] * 5
    kept = json.loads(json.dumps(second.in_flight))
    third = StudyScheduler(study, "data", ResourcePool(pool), rows, ranges=ranges, running=kept)
    again = [p.spec.key for p in fill(third, "v")][: len(running)]
    assert set(again) == {p.spec.key for p in running}


def test_what_the_search_space_rules_out_or_is_over_is_not_taken_up() -> None:
    study = make_study("ladder", 2)
    scheduler, running, rows = cut_off(study, 4, 3)
    kept = scheduler.in_flight
    over = running.pop()
    rows = pd.concat([rows, rows_of([(over, "finished", 3.0)])])
    damaged = [{}, {"cell": "none"}, *kept]
    narrow = make_study("ladder", 2, learning_rate={"low": 2e-2, "high": 3e-2})
    for now, expected in ((study, {p.spec.key for p in running}), (narrow, set())):
        one = ResourcePool({"n": {"CPU": 1.0}})
        left = StudyScheduler(now, "data", one, rows, running=damaged).in_flight
        within = {p.spec.key for p in running if 2e-2 <= p.spec.learning_rate <= 3e-2}
        assert {t["trial_key"] for t in left} == (expected or within)
    other = StudyScheduler(study, "other data", ResourcePool({}), running=kept)
    assert other.in_flight == []


def test_a_repeat_in_flight_stays_a_repeat() -> None:
    study = make_study("qmc", 2, trials_per_cell=3, repeats_at_optimum=2, extend_edges=False)
    scheduler, _, rows = cut_off(study, 1, 3)
    (running,) = (p for p in scheduler.in_flight)
    assert running["seed"] == 1
    second = StudyScheduler(
        study, "data", ResourcePool({"n": {"CPU": 1.0}}), rows, running=[running]
    )
    proposal = second.ask("again")
    assert proposal is not None
    assert proposal.repeat
    assert proposal.spec.key == running["trial_key"]


def test_a_crashed_trial_is_tried_again_at_its_point_by_the_next_run() -> None:
    study = make_study("ladder", 2)
    _, running, rows = cut_off(study, 4, 3)
    crashed = rows_of([(running[0], "crashed", None)])
    second = StudyScheduler(
        study, "data", ResourcePool({"n": {"CPU": 1.0}}), pd.concat([rows, crashed])
    )
    proposal = second.ask("again")
    assert proposal is not None
    assert proposal.spec.key == running[0].spec.key
