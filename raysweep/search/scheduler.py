"""The course of a study: which trial to start next, and what its outcome means for the rest.

No Ray here: a scheduler is asked and told, by the Tune searcher as by a simulation.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import pandas as pd
from optuna.trial import TrialState

from raysweep.results.schema import FINISHED, is_loss
from raysweep.scaling.optima.literature import literature_prior
from raysweep.search.cells import CellState, Point
from raysweep.search.durations import Durations
from raysweep.search.early_stopping import make_pruner
from raysweep.search.history import LEARNING_RATE, LOG2_BATCH, TrialHistory
from raysweep.search.resources import Bundle, Kind, Reservation, ResourcePool, kind_of
from raysweep.search.restore import (
    add_imported_trials,
    restore_bounds,
    restore_in_flight,
    restore_trials,
    widened,
)
from raysweep.search.strategies import make_sampler
from raysweep.search.value import next_cell, targets_of
from raysweep.study import Cell, Study, TrialSpec
from raysweep.study.plan import MAX_GRANTED

_log = logging.getLogger("raysweep")


TAIL = 6.0
"""Once what is left takes the cluster no longer than this many times the longest of its trials,
those that could end last and the widest go first: else the others would wait for them idle."""


MOST_IDLE = 0.03
"""Nodes are kept for a trial if they are to be idle no longer than this share of its own time, or
if it is urgent."""
URGENT = 2.5
"""A trial is urgent that takes more than the time left over this."""


@dataclass(frozen=True)
class Proposal:
    """A trial to start."""

    id: str
    number: int
    spec: TrialSpec
    repeat: bool
    """Whether it repeats the cell's best point with another seed, to measure noise."""


def bundles_of(cell: Cell) -> list[Bundle]:
    """What a trial of this cell occupies: a bundle a worker, or one for all where one process
    starts them."""
    resources = cell.resources
    bundles = resources.workers if cell.in_group else 1
    each = resources.workers / bundles
    bundle = {"CPU": each * resources.cpus_per_worker}
    if resources.gpus_per_worker:
        bundle["GPU"] = each * resources.gpus_per_worker
    return [bundle] * bundles


