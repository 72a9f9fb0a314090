"""What is known and wanted of one cell while a study runs: its Optuna study, budget and range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from raysweep.results.schema import FINISHED
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH, where_run
from raysweep.search.strategies import search_space
from raysweep.study import Cell, Search

MIN_STEPS = 8
"""A batch so large that a trial would take fewer steps than this is never proposed."""
CRASHES_ALLOWED, CRASHES_AFTER_SUCCESS = 3, 10
"""A cell whose trials crash this often in a row in one run is given up: while none has finished,
and later."""
EXTENSION_TRIALS = 2
"""Trials that a widened range adds to a cell's budget."""
CONCLUDED = (FINISHED, "diverged", "stopped", "out_of_memory")
"""Statuses of trials that told something: all but crashed ones."""


class Point(NamedTuple):
    """Where in its cell a trial runs."""

    learning_rate: float
    log2_batch: float
    """Of the batch in sequences."""
    also: tuple[tuple[str, float], ...] = ()
    """Names and values of further hyperparameters."""

    @property
    def key(self) -> tuple[str, float]:
        """Equal for runs that differ in their seed alone."""
        further = "".join(f" {name} {value:.9e}" for name, value in sorted(self.also))
        return f"{self.learning_rate:.9e}{further}", self.log2_batch


@dataclass
class Bounds:
    """The range searched: learning rate, and batch as log2 of sequences."""

    learning_rate: tuple[float, float]
    log2_batch: tuple[int, int]

    def __contains__(self, point: Point) -> bool:
        low, high = self.learning_rate
        inside = low * (1 - 1e-9) <= point.learning_rate <= high * (1 + 1e-9)
        return inside and self.log2_batch[0] <= point.log2_batch <= self.log2_batch[1]


