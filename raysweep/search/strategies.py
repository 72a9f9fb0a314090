"""Search strategies by name: an Optuna sampler for one cell."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from raysweep.errors import UserError
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH, TrialHistory
from raysweep.search.sampler import LadderSampler, RelativeSampler
from raysweep.study.shape import RunSize

Range = tuple[float, float]


def search_space(learning_rate: Range, log2_batch: Range) -> dict[str, BaseDistribution]:
    """The distributions to ask a cell's study with: `study.ask(search_space(...))`.

    The batch is an integer power of two of sequences; bounds given as floats search it
    continuously.
    """
    low, high = learning_rate
    if not 0 < low <= high:
        raise UserError(f"learning_rate range ({low}, {high}) must be positive and ascending")
    if not log2_batch[0] <= log2_batch[1]:
        raise UserError(f"log2_batch range {log2_batch} must ascend")
    batch: BaseDistribution
    if all(isinstance(bound, int | np.integer) for bound in log2_batch):
        batch = IntDistribution(int(log2_batch[0]), int(log2_batch[1]))
    else:
        batch = FloatDistribution(*log2_batch)
    return {LEARNING_RATE: FloatDistribution(low, high, log=True), LOG2_BATCH: batch}


def make_sampler(
    strategy: str,
    *,
    cell: RunSize,
    history: TrialHistory,
    learning_rate: Range,
    log2_batch: Range,
    sequence_length: int,
    trials: int,
    seed: int,
) -> BaseSampler:
    """The sampler of one cell's study.

    Args:
        strategy: one of `STRATEGIES`.
        cell: the cell that the study searches.
        history: what all cells know; only "ladder" reads it.
        learning_rate: bounds of the peak learning rate.
        log2_batch: bounds of log2 of the batch in sequences.
        sequence_length: tokens a sequence.
        trials: how many trials the cell is expected to get.
        seed: of all randomness. "grid" and "qmc" use none.

    Raises:
        UserError: no strategy of that name, or a range that is empty.
    """
    space = search_space(learning_rate, log2_batch)
    if strategy not in STRATEGIES:
        near = difflib.get_close_matches(strategy.lower(), STRATEGIES, n=1, cutoff=0.0)
        raise UserError(
            f"unknown strategy {strategy!r}: did you mean {near[0]!r}? ({', '.join(STRATEGIES)})"
        )
    # Model-based strategies spend a third of a short budget, or Optuna's usual 10, on looking
    # around.
    startup = max(1, min(10, trials // 3))
    if strategy == "ladder":
        return LadderSampler(cell, history, space, sequence_length, seed=seed)
    if strategy == "tpe":
        return TPESampler(seed=seed, n_startup_trials=startup)
    if strategy == "gp":
        return _quietly(lambda: GPSampler(seed=seed, n_startup_trials=startup))
    if strategy == "cmaes":
        return _quietly(
            lambda: CmaEsSampler(
                seed=seed,
                independent_sampler=RandomSampler(seed=seed),
                with_margin=isinstance(space[LOG2_BATCH], IntDistribution),
                warn_independent_sampling=False,
            )
        )
    return DesignSampler(space, strategy, trials=trials, seed=seed)


STRATEGIES = ("ladder", "tpe", "gp", "qmc", "random", "grid", "cmaes")
RESTARTING = ("tpe", "gp", "cmaes")
"""Strategies whose random stream begins anew when they are made again: give them another seed then.
The others' proposals depend on seed and history alone."""


class DesignSampler(RelativeSampler):
    """Walks a fixed sequence of points: "grid", "qmc" (low discrepancy), or "random" ones.

    The next point is the first of the sequence that no trial of the study has been given, so a
    resumed or parallel study goes on where it stood; points of crashed trials are given again.
    After a grid's last point the low-discrepancy sequence follows.
    """

    def __init__(
        self, space: dict[str, BaseDistribution], design: str, *, trials: int, seed: int
    ) -> None:
        super().__init__(space, seed)
        self._design = design
        self._trials = trials

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The first point of the design that is still free."""
        taken: dict[tuple[float, float], int] = {}
        for other in study.get_trials(deepcopy=False):
            told = other.user_attrs.get("status") in ("diverged", "out_of_memory")
            crashed = other.state == TrialState.FAIL and not told
            if other.number != trial.number and not crashed and LOG2_BATCH in other.params:
                point = _key(other.params[LEARNING_RATE], other.params[LOG2_BATCH])
                taken[point] = taken.get(point, 0) + 1
        for learning_rate, log2_batch in self._points():
            point = _key(learning_rate, log2_batch)
            if not taken.get(point):
                return {LEARNING_RATE: learning_rate, LOG2_BATCH: log2_batch}
            taken[point] -= 1  # an integer batch can make a sequence repeat itself
        raise AssertionError("designs never end")

    def _points(self) -> Iterator[tuple[float, float]]:
        rate, batch = self._space[LEARNING_RATE], self._space[LOG2_BATCH]
        assert isinstance(rate, FloatDistribution)
        assert isinstance(batch, FloatDistribution | IntDistribution)
        integer = isinstance(batch, IntDistribution)

        def place(p: float, q: float) -> tuple[float, float]:
            log_rate = math.log(rate.low) + p * (math.log(rate.high) - math.log(rate.low))
            learning_rate = min(max(math.exp(log_rate), rate.low), rate.high)
            if integer:
                return learning_rate, min(
                    batch.high, batch.low + int(q * (batch.high - batch.low + 1))
                )
            return learning_rate, batch.low + q * (batch.high - batch.low)

        if self._design == "grid":
            levels = batch.high - batch.low + 1 if integer else math.inf
            yield from (place(p, q) for p, q in _grid(self._trials, levels))
        if self._design == "random":
            rng = np.random.default_rng(self._seed)
            while True:
                yield place(*rng.random(2))
        sequence = qmc.Halton(d=2, scramble=False)
        sequence.fast_forward(1)  # the first point is a corner
        while True:
            yield place(*sequence.random(1)[0])


def _grid(trials: int, levels: float) -> list[tuple[float, float]]:
    """About `trials` cell-centred points of the unit square, at most `levels` batches."""
    batches = int(min(levels, max(1, math.isqrt(trials))))
    rates = max(1, math.ceil(trials / batches))
    return [((i + 0.5) / rates, (j + 0.5) / batches) for i in range(rates) for j in range(batches)]


def _key(learning_rate: float, log2_batch: float) -> tuple[float, float]:
    return round(math.log(learning_rate), 9), round(float(log2_batch), 9)


def _quietly(make: Callable[[], BaseSampler]) -> BaseSampler:
    """Optuna marks some samplers as experimental; here they are chosen by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make()
