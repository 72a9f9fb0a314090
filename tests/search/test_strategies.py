"""Strategies by name: what each proposes, in bounds, in parallel, after a restart."""

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from raysweep.errors import UserError
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH, TrialHistory
from raysweep.search.strategies import STRATEGIES, make_sampler, search_space
from raysweep.study.shape import RunSize

CELL = RunSize(name="cell", params_active_non_embedding=1e7, tokens=2e8)
RATES, BATCHES = (1e-4, 1e-1), (2, 8)
SPACE = search_space(RATES, BATCHES)


def new_study(strategy: str, seed: int = 0, trials: int = 9, **change) -> optuna.Study:
    options = {
        "cell": CELL,
        "history": TrialHistory(),
        "learning_rate": RATES,
        "log2_batch": BATCHES,
        "sequence_length": 256,
        "trials": trials,
        "seed": seed,
    }
    return optuna.create_study(sampler=make_sampler(strategy, **(options | change)))


def loss_at(params: dict) -> float:
    u, v = np.log(params[LEARNING_RATE] / 5e-3), params[LOG2_BATCH] - 5
    return 3 + 0.05 * u**2 + 0.02 * v**2


def walk(study: optuna.Study, count: int) -> list[tuple[float, float]]:
    points = []
    for _ in range(count):
        trial = study.ask(SPACE)
        study.tell(trial, loss_at(trial.params))
        points.append((trial.params[LEARNING_RATE], trial.params[LOG2_BATCH]))
    return points


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_stays_in_bounds_and_repeats_with_its_seed(strategy: str):
    points = walk(new_study(strategy), 7)
    for learning_rate, log2_batch in points:
        assert RATES[0] <= learning_rate <= RATES[1]
        assert log2_batch in range(BATCHES[0], BATCHES[1] + 1)
        assert isinstance(log2_batch, int)
    assert len(set(points)) > 4
    assert walk(new_study(strategy), 7) == points


@pytest.mark.parametrize("strategy", ["qmc", "grid"])
def test_designs_use_no_seed(strategy: str):
    assert walk(new_study(strategy, seed=1), 6) == walk(new_study(strategy, seed=2), 6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rebuilt_study_goes_on_as_if_it_had_never_ended(strategy: str):
    whole = walk(new_study(strategy), 11)
    rebuilt = new_study(strategy)
    for learning_rate, log2_batch in whole[:8]:
        params = {LEARNING_RATE: learning_rate, LOG2_BATCH: log2_batch}
        rebuilt.add_trial(create_trial(params=params, distributions=SPACE, value=loss_at(params)))
    assert walk(rebuilt, 3) == whole[8:]


def test_designs_give_a_crashed_point_again_but_not_a_diverged_or_running_one():
    study = new_study("grid")
    first, second, third = (study.ask(SPACE) for _ in range(3))
    first.set_user_attr("status", "crashed")
    second.set_user_attr("status", "diverged")
    study.tell(first, state=TrialState.FAIL)
    study.tell(second, state=TrialState.FAIL)
    again = study.ask(SPACE)
    assert again.params == first.params
    assert study.ask(SPACE).params not in (first.params, second.params, third.params)


def test_a_grid_is_a_grid_of_about_as_many_points_as_trials():
    points = walk(new_study("grid", trials=9), 9)
    assert len(set(points)) == 9
    assert len({rate for rate, _ in points}) == 3
    assert len({batch for _, batch in points}) == 3
    assert len(set(walk(new_study("grid", trials=4), 12))) == 12  # and more follow


def test_low_discrepancy_points_cover_every_batch():
    points = walk(new_study("qmc"), 14)
    assert {batch for _, batch in points} == set(range(BATCHES[0], BATCHES[1] + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "seeds"), [("gp", 1), ("cmaes", 9)])
def test_model_based_strategies_close_in(strategy: str, seeds: int):
    losses = np.array(
        [
            [loss_at({LEARNING_RATE: rate, LOG2_BATCH: batch}) for rate, batch in walk(study, 14)]
            for study in (new_study(strategy, seed=seed, trials=14) for seed in range(seeds))
        ]
    )
    assert np.median(losses[:, 7:]) < np.median(losses[:, :4])


def test_float_bounds_search_the_batch_continuously():
    space = search_space(RATES, (2.0, 8.0))
    for strategy in STRATEGIES:
        study = new_study(strategy, log2_batch=(2.0, 8.0), trials=4)
        batches = []
        for _ in range(4):
            trial = study.ask(space)
            study.tell(trial, loss_at(trial.params))
            batches.append(trial.params[LOG2_BATCH])
        assert any(batch != round(batch) for batch in batches), strategy


def test_an_unknown_strategy_is_told_the_nearest_name():
    with pytest.raises(UserError, match="'ladder'"):
        new_study("lader")
    with pytest.raises(UserError, match="'cmaes'"):
        new_study("CMA-ES")


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": (0.0, 1.0)}, {"learning_rate": (1e-2, 1e-3)}, {"log2_batch": (5, 2)}],
)
def test_an_empty_range_is_a_user_error(change: dict):
    with pytest.raises(UserError, match="range"):
        new_study("ladder", **change)