@dataclass
class CellState:
    """One cell in the course of a study."""

    cell: Cell
    search: Search
    trials_wanted: int
    study: optuna.Study
    least_tokens: int
    """The shortest horizon that its trials serve."""
    flops: float
    """Training FLOPs that a row of this cell costs."""
    bounds: Bounds = field(init=False)
    stable_run: CellState | None = field(default=None, repr=False, compare=False)
    """The cell whose trials make this one's rows, where that is another (WSD branches)."""
    branches: list[CellState] = field(default_factory=list)
    """The cells that trials of this one serve besides."""
    unfinished: list[tuple[Point, int]] = field(default_factory=list)
    """Trials of an earlier run, with their seeds, to be taken up before any other: those that were
    in flight when it ended, and those whose branches' rows stand without their own."""
    crashed: list[tuple[Point, int]] = field(default_factory=list)
    """Trials of earlier runs that crashed: tried again before new points are."""
    extensions: int = 0
    granted: int = 0
    """Trials beyond the budget, paid from the study's FLOPs because they are worth most here."""
    crashes: int = 0
    """In a row."""
    running: set[int] = field(default_factory=set)
    """Numbers of running trials of `study`."""
    repeats: set[int] = field(default_factory=set)
    """Numbers of trials, of all, that give a point another seed: they are no part of the search."""
    tried: dict[tuple[str, float], int] = field(default_factory=dict)
    """How often each (learning rate, log2 batch) was given out: the seed of the next such trial."""
    finished_at: set[tuple[str, float]] = field(default_factory=set)
    """The points where a trial has finished."""

    def __post_init__(self) -> None:
        self.bounds = self._range()

    def _range(self) -> Bounds:
        """The search space's range, within what this cell can run."""
        rate, batch = self.search.learning_rate, self.search.batch_sequences
        high = min(int(math.log2(batch.high)), self._largest_log2_batch())
        low = min(max(int(math.log2(batch.low)), self._smallest_log2_batch()), high)
        return Bounds((rate.low, rate.high), (low, high))

    @property
    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        found = search_space(self.bounds.learning_rate, self.bounds.log2_batch)
        return found | self.further_distributions

    @property
    def further_distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """Of the further hyperparameters."""
        also = self.search.also.items()
        return {name: FloatDistribution(x.low, x.high, log=x.log) for name, x in also}

    def trials(self, *statuses: str) -> list[FrozenTrial]:
        """Concluded trials of these statuses, in order."""
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.user_attrs.get("status") in statuses]

    @property
    def finished(self) -> int:
        return len(self.trials(FINISHED))

    @property
    def concluded(self) -> int:
        """Trials that told something."""
        return len(self.trials(*CONCLUDED))

    @property
    def searched(self) -> list[FrozenTrial]:
        """Concluded trials that the budget counts: all but repeats."""
        return [t for t in self.trials(*CONCLUDED) if t.number not in self.repeats]

    @property
    def trial_flops(self) -> float:
        """Training FLOPs of one trial of this cell, with its branches."""
        return self.flops + sum(branch.flops for branch in self.branches)

    @property
    def budget(self) -> int:
        if self.stable_run is not None:
            return self.stable_run.budget
        return self.trials_wanted + EXTENSION_TRIALS * self.extensions + self.granted

    @property
    def wanted(self) -> int:
        """Trials still to be started in search of the optimum.

        The budget counts finished trials; a cell where many diverge gets at most twice as many.
        """
        if self.stable_run is not None or self.given_up:
            return 0
        finished = sum(t.user_attrs["status"] == FINISHED for t in self.searched)
        short = min(self.budget - finished, 2 * self.budget - len(self.searched))
        short -= len(self.running - self.repeats)
        return max(0, short, len(self.unfinished))

    @property
    def given_up(self) -> bool:
        return self.crashes >= (CRASHES_AFTER_SUCCESS if self.finished else CRASHES_ALLOWED)

    @property
    def best(self) -> FrozenTrial | None:
        done = [t for t in self.trials(FINISHED) if t.state is TrialState.COMPLETE]
        return min(done, key=lambda t: t.value or math.inf, default=None)

    def is_repeat(self, point: Point) -> bool:
        """Whether an earlier run's trial at this very point repeated it: a trial has finished
        there, and repeats are wanted. Any other was part of the search, which may come back to a
        point: were it not counted, a search that keeps to one point would never end."""
        few = 1 <= self.tried.get(point.key, 0) <= self.search.repeats_at_optimum
        return few and point.key in self.finished_at

    def point_of(self, trial: FrozenTrial) -> Point:
        """Where a trial ran."""
        place = where_run(trial)
        assert place is not None
        return Point(place[0], int(place[1]), self.further(trial))

    def further(self, trial: FrozenTrial | optuna.Trial) -> tuple[tuple[str, float], ...]:
        """The values of a trial's further hyperparameters."""
        return tuple((name, float(trial.params[name])) for name in self.search.also)

    def next_seed(self, point: Point) -> int:
        """How many trials were given out at this very point; counts this one."""
        used = self.tried.get(point.key, 0)
        self.tried[point.key] = used + 1
        return used

    @property
    def widened(self) -> dict[str, Any] | None:
        """How far the range was widened, for `restore_bounds`; None where it was not."""
        if self.bounds == self._range():
            return None
        return asdict(self.bounds) | {"extensions": self.extensions}

    def restore_bounds(self, kept: Mapping[str, Any]) -> None:
        """Search the range again that an earlier run had widened."""
        rate, batch = kept["learning_rate"], kept["log2_batch"]
        self.bounds = Bounds((float(rate[0]), float(rate[1])), (int(batch[0]), int(batch[1])))
        self.extensions = min(int(kept["extensions"]), self.search.max_extensions)

    def take_back(self, point: Point) -> None:
        """Undo `next_seed` for a trial that crashed: its seed is free again."""
        self.tried[point.key] = max(0, self.tried.get(point.key, 0) - 1)

    def add_row(self, point: Point, status: str, loss: float | None) -> int:
        """Rebuild one trial of an earlier run, or one that runs elsewhere (`running`); its number.
        It may lie outside the range searched now."""
        number = len(self.study.get_trials(deepcopy=False))
        if self.is_repeat(point):
            self.repeats.add(number)
        self.next_seed(point)
        if status == FINISHED:
            self.finished_at.add(point.key)
        rate, batch = self.bounds.learning_rate, self.bounds.log2_batch
        params = {
            LEARNING_RATE: min(max(point.learning_rate, rate[0]), rate[1]),
            LOG2_BATCH: min(max(round(point.log2_batch), batch[0]), batch[1]),
        }
        further = dict(point.also)
        for name, given in self.search.also.items():
            params[name] = min(max(further.get(name, given.low), given.low), given.high)
        place = point[:2]
        states = {FINISHED: TrialState.COMPLETE, "running": TrialState.RUNNING}
        self.study.add_trial(
            optuna.create_trial(
                params=params,
                distributions=self.distributions,
                value=loss if status == FINISHED else None,
                state=states.get(status, TrialState.FAIL),
                user_attrs={"status": status, "ran_at": place, "asked_at": place},
            )
        )
        return number

    def extend(self, edges: tuple[tuple[str, str], ...]) -> bool:
        """Widen the range by a factor of four at these edges, within the hard limits.

        Returns whether any bound moved.
        """
        rate, batch = self.search.learning_rate, self.search.batch_sequences
        (low, high), (small, large) = self.bounds.learning_rate, self.bounds.log2_batch
        if ("learning_rate", "low") in edges:
            low = max(rate.hard_low, low / 4)
        if ("learning_rate", "high") in edges:
            high = min(rate.hard_high, high * 4)
        if ("batch", "low") in edges:
            limit = max(int(math.log2(batch.hard_low)), self._smallest_log2_batch())
            small = min(small, max(limit, small - 2))
        if ("batch", "high") in edges:
            limit = min(int(math.log2(batch.hard_high)), self._largest_log2_batch())
            large = max(large, min(limit, large + 2))
        wider = Bounds((low, high), (small, large))
        moved = wider != self.bounds
        for state in (self, *self.branches):
            state.bounds = wider
        return moved

    def _largest_log2_batch(self) -> int:
        sequences = self.least_tokens / MIN_STEPS / self.cell.sequence_length
        return max(self._smallest_log2_batch(), int(math.log2(max(1.0, sequences))))

    def _smallest_log2_batch(self) -> int:
        """Every worker needs a sequence."""
        return int(math.log2(self.cell.resources.workers))
