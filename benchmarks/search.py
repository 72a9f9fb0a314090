"""One cell's search, its trials answered by a recorded grid or a planted valley."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import optuna
from optuna.trial import TrialState

from benchmarks.recorded import RecordedGrid
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH, TrialHistory
from raysweep.search.strategies import make_sampler, search_space
from raysweep.study.shape import RunSize

Answer = Callable[[np.ndarray], tuple[np.ndarray, float]]
"""From the point asked for, (ln learning rate, ln batch tokens), to the one that ran and its loss;
nan where it diverged."""


class CellSearch:
    """A cell's Optuna study, registered in `history`."""

    def __init__(
        self,
        history: TrialHistory,
        cell: RunSize,
        bounds: tuple[tuple[float, float], tuple[float, float]],
        sequence_length: int,
        answer: Answer,
        *,
        strategy: str = "ladder",
        trials: int,
        seed: int,
    ) -> None:
        self.cell, self.count = cell, 0
        self._answer, self._length = answer, sequence_length
        sampler = make_sampler(
            strategy,
            cell=cell,
            history=history,
            learning_rate=bounds[0],
            log2_batch=bounds[1],
            sequence_length=sequence_length,
            trials=trials,
            seed=seed,
        )
        self.study = optuna.create_study(sampler=sampler)
        self.space = search_space(*bounds)
        history.register(cell, self.study, sequence_length=sequence_length)

    def run(self) -> tuple[np.ndarray, float]:
        """One more trial: where it ran, and its loss."""
        return self.finish(self.study.ask(self.space))

    def finish(self, trial: optuna.Trial) -> tuple[np.ndarray, float]:
        """The same of a trial that was asked for."""
        log_length = np.log(self._length)
        batch = trial.params[LOG2_BATCH] * np.log(2) + log_length
        ran, loss = self._answer(np.array([np.log(trial.params[LEARNING_RATE]), batch]))
        log2 = (ran[1] - log_length) / np.log(2)
        trial.set_user_attr("ran_at", [float(np.exp(ran[0])), float(log2)])
        if np.isfinite(loss):
            self.study.tell(trial, float(loss))
        else:
            trial.set_user_attr("status", "diverged")
            self.study.tell(trial, state=TrialState.FAIL)
        self.count += 1
        return ran, loss


def grid_search(
    history: TrialHistory,
    grid: RecordedGrid,
    *,
    strategy: str = "ladder",
    trials: int,
    seed: int,
) -> CellSearch:
    """The search of a recorded grid: a trial is the recorded run nearest to what was asked for."""

    def answer(point: np.ndarray) -> tuple[np.ndarray, float]:
        row = grid.nearest(point)
        return grid.point[row], float(grid.loss[row])

    return CellSearch(
        history,
        grid.cell,
        grid.bounds,
        grid.sequence_length,
        answer,
        strategy=strategy,
        trials=trials,
        seed=seed,
    )
