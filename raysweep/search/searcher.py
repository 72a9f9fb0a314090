"""The scheduler as Ray Tune sees it: a searcher, and a scheduler for early stopping."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raysweep.search.autoscaler import AutoscalerRequests, PlacementRequest
from raysweep.search.interruption import INTERRUPTED, Interruption, tell_trials_to_leave
from raysweep.search.ray_internals import draining_nodes, drop_cached_actors, give_back_orphans
from raysweep.search.resources import Bundle
from raysweep.search.scheduler import StudyScheduler, bundles_of
from raysweep.study.cells import Resources
from raysweep.training.ray_train import end_groups

NODES_SECONDS = 5.0
"""Least time between two looks at the cluster's nodes."""


class StudySearcher(Searcher):
    """Hands Tune the scheduler's proposals as trial configs, and tells it their outcomes.

    A config holds plain values only: those of `TrialSpec.config`; of trials on several workers the
    `group` that they run in, and whether it must be on `one_node`; and where groups need whole
    nodes, the `node` that the pool has booked: Ray by itself would spread small trials over all
    nodes, and gather on one the processes that wait for groups.
    """

    def __init__(
        self,
        scheduler: StudyScheduler,
        nodes: Callable[[], Mapping[str, Bundle]],
        interruption: Interruption,
        start_group: Callable[[str, Resources, bool], Any],
        drop_cached: Callable[[], None],
    ) -> None:
        super().__init__(metric="loss", mode="min")
        self._start_group, self._drop_cached = start_group, drop_cached
        self.scheduler = scheduler
        self._nodes = nodes
        self._interruption = interruption
        self._autoscaler = AutoscalerRequests(PlacementRequest)
        self._looked = -math.inf
        self._has_groups = any(len(bundles_of(cell)) > 1 for cell in scheduler.study.cells)
        self.groups: dict[str, Any] = {}
        """The groups of workers there are: they end with their handles here."""
        self._made: dict[str, Callable[[], Any]] = {}
        """How each is started."""
        self._asked: dict[Any, str] = {}
        """Groups that were asked where they are, by the answer that will come."""
        self._where: dict[str, list[str]] = {}
        """The nodes of groups, as they said last."""
        self._going: frozenset[str] = frozenset()
        """Nodes that are about to go."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next trial; None while nothing fits or all waits on running trials."""
        if self._interruption.signum is not None:
            return Searcher.FINISHED
        if self.scheduler.done:
            self._autoscaler.withdraw()
            return Searcher.FINISHED
        proposal = self.scheduler.ask(trial_id)
        pool = self.scheduler.pool
        if ended := pool.take_ended():
            end_groups([self.groups.pop(group) for group in ended if group in self.groups])
            for group in ended:
                self._where.pop(group, None)
                self._made.pop(group, None)
        if proposal is None:
            return None
        spec = proposal.spec
        config = spec.config()
        if (group := pool.group_of(trial_id)) is not None:
            one_node = pool.on_one_node(bundles_of(spec.cell))
            config |= {"group": group, "one_node": one_node}
            if group not in self.groups:
                made = functools.partial(self._start_group, group, spec.cell.resources, one_node)
                self._made[group], self.groups[group] = made, made()
        if len(pool.nodes) > 1 and self._has_groups and (node := pool.nodes_of(trial_id)[0]):
            config["node"] = node
        return config

    def look(self, trials: Sequence[Trial]) -> None:
        """See, now and then, which nodes there are, and ask for more where trials wait for room.

        Tune asks for no suggestion while too many trials of its own wait, so it must not be
        `suggest` that looks: then requests that were granted would keep the very room that these
        trials wait for. While one waits nothing is asked for besides.
        """
        now = time.monotonic()
        if now - self._looked < NODES_SECONDS:
            return
        self._looked = now
        scheduler = self.scheduler
        scheduler.pool.update(self._nodes())
        self._find_groups()
        self._leave_nodes()
        if any(trial.status == Trial.PENDING for trial in trials):
            self._autoscaler.withdraw()
        else:
            self._autoscaler.update(scheduler.waiting(), scheduler.pool)

    def _find_groups(self) -> None:
        """Learn on which nodes Ray has put groups: it need not be those that the pool had in mind.
        Answers are for the next look. A group whose host was lost is started anew, or found if its
        trial has done so already."""
        asked = list(self._asked)
        for answer in ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else ():
            group = self._asked.pop(answer)
            if group not in self.groups:
                continue
            try:
                self._where[group] = ray.get(answer)
            except RayError:
                self.groups[group] = self._made[group]()
                continue
            self.scheduler.pool.found(group, self._where[group])
        if self.groups:
            give_back_orphans()
        waiting = set(self._asked.values())
        for group, host in self.groups.items():
            if group not in waiting:
                self._asked[host.where.remote()] = group
        # The room that the pool has found for a group may still be held by an actor that Tune
        # keeps for trials to come.
        if any(not self.scheduler.pool.nodes.issuperset(nodes) for nodes in self._where.values()):
            self._drop_cached()

    def _leave_nodes(self) -> None:
        """Have trials on nodes that are about to go leave a checkpoint now, and go on elsewhere."""
        going = draining_nodes()
        fresh, self._going = going - self._going, going
        if not fresh:
            return
        tell_trials_to_leave(going)
        for group, host in self.groups.items():
            if fresh & set(self._where.get(group, ())):
                host.leave.remote()

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Called once a trial is over for good; retries do not show here."""
        if error:
            self.scheduler.tell(trial_id, "crashed")
        elif not result or "status" not in result:
            self.scheduler.tell(trial_id, "stopped")
        elif result["status"] != INTERRUPTED:  # else it is not over: the next run takes it up
            branches = result.get("branches", ())
            self.scheduler.tell(trial_id, result["status"], result.get("loss"), branches)

    def __deepcopy__(self, memo: dict[int, Any]) -> StudySearcher:
        """Tune copies its searcher; the progress display must see the one that is in use."""
        return self

    def save(self, checkpoint_path: str) -> None:
        """Nothing: rows are the only truth, and a scheduler is rebuilt from them."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


class EarlyStop(FIFOScheduler):
    """Tune's scheduler: trials start as they come, and end early where the scheduler says so."""

    def __init__(self, scheduler: StudyScheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._controller: TuneController | None = None

    def drop_cached_actors(self) -> None:
        """Have Tune end the actors that it keeps for trials to come."""
        if self._controller is not None:
            drop_cached_actors(self._controller)

    def __deepcopy__(self, memo: dict[int, Any]) -> EarlyStop:
        """Tune copies its scheduler; the scheduler must stay the one in use."""
        return self

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        """Called with each progress report."""
        self._controller = tune_controller
        if "percent" not in result:
            return self.CONTINUE
        prune = self._scheduler.report(trial.trial_id, result["percent"], result["train_loss"])
        return self.STOP if prune else self.CONTINUE
