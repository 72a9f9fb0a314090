"""Search strategies by name: an Optuna sampler for one cell."""

from __future__ import annotations

import difflib
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

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
    also: Mapping[str, BaseDistribution] | None = None,
) -> BaseSampler:
    """The sampler of one cell's study.

    What it proposes depends on its arguments, the trial's number and the study's other trials
    alone, so that a study rebuilt from its rows goes on as if it had never ended.

    Args:
        strategy: one of `STRATEGIES`.
        cell: the cell that the study searches.
        history: what all cells know; only "ladder" reads it.
        learning_rate: bounds of the peak learning rate.
        log2_batch: bounds of log2 of the batch in sequences.
        sequence_length: tokens a sequence.
        trials: how many trials the cell is expected to get.
        seed: of all randomness. "grid" and "qmc" use none.
        also: distributions of further hyperparameters, by name.

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
    place = seed, zlib.crc32(cell.name.encode())
    if strategy == "tpe":
        return FreshSampler({}, lambda s: TPESampler(seed=s, n_startup_trials=startup), place)
    space |= also or {}
    if strategy == "gp":
        return FreshSampler(space, lambda s: _gp(s, startup), place)
    if strategy == "cmaes":
        return CmaSampler(space, _seed(place))
    return DesignSampler(space, strategy, trials=trials, seed=seed)


STRATEGIES = ("ladder", "tpe", "gp", "qmc", "random", "grid", "cmaes")


class FreshSampler(RelativeSampler):
    """A sampler of Optuna's, made anew for each trial with a seed of the trial's own."""

    def __init__(
        self,
        space: dict[str, BaseDistribution],
        make: Callable[[int], BaseSampler],
        place: tuple[int, ...],
    ) -> None:
        super().__init__(_searched(space), _seed(place))
        self._make, self._place = make, place
        self._fresh = make(_seed(place))

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Called first of all."""
        self._fresh = self._make(_seed((*self._place, trial.number)))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._fresh.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._fresh.sample_independent(study, trial, param_name, param_distribution)


class CmaSampler(RelativeSampler):
    """CMA-ES with margin (Hamano et al. 2022), played again from the study's trials at each ask.

    Each generation is the next finished trials. One that ran elsewhere than CMA-ES had it (several
    at once, a widened range, another run's) counts where it ran. Alone in its space, or the batch
    being fixed, a hyperparameter is drawn at random.
    """

    def __init__(self, space: dict[str, BaseDistribution], seed: int) -> None:
        super().__init__(_searched(space), seed)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point that CMA-ES has for a trial of this number."""
        from cmaes import CMAwM  # here, so that other strategies need no library of their own

        axes = [_Axis(distribution) for distribution in search_space.values()]
        if len(axes) < 2:
            return {}
        optimizer = CMAwM(
            mean=np.full(len(axes), 0.5),
            sigma=1 / 6,
            bounds=np.tile([0.0, 1.0], (len(axes), 1)),
            steps=np.array([axis.step for axis in axes]),
            seed=self._seed,
        )
        generation: list[tuple[np.ndarray, float]] = []
        for other in study.get_trials(deepcopy=False)[: trial.number]:
            asked, raw = optimizer.ask()
            if other.state == TrialState.COMPLETE and other.value is not None:
                at = np.array(
                    [a.unit(other.params[n]) for n, a in zip(search_space, axes, strict=True)]
                )
                as_asked = np.allclose(at, asked, rtol=0, atol=1e-9)
                generation.append((raw if as_asked else at, other.value))
            if len(generation) == optimizer.population_size:
                optimizer.tell(generation)
                generation = []
        point = optimizer.ask()[0]
        return {n: a.value(u) for n, a, u in zip(search_space, axes, point, strict=True)}


class _Axis:
    """A hyperparameter's range as the unit interval."""

    def __init__(self, distribution: BaseDistribution) -> None:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        self._integer = isinstance(distribution, IntDistribution)
        self._log = distribution.log
        self._bounds = distribution.low, distribution.high
        self._low, high = (self._scale(bound) for bound in self._bounds)
        self._width = high - self._low

    @property
    def step(self) -> float:
        """Between two values of an integer; 0 for a float."""
        return 1 / self._width if self._integer else 0.0

    def unit(self, value: float) -> float:
        return (self._scale(value) - self._low) / self._width

    def value(self, unit: float) -> float | int:
        scaled = self._low + float(unit) * self._width
        found = math.exp(scaled) if self._log else scaled
        low, high = self._bounds
        return min(max(round(found) if self._integer else found, low), high)

    def _scale(self, value: float) -> float:
        return math.log(value) if self._log else float(value)


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
        from scipy.stats import qmc  # 0.4 s of every other study's start

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


def _seed(place: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def _searched(space: Mapping[str, BaseDistribution]) -> dict[str, BaseDistribution]:
    """A space without what has one value only."""
    return {name: each for name, each in space.items() if not each.single()}


def _gp(seed: int, startup: int) -> BaseSampler:
    with warnings.catch_warnings():  # Optuna marks it as experimental; here it is chosen by name
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return GPSampler(seed=seed, n_startup_trials=startup)
