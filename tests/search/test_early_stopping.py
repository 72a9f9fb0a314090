"""Pruners by name: what they stop, and that they stop nothing before the grace period."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from raysweep.results import Results
from raysweep.search.early_stopping import REPORT_PERCENT, make_pruner
from raysweep.search.run import run
from raysweep.study import Study
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


@pytest.mark.ray
def test_early_stopping_leaves_rows_with_a_reason(tmp_path: Path) -> None:
    changes = (
        "architectures={dense: {}}",
        "scales=[{d_model: 8, layers: 1, heads: 1}]",
        "horizons=[{tokens: 100000}]",
        "search.strategy=random",
        "search.trials_per_cell=6",
        "search.learning_rate={low: 1e-6, high: 1e-1}",
        "search.early_stopping={method: asha, grace_fraction: 0.1}",
    )
    space = Path(__file__).resolve().parents[2] / "search_spaces/smoke.yaml"
    run(Study.load(space, changes), results_uri=str(tmp_path / "results"))
    frame = Results.open(tmp_path / "results").to_pandas()
    stopped = frame[frame["status"] == "stopped"]
    assert 1 <= len(stopped) < len(frame)
    assert stopped["reason"].str.contains("early stopping").all()
    assert stopped["loss"].isna().all()
    assert (stopped["tokens_seen"] < 100_000).all()
    finished = frame[frame["status"] == "finished"]
    assert stopped["train_loss"].median() > finished["train_loss"].median()
