"""Pruners by name: what they stop, and that they stop nothing before the grace period."""

import optuna
import pytest
from optuna.trial import TrialState

from raysweep.search.early_stopping import REPORT_PERCENT, make_pruner
from raysweep.study.trials import EarlyStopping


def stopped_at(method: str, grace: float) -> dict[int, int]:
    """Number of each trial that was stopped, and the percentage at which; trial i is i-th best."""
    study = optuna.create_study(
        pruner=make_pruner(
            EarlyStopping.model_validate({"method": method, "grace_fraction": grace})
        )
    )
    stops = {}
    for i in range(9):
        trial = study.ask()
        for percent in range(REPORT_PERCENT, 100, REPORT_PERCENT):
            trial.report(2.0 + 0.1 * i + 1.0 / percent, percent)
            if trial.should_prune():
                stops[i] = percent
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, 2.0 + 0.1 * i)
    return stops


@pytest.mark.parametrize("method", ["asha", "median"])
@pytest.mark.parametrize("grace", [0.1, 0.5])
def test_poor_trials_stop_after_the_grace_period_and_the_best_never(method, grace) -> None:
    stops = stopped_at(method, grace)
    assert stops
    assert 0 not in stops
    assert 8 in stops
    assert min(stops.values()) >= 100 * grace


def test_without_early_stopping_nothing_stops() -> None:
    study = optuna.create_study(pruner=make_pruner(None))
    for value in (1.0, 100.0):
        trial = study.ask()
        trial.report(value, 50)
        assert not trial.should_prune()