class StudyScheduler:
    """Asks each cell's Optuna study for trials, as long as they fit, what teaches most first:

    1. trials that an earlier run had in flight;
    2. a third of what each cell wants, smallest cells first, so that they learn from each other;
    3. the rest, smallest cells first too, until what is left takes the cluster no longer than a few
       of the longest trials: from then on those that could end last, then the widest, so that all
       end together.

    A trial that comes first and does not fit has the nodes kept on which it can start soonest.
    Later ones use them only if they are expected to be through by then.

    Args:
        study: what is to be searched.
        data_hash: of the corpus; part of every trial's key.
        pool: the resources of the cluster.
        rows: what the results folder holds of this study already; it is continued.
        imported: other rows that teach (imported sweeps), with the schema's columns.
        ranges: `widened` of the earlier runs that the rows are from.
        running: `in_flight` of the last of them: these trials are taken up before any other.
        clock: seconds, monotonic.
        told: names of the cells that were told of since the study was asked last: it then goes on
            as if it had never ended. None is a new run: crashed trials are run again, and the
            ranges of all cells are looked at.
    """

    def __init__(
        self,
        study: Study,
        data_hash: str,
        pool: ResourcePool,
        rows: pd.DataFrame | None = None,
        imported: pd.DataFrame | None = None,
        ranges: Mapping[str, Any] | None = None,
        running: Iterable[Mapping[str, Any]] = (),
        clock: Callable[[], float] = time.monotonic,
        *,
        told: Collection[str] | None = None,
    ) -> None:
        self.study = study
        self.pool = pool
        self.widenings = 0
        """How often a range was widened since the start."""
        self.changes = 0
        """How often a trial was handed out or was over since the start."""
        self.durations = Durations()
        self.clock = clock
        self._begun: dict[str, float] = {}
        """When the open trials were handed out, or began as was told since."""
        self._taken_up: set[str] = set()
        """Trials that an earlier run had begun."""
        self._full_at: tuple[int, int] | None = None
        """The changes, here and of the pool, after which nothing could be handed out."""
        self.data_hash = data_hash
        self._search = study.space.search
        space = study.space
        self._history = TrialHistory(literature_prior(space.without, space.literature))
        self._flops_spent = 0.0
        self._gpu_seconds = 0.0
        """Of trials that are over."""
        self._open: dict[str, tuple[CellState, Proposal, optuna.Trial]] = {}
        self._in_flight: dict[str, dict[str, Any]] = {}
        """Of the open trials."""
        self._waiting_said: set[str] = set()
        if imported is not None:
            add_imported_trials(self._history, imported)
        self.states = {cell.name: self._state(cell) for cell in study.cells}
        for state in self._ordered():
            state.branches = [self.states[c.name] for c in study.branches(state.cell)]
            for branch in state.branches:
                branch.stable_run = state
        if ranges:
            restore_bounds(study, ranges, self.states)
        if rows is not None:
            self._flops_spent = restore_trials(
                rows, study, data_hash, self.states, keep_crashes=told is not None
            )
            restore_in_flight(running, rows, study, data_hash, self.states)
            self._gpu_seconds = sum(
                _gpus(self.states[str(cell)].cell) * of_cell["seconds_train"].sum()
                for cell, of_cell in rows.groupby("cell")
                if cell in self.states
            )
            for state in self._ordered():
                self._attach_sampler(state)
            for state in self._ordered():
                if told is None or state.cell.name in told or self.done:
                    self._maybe_extend(state)

    @property
    def widened(self) -> dict[str, Any]:
        """The ranges that were widened so far, as plain values: for a scheduler that continues."""
        return widened(self.study, self.states)

    @property
    def in_flight(self) -> list[dict[str, Any]]:
        """Trials that were started and are not over, those that an earlier run has left included,
        as plain values: for a scheduler that continues."""
        waiting = [
            self._trial(state, point, seed)
            for state in self._ordered()
            for point, seed in state.unfinished
        ]
        return [*self._in_flight.values(), *map(_as_plain, waiting)]

    def open_keys(self) -> set[str]:
        """Keys of the trials that run, and of their branches; any thread may ask."""
        keys = set()
        for trial in list(self._in_flight.values()):
            spec = self.study.trial_of(trial, self.data_hash)
            keys |= {spec.key, *(branch.key for branch in self.study.branch_trials(spec))}
        return keys

    @property
    def running(self) -> int:
        return sum(len(state.running) for state in self._ordered())

    @property
    def workers(self) -> float:
        """How many trials of the smallest cell the cluster holds at once."""
        bundle = bundles_of(next(iter(self.states.values())).cell)[0]
        return min(self.pool.total(name) / amount for name, amount in bundle.items())

    @property
    def gpu_hours(self) -> tuple[float, float]:
        """GPU-hours that trials have taken so far, and what those that run and those that are
        wanted are expected to take yet."""
        now, spent, left = self.clock(), self._gpu_seconds, 0.0
        for trial, begun in self._begun.items():
            cell = self._open[trial][0].cell
            spent += _gpus(cell) * (now - begun)
            left += _gpus(cell) * max(0.0, begun + self.durations.of(cell) - now)
        for state in self._ordered():
            left += _gpus(state.cell) * self.durations.of(state.cell) * state.wanted
        return spent / 3600, left / 3600

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the study is expected to end, with the cluster as it is; None before the
        first trial is through."""
        if not self.durations.known:
            return None
        now = self.clock()
        work, _ = self._left()
        wanted = [state for state in self._ordered() if state.wanted]
        longest = max((self.durations.of(state.cell) for state in wanted), default=0.0)
        for trial, begun in self._begun.items():
            state = self._open[trial][0]
            rest = max(0.0, begun + self.durations.of(state.cell) - now)
            work += rest * self._share(state)
            longest = max(longest, rest)
        return max(work, longest)

    @property
    def done(self) -> bool:
        """Whether nothing runs and nothing can follow."""
        # Whether anything fits is not asked: workers may be gone, or not there yet.
        return not (self.running or self._affordable() or any(map(self.runnable, self._ordered())))

    def ask(self, trial_id: str) -> Proposal | None:
        """The next trial to start, or None while none fits or everything waits on running ones."""
        if self._full_at == (self.changes, self.pool.version):
            return None
        self._grant()
        runnable = [s for s in self._ordered() if self.runnable(s)]
        left, tail = self._left()
        ranked = self._ranked(runnable, left, ending=0 < left < TAIL * tail)
        self._give_back_groups(ranked)
        state, avoid = self._first_that_fits(ranked, left)
        if state is None and runnable and not self._open:
            # Nothing runs and nothing fits: hand one out all the same, and a cluster that grows
            # on demand will grow for it.
            state = runnable[0]
            self._say_waiting(state)
        if state is None:
            self._full_at = self.changes, self.pool.version
            return None
        if state.unfinished:
            self._taken_up.add(trial_id)
        proposal, trial = self._propose(state, trial_id)
        self.pool.acquire(trial_id, bundles_of(state.cell), avoid=avoid, force=True)
        self._begun[trial_id] = self.clock()
        self._open[trial_id] = (state, proposal, trial)
        state.running.add(proposal.number)
        self._in_flight[trial_id] = _as_plain(proposal.spec)
        self._flops_spent += state.trial_flops
        self.changes += 1
        return proposal

    def started(self, trial_id: str) -> None:
        """A trial that was handed out begins; until now its worker did, which later trials use too:
        that time is not the trial's."""
        if trial_id in self._begun:
            self._begun[trial_id] = self.clock()

    def _ranked(
        self, runnable: Sequence[CellState], left: float, *, ending: bool
    ) -> list[CellState]:
        """Cells of which a trial is wanted, the one that should start first first; `left` is the
        time that the cluster needs for all of them."""
        again = [s for s in runnable if s.unfinished]
        fresh = [s for s in runnable if not s.unfinished]
        # A third of what a cell wants at once, so that its trials learn from each other; more
        # only when a worker would idle otherwise. In the end, a third is all that comes first.
        teaching, more = [], []
        for state in fresh:
            had = len(state.running) + (state.concluded if ending else 0)
            (teaching if had < max(1, math.ceil(state.budget / 3)) else more).append(state)
        if ending:
            more.sort(key=lambda state: self._urgency(state, left), reverse=True)
        return [*again, *teaching, *more]

    def _urgency(self, state: CellState, left: float) -> tuple[float, float]:
        """The larger, the sooner a trial should start: one that will take much of what time is
        left; else a wide one, since nodes once emptied for it serve the next."""
        seconds = self.durations.of(state.cell)
        if _is_urgent(seconds, left):
            return math.inf, seconds
        return self._share(state), seconds

    def _left(self) -> tuple[float, float]:
        """Seconds that the cluster needs for what is to be started, and how long all but one of its
        trials could wait for the longest."""
        tail, work = 0.0, 0.0
        for state in self._ordered():
            if wanted := state.wanted:
                each, share = self.durations.of(state.cell), self._share(state)
                tail = max(tail, each * (1 - share))
                work += each * wanted * share
        return work, tail

    def _share(self, state: CellState) -> float:
        """Of the cluster that a trial of a cell takes, 0 to 1: all where it needs more."""
        bundles = bundles_of(state.cell)
        totals = {name: self.pool.total(name) for name in bundles[0]}
        shares = [
            len(bundles) * bundles[0][name] / total for name, total in totals.items() if total
        ]
        return min(1.0, max(shares, default=1.0))

    def _first_that_fits(
        self, ranked: Sequence[CellState], left: float
    ) -> tuple[CellState | None, frozenset[str]]:
        """The first cell of which a trial can start now, and nodes that it must leave alone. The
        first that does not fit has the nodes kept on which it can start soonest, if they need not
        idle long for it."""
        now = self.clock()
        ends = {
            trial: max(now, begun + self.durations.of(self._open[trial][0].cell))
            for trial, begun in self._begun.items()
        }
        kept: Reservation | None = None
        for displaced in self.pool.displaced.values():
            kept = kept or self.pool.reserve(displaced, ends, now)
        anywhere: frozenset[str] = frozenset()
        fitting: dict[tuple[Kind, frozenset[str]], bool] = {}
        for state in ranked:
            bundles = bundles_of(state.cell)
            kind = kind_of(bundles)
            through = kept is None or now + self.durations.of(state.cell) <= kept.ready
            for avoid in (kept.nodes if kept else anywhere, *([anywhere] if through else [])):
                if (kind, avoid) not in fitting:
                    fitting[kind, avoid] = self.pool.fits(bundles, avoid)
                if fitting[kind, avoid]:
                    return state, avoid
            if kept is None:
                kept = self.pool.reserve(bundles, ends, now)
                seconds = self.durations.of(state.cell)
                dear = kept is not None and kept.idle > MOST_IDLE * seconds
                kept = None if dear and not _is_urgent(seconds, left) else kept
        return None, anywhere

    def _give_back_groups(self, runnable: Sequence[CellState]) -> None:
        """Give up groups of workers that wait: where no trial of their kind is wanted, and where a
        trial that comes before those, as it teaches more, would fit then or nothing else runs."""
        if not (waiting := self.pool.waiting_groups):
            return
        kinds = [kind_of(bundles_of(state.cell)) for state in runnable]
        blocked = [k for k, s in zip(kinds, runnable, strict=True)
                   if not self.pool.fits(bundles_of(s.cell))]  # fmt: skip
        for group, bundles in waiting.items():
            kind = kind_of(bundles)
            if kind not in kinds or (blocked and kinds.index(blocked[0]) < kinds.index(kind)):
                self.pool.give_back(group)
                blocked = [k for k, s in zip(kinds, runnable, strict=True)
                           if not self.pool.fits(bundles_of(s.cell))]  # fmt: skip

    def waiting(self) -> dict[Kind, int]:
        """Trials that would start now if the cluster had room, by what they need."""
        waiting: Counter[Kind] = Counter()
        for state in self._ordered():
            bundles = bundles_of(state.cell)
            if self.runnable(state) and not self.pool.fits(bundles):
                useful = max(1, math.ceil(state.budget / 3)) - len(state.running)
                waiting[kind_of(bundles)] += max(0, min(useful, state.wanted))
        return {kind: count for kind, count in waiting.items() if count}

    def report(self, trial_id: str, percent: int, loss: float) -> bool:
        """Progress of a running trial: percent of its horizon, smoothed training loss.

        Returns whether early stopping wants it stopped; then tell `stopped` with this loss.
        """
        _, _, trial = self._open[trial_id]
        trial.report(loss, percent)
        return trial.should_prune()

    def tell(
        self,
        trial_id: str,
        status: str,
        loss: float | None = None,
        branches: Sequence[tuple[str, str, float | None]] = (),
    ) -> None:
        """The outcome of a trial: a row's status, and its loss if it finished; and of its branches
        by cell.

        A stopped trial is pruned to Optuna: its partial loss is not comparable, and no sampler but
        TPE looks at it.
        """
        if trial_id not in self._open:
            return
        self.changes += 1
        state, proposal, trial = self._open.pop(trial_id)
        del self._in_flight[trial_id]
        begun = self._begun.pop(trial_id)
        self._gpu_seconds += _gpus(state.cell) * (self.clock() - begun)
        self.pool.release(trial_id)
        state.running.discard(proposal.number)
        spec = proposal.spec
        point = Point(spec.learning_rate, math.log2(spec.batch_sequences), spec.also)
        for cell, its_status, its_loss in branches:
            self.states[cell].add_row(point, its_status, its_loss)
        usable = status == FINISHED and is_loss(loss)
        if status == FINISHED and not usable:
            status = "diverged"
        trial.set_user_attr("status", status)
        if usable:
            if trial_id not in self._taken_up:  # it began before
                self.durations.add(state.cell, self.clock() - begun)
            state.study.tell(trial, loss)
            state.finished_at.add(point.key)
        else:
            pruned = status == "stopped"
            state.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
        state.crashes = state.crashes + 1 if status == "crashed" else 0
        if status == "crashed":
            self._flops_spent -= state.trial_flops
            state.take_back(point)
            if state.given_up:
                _log.warning("cell %s given up: its trials crash", state.cell.name)
        self._maybe_extend(state)
        if self.done:  # but perhaps for cells that were over before the others taught so much
            for each in self._ordered():
                self._maybe_extend(each)

    def _ordered(self) -> Sequence[CellState]:
        """Cells by compute, smallest first (as the study has them)."""
        return list(self.states.values())

    def _affordable(self) -> list[CellState]:
        """Cells that FLOPs are left for, and that may be granted trials beyond their own."""
        limit = self._search.total_flops
        if limit is None:
            return []
        most = MAX_GRANTED * self._search.trials_per_cell
        return [
            s
            for s in self._ordered()
            if s.stable_run is None
            and self._flops_spent + s.trial_flops <= limit
            and s.concluded + len(s.running) < most
            and not s.given_up
        ]

    def _grant(self) -> None:
        """One more trial to the cell that the plan for the FLOPs left wants next, unless that still
        has some of its own to start.

        A cell whose trials do not fit now is passed over while others run."""
        affordable = self._affordable()
        fitting = [s for s in affordable if self.pool.fits(bundles_of(s.cell))]
        candidates = fitting or ([] if self._open else affordable)
        limit = self._search.total_flops
        if not candidates or limit is None:
            return
        had = [s.concluded + len(s.running) for s in candidates]
        most = MAX_GRANTED * self._search.trials_per_cell
        others = sum(s.wanted * s.trial_flops for s in affordable if s not in candidates)
        chosen = next_cell(
            self._history.surface(),
            [s.cell.size for s in candidates],
            had,
            [s.trial_flops for s in candidates],
            [most - count for count in had],
            [s.wanted for s in candidates],
            limit - self._flops_spent - others,
            targets_of(self.study),
        )
        if chosen is None or candidates[chosen].wanted:
            return
        state = candidates[chosen]
        # An earlier run may have gone past the budget already.
        had = len(state.searched) + len(state.running - state.repeats)
        state.granted += 1 + max(0, had - state.budget)

    def runnable(self, state: CellState) -> bool:
        """Whether a trial of this cell is wanted and within the budget of FLOPs."""
        limit = self._search.total_flops
        if limit is not None and self._flops_spent + state.trial_flops > limit:
            return False
        return state.wanted > 0 or self._repeats_wanted(state) > 0

    def _repeats_wanted(self, state: CellState) -> int:
        """Repeats of the best point, once the search of the cell is over."""
        wanted = self._search.repeats_at_optimum
        busy = state.wanted or state.running
        if not wanted or busy or state.best is None or state.stable_run is not None:
            return 0
        return wanted - (state.tried.get(state.point_of(state.best).key, 1) - 1)

    def _state(self, cell: Cell) -> CellState:
        search = self._search
        smallest = min(
            (c for c in self.study.cells if c.architecture == cell.architecture),
            key=lambda c: c.flops,
        )
        first = search.first_cell_trials if cell == self.study.stable_run(smallest) else None
        study = optuna.create_study(study_name=cell.name, pruner=make_pruner(search.early_stopping))
        served = (cell, *self.study.branches(self.study.stable_run(cell)))
        state = CellState(
            cell,
            search,
            first or search.trials_per_cell,
            study,
            min(c.tokens for c in served),
            self.study.flops(cell),
        )
        self._attach_sampler(state)
        return state

    def _attach_sampler(self, state: CellState) -> None:
        features = state.cell.size
        length = state.cell.sequence_length
        self._history.register(features, state.study, sequence_length=length)
        state.study.sampler = make_sampler(
            self._search.strategy,
            cell=features,
            history=self._history,
            learning_rate=state.bounds.learning_rate,
            log2_batch=state.bounds.log2_batch,
            sequence_length=length,
            trials=state.budget,
            seed=self.study.space.seed,
            also=state.further_distributions,
        )

    def _propose(self, state: CellState, trial_id: str) -> tuple[Proposal, optuna.Trial]:
        repeat = state.wanted == 0
        point: Point | None = None
        seed: int | None = None
        if again := state.unfinished or (state.crashed if not repeat else []):
            point, seed = again.pop(0)
            repeat = state.is_repeat(point)
        elif repeat:
            assert state.best is not None
            point = state.point_of(state.best)
        if point is not None:
            place = point.learning_rate, int(point.log2_batch)
            state.study.enqueue_trial(
                {LEARNING_RATE: place[0], LOG2_BATCH: place[1], **dict(point.also)},
                user_attrs={"ran_at": place},
            )
        trial = state.study.ask(state.distributions)
        if repeat:
            state.repeats.add(trial.number)
        rate, log2_batch = float(trial.params[LEARNING_RATE]), int(trial.params[LOG2_BATCH])
        point = Point(rate, log2_batch, state.further(trial))
        fresh = self.study.space.seed + state.next_seed(point)
        spec = self._trial(state, point, fresh if seed is None else seed)
        return Proposal(trial_id, trial.number, spec, repeat), trial

    def _trial(self, state: CellState, point: Point, seed: int) -> TrialSpec:
        rate, batch, also = point.learning_rate, 2 ** int(point.log2_batch), dict(point.also)
        return self.study.trial(state.cell, self.data_hash, rate, batch, seed, also)

    def _maybe_extend(self, state: CellState) -> None:
        """Widen a cell's range, its search being over, where its optimum lies at an edge."""
        search = self._search
        if not search.extend_edges or state.extensions >= search.max_extensions:
            return
        if state.stable_run or state.wanted or state.running or state.finished < 3:
            return
        length = state.cell.sequence_length
        low, high = state.bounds.log2_batch
        surface, tokens = self._history.surface(), (2.0**low * length, 2.0**high * length)
        found = (
            surface.edges(s.cell.size, state.bounds.learning_rate, tokens)
            for s in (state, *state.branches)
        )
        edges = tuple(dict.fromkeys(edge for of_cell in found for edge in of_cell))
        if not edges or not state.extend(edges):
            return
        state.extensions += 1
        self.widenings += 1
        where = ", ".join(f"{name} {side}" for name, side in edges)
        _log.info("cell %s: optimum at the edge (%s): range widened", state.cell.name, where)
        self._attach_sampler(state)
        for other in self._ordered():  # what is at the edge here will be so at the larger scales
            later = other.cell.flops > state.cell.flops
            if later and other.cell.architecture == state.cell.architecture:
                untouched = not other.running and not other.study.get_trials(deepcopy=False)
                if untouched and not other.stable_run and other.extend(edges):
                    self._attach_sampler(other)

    def _say_waiting(self, state: CellState) -> None:
        name = state.cell.name
        if name not in self._waiting_said:
            self._waiting_said.add(name)
            needs = bundles_of(state.cell)
            _log.warning(
                "cell %s needs %d x %s, more than the cluster has now: waiting for it to grow",
                name,
                len(needs),
                dict(needs[0]),
            )


def _is_urgent(seconds: float, left: float) -> bool:
    return URGENT * seconds > left


def _gpus(cell: Cell) -> float:
    return cell.resources.workers * cell.resources.gpus_per_worker


def _as_plain(spec: TrialSpec) -> dict[str, Any]:
    return {"trial_key": spec.key, "also": {}} | spec.config()
