"""Trials on several workers, in groups kept by Ray Train.

This module and `process_group` alone know Ray here.

Workers, their process group and what they have compiled outlive a trial. A `GroupHost` holds one
long run of Ray Train, whose workers ask it for the next trial; whoever has a trial gives it to
the host and listens. Where a user's function fails, its workers stay, and get a new process group.

The host starts a group again that loses a worker, and the trial that ran goes on from its
checkpoint. Ray Train could do so, but gives up where a group cannot be set up, and tries for ever
where workers fail before they ask for a trial: the host counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray import train
from ray.exceptions import RayError
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # `TorchTrainer`'s base

from raysweep.data.corpus import Corpus
from raysweep.data.shipping import fetch
from raysweep.errors import StorageError, UserError
from raysweep.results.filesystem import Storage, patient
from raysweep.study.cells import Resources
from raysweep.study.spec import TrialSpec
from raysweep.training.outcome import Reporter, TrialOutcome, WorkerOutOfMemory
from raysweep.training.own import LOST_PEER, GroupEnded, train_by_function
from raysweep.training.process_group import Connection, ProcessGroupConfig

FAILURES = 2
"""How often a trial is begun again after an error of its own."""
STARTS = 5
"""How often in a row a group may fail before its first worker has begun a trial."""
LOSSES = 20
"""How often in a row a trial may lose workers without getting further than before: spot nodes come
and go, and a loss is no failure of the trial's own."""
REPORT_SECONDS, REPORT_PERCENT = 1.0, 5
"""Progress is told so often, and at each such share of the horizon."""
POLL_SECONDS = 5.0
"""Workers and listeners ask again after so long without an answer."""
LEAVE_SECONDS = 15.0
"""What workers get to come out of a trial that failed on one of them."""
CLOSE_SECONDS = 5.0
ROOM_SECONDS = 600.0
"""How long a group waits for its room before it asks anew."""


@dataclass(frozen=True)
class Job:
    """A trial for a group. All of it must pickle."""

    spec: TrialSpec
    corpus: Corpus | None
    """None where the user's own function trains."""
    checkpoints: Storage | None
    branches: Callable[[], Sequence[TrialSpec]]
    """At each start, which branches are wanted still."""
    on_branch: Callable[[TrialSpec, TrialOutcome], object] | None
    folder: str = ""
    """Where the user's function is looked for."""


EventKind = Literal["progress", "lost", "outcome", "refused", "out_of_memory", "crashed"]


@dataclass
class _Entry:
    """A trial in a host's books."""

    job: Job
    events: list[tuple[EventKind, Any]] = field(default_factory=list)
    starts: int = 0
    reached: int = 0
    """Tokens that the trial was trained on, at most."""
    reached_before: int = -1
    """The same when it was begun last."""
    fruitless: int = 0
    """How often in a row it was begun again without progress."""
    errors: list[str] = field(default_factory=list)
    """One for each start that an error of its own ended."""
    cancelled: bool = False
    leaving: bool = False
    """Whether it should begin anew, at a checkpoint, as a node of the group is about to go."""
    over: bool = False


class GroupHost:
    """An actor that keeps one group of workers, and takes trials for it."""

    def __init__(self, resources: Resources, strict: bool, storage_path: str | None) -> None:
        self._entries: list[_Entry] = []
        self._changed = asyncio.Condition()
        self._nodes: dict[int, str] = {}
        """Where each worker is."""
        self._workers = resources.workers
        self._idle: dict[int, int] = {}
        """Of each worker that waits for a trial, the one that it has done."""
        self._broken = -1
        """The trial that left the process group in any state."""
        self._renewing: set[int] = set()
        """Workers that are to be told to make a new process group."""
        self._closing = False
        self._begun = False
        """Whether the group as it is has begun a trial."""
        self._said: str | None = None
        """The last error that a worker came out of, but for what follows from another's."""
        self._lost: str | None = None
        """Why the group was started anew last."""
        self._refused: tuple[int, str] | None = None
        """How many trials cannot run, as the group does not start, and why."""
        host = ray.get_runtime_context().current_actor
        arguments = host, resources, strict, storage_path
        self._thread = threading.Thread(target=self._fit, args=arguments, daemon=True)
        self._thread.start()

    def _fit(self, host: Any, resources: Resources, strict: bool, storage_path: str | None) -> None:
        # Ray looks after its workers every 2 s and starts a watcher a run: too slow for short runs.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{ROOM_SECONDS:g}")
        per_worker = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            per_worker["GPU"] = resources.gpus_per_worker
        scaling = train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
            placement_strategy="STRICT_PACK" if strict else "PACK",
        )
        no_retries = train.FailureConfig(
            max_failures=0, max_preemption_failures=0, controller_failure_limit=0
        )
        failures = 0
        while not self._closing:
            self._begun = False
            try:
                with tempfile.TemporaryDirectory(prefix="raysweep-") as folder:
                    _Trainer(
                        _serve,
                        backend_config=ProcessGroupConfig(),
                        train_loop_config={"host": host},
                        scaling_config=scaling,
                        run_config=train.RunConfig(
                            name=f"group-{os.getpid()}-{time.time_ns()}",
                            storage_path=storage_path or folder,
                            failure_config=no_retries,
                        ),
                    ).fit()
            except Exception as error:
                self._lost, self._said = self._said or _reason(error), None
                for entry in self._entries if self._begun else ():
                    if not entry.over:
                        entry.events.append(("lost", self._lost))
                failures = 0 if self._begun or _waits_for_room(error) else failures + 1
            if failures >= STARTS:
                self._refused = len(self._entries), f"its group does not start: {self._lost}"
                failures = 0
                while not self._closing and all(e.over or e.cancelled for e in self._entries):
                    time.sleep(POLL_SECONDS / 10)
            elif failures:
                time.sleep(2 ** (failures - 1))

    async def submit(self, job: Job) -> int:
        """Take a trial; its number. One that is under way already is not taken twice."""
        for number, entry in enumerate(self._entries):
            if not entry.over and not entry.cancelled and entry.job.spec.key == job.spec.key:
                return number
        self._entries.append(_Entry(job))
        await self._notify()
        return len(self._entries) - 1

    async def next_job(
        self, done: int, rank: int, node: str, whole: bool
    ) -> tuple[int, Job] | Literal["wait", "renew", "restart"] | None:
        """For a worker on a node: the next trial after the one that it has done; None ends it.

        One that was not left `whole`, as it failed there, may have left other workers within it:
        once all are through with it they are told to "renew" their process group. Where some are
        not in time, or the trial is to be begun again, whoever failed is told to "restart" all."""
        self._nodes[rank], self._idle[rank] = node, done
        if done < 0:  # the group has begun anew
            self._broken, self._renewing = -1, set()
        if not whole:
            self._broken = done
        await self._notify()
        deadline = time.monotonic() + (POLL_SECONDS if whole else LEAVE_SECONDS)
        while True:
            if rank in self._renewing:
                self._renewing.discard(rank)
                return "renew"
            if done >= 0 and self._broken == done:
                if all(self._idle.get(each) == done for each in range(self._workers)):
                    if not self._entries[done].over:
                        return "restart"
                    self._broken, self._renewing = -1, set(range(self._workers))
                    await self._notify()
                    continue
            else:
                for number, entry in enumerate(self._entries):
                    if number > done and not entry.over:
                        if rank == 0 and not await self._begin(number):
                            continue
                        del self._idle[rank]
                        return number, entry.job
                if self._closing:
                    return None
            if time.monotonic() > deadline or not await self._wait(deadline):
                return "wait" if whole else "restart"

    async def post(
        self,
        number: int,
        kind: EventKind | Literal["error"],
        payload: Any,
        whole: bool = True,
    ) -> bool:
        """From a worker: news of a trial; one that is not `whole` failed there. An error may be
        that of a worker which has lost another: the trial is begun again, as often as it may.
        Returns whether the workers should begin anew, as one of their nodes is about to go."""
        entry = self._entries[number]
        if not whole:
            self._broken = number
        if kind == "outcome" and payload.status == "stopped" and entry.leaving:
            entry.leaving = False
            if not entry.cancelled:
                return True
        if kind == "error":
            if not any(text in payload for text in LOST_PEER):
                self._said = None if entry.over else payload
                del entry.errors[entry.starts - 1 :]  # of one start one error counts
                entry.errors.append(payload)
                if len(entry.errors) > FAILURES:
                    await self._end(entry, "crashed", payload)
        elif kind == "progress":
            entry.reached = max(entry.reached, payload[1])
            if not entry.over:
                entry.events.append((kind, payload))
                await self._notify()
        elif not entry.over:
            await self._end(entry, kind, payload)
        return False

    async def events(self, number: int) -> list[tuple[EventKind, Any]]:
        """For a listener: what is new of its trial; after some seconds, even nothing."""
        entry = self._entries[number]
        deadline = time.monotonic() + POLL_SECONDS / 5
        while not entry.events and time.monotonic() < deadline:
            if self._refused and number < self._refused[0] and not entry.over:
                await self._end(entry, "crashed", self._refused[1])
            await self._wait(deadline)
        found, entry.events = entry.events, []
        return found

    async def cancel(self, number: int) -> None:
        """Have a trial leave a checkpoint and stop."""
        self._entries[number].cancelled = True
        await self._notify()

    async def cancelled(self, number: int) -> bool:
        """Whether a trial should stop, for now or for good."""
        entry = self._entries[number]
        return entry.cancelled or entry.leaving

    async def leave(self) -> None:
        """Have the trial leave a checkpoint and begin anew: a node of the group is about to go."""
        for entry in self._entries:
            entry.leaving = not entry.over

    async def where(self) -> list[str]:
        """The node of each worker that has been heard of, by id."""
        return [node for _, node in sorted(self._nodes.items())]

    async def workers_gone(self) -> bool:
        """Whether the group has ended."""
        return not self._thread.is_alive()

    async def close(self) -> None:
        """End the group, once the trial that it has is over."""
        self._closing = True
        await self._notify()

    async def _begin(self, number: int) -> bool:
        """Note that a trial begins; whether it may."""
        entry = self._entries[number]
        entry.starts += 1
        entry.leaving = False
        entry.fruitless = 0 if entry.reached > entry.reached_before else entry.fruitless + 1
        entry.reached_before = entry.reached
        if entry.fruitless > LOSSES:
            reason = f"its workers were lost {entry.fruitless} times without progress: {self._lost}"
            await self._end(entry, "crashed", entry.errors[-1] if entry.errors else reason)
            return False
        self._begun = True
        return True

    async def _end(self, entry: _Entry, kind: EventKind, payload: Any) -> None:
        entry.over, self._said = True, None
        entry.events.append((kind, payload))
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, deadline: float) -> bool:
        """Until something has changed; False if nothing has by then."""
        left = max(0.01, deadline - time.monotonic())
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            async with self._changed:
                await asyncio.wait_for(self._changed.wait(), left)
                return True
        return False


class _Trainer(DataParallelTrainer):
    """Starts three processes less than Ray's own: for data sets, of which there are none; one that
    gives back the room of a dead controller, as the study does, and that without a dashboard takes
    twelve seconds to end; and one that asks for nodes."""

    def _create_default_callbacks(self) -> list[Any]:
        without = "DatasetsCallback", "PlacementGroupCleanerCallback"
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if type(each).__name__ not in without]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = _AsksForNothing(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class _AsksForNothing(FixedScalingPolicy):
    """The study asks for nodes itself; what Ray's policy asks for is kept for minutes after."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


def find_group(name: str, resources: Resources, *, strict: bool, storage_path: str | None) -> Any:
    """The host of that name; it is started if there is none, and lives as long as whoever started
    it keeps what this returns.

    `strict` keeps the workers on one node; `storage_path`, where Ray keeps its notes, must be
    reachable from all nodes.
    """
    options = {
        "name": name,
        "namespace": f"raysweep-{ray.get_runtime_context().get_job_id()}",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_concurrency": 1000,
    }
    return ray.remote(GroupHost).options(**options).remote(resources, strict, storage_path)


def end_groups(hosts: Sequence[Any], *, wait: bool = False) -> None:
    """Give groups without a trial back, or with `wait` all of them and return then."""
    ends = [threading.Thread(target=_end, args=(host,), daemon=True) for host in hosts]
    for end in ends:
        end.start()
    for end in ends if wait else []:
        end.join(2 * CLOSE_SECONDS)


def _waits_for_room(error: Exception) -> bool:
    said = type(getattr(error, "controller_failure", None)).__name__
    return said == "WorkerGroupStartupTimeoutError"


def _reason(error: Exception) -> str:
    """What ended a group, in a line."""
    workers = getattr(error, "worker_failures", {})
    said = next((str(each) for each in workers.values()), str(error)).strip()
    if any(text in said for text in LOST_PEER):
        return "one of them was lost"
    return said.splitlines()[-1].split(" Worker exit")[0][:300] if said else type(error).__name__


def _end(host: Any) -> None:
    with contextlib.suppress(RayError):
        ray.get(host.close.remote())
        deadline = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < deadline and not ray.get(host.workers_gone.remote()):
            time.sleep(0.1)
        ray.kill(host)


def train_in_group(
    host: Any, job: Job, reporter: Reporter, on_lost: Callable[[str], object] = lambda why: None
) -> TrialOutcome:
    """Train one model on a group's workers, as `loop.train` does on one.

    Progress goes to `reporter`; where it wants to stop, or raises, the trial leaves a checkpoint.
    `on_lost` hears why the group is begun anew.
    Raises what ends a trial for good: UserError with the workers' words, WorkerOutOfMemory.
    """
    number = ray.get(host.submit.remote(job))
    over, told = False, False
    try:
        while True:
            for kind, payload in ray.get(host.events.remote(number)):
                over = kind not in ("progress", "lost")
                if kind == "progress":
                    reporter.report(*payload)
                elif kind == "lost":
                    on_lost(payload)
                elif kind == "outcome":
                    return payload
                elif kind == "out_of_memory":
                    raise WorkerOutOfMemory(payload)
                else:
                    raise UserError(payload)
            if not told and reporter.should_stop():
                told = True
                ray.get(host.cancel.remote(number))
    finally:
        if not over and not told:
            host.cancel.remote(number)


class WorkerReporter:
    """Tells the group's host of a trial's progress, from the first worker."""

    def __init__(self, host: Any, number: int, horizon: int) -> None:
        self._host, self._number, self._horizon = host, number, horizon
        self._leader = train.get_context().get_world_rank() == 0
        self._percent, self._told, self._asked = 0, time.monotonic(), time.monotonic()

    def report(self, step: int, tokens: int, loss: float) -> None:
        """Tell, if it is time or another share of the horizon is done."""
        percent = min(100, 100 * tokens // self._horizon) // REPORT_PERCENT * REPORT_PERCENT
        now = time.monotonic()
        if self._leader and (percent > self._percent or now - self._told > REPORT_SECONDS):
            self._percent, self._told = percent, now
            self._host.post.remote(self._number, "progress", (step, tokens, loss))

    def should_stop(self) -> bool:
        """Whether the run should leave a checkpoint and end."""
        now = time.monotonic()
        if now - self._asked < REPORT_SECONDS / 2:
            return False
        self._asked = now
        return ray.get(self._host.cancelled.remote(self._number))


@patient()
def _serve(config: dict[str, Any]) -> None:
    """What each worker of a group does: one trial after another."""
    from torch import distributed

    host, rank = config["host"], train.get_context().get_world_rank()
    connection: Connection | None = None
    done, node, whole = -1, ray.get_runtime_context().get_node_id(), True
    proven: bool | None = False
    """Whether the function has worked in a process group that was made anew; None where it is to be
    tried: it may have kept something of the group before."""
    while (given := ray.get(host.next_job.remote(done, rank, node, whole))) is not None:
        if given == "restart":
            raise RuntimeError("the trial failed on some of them")
        if given == "renew" and connection is not None:
            connection.renew(f"after {done}")
            whole, proven = True, proven or None
        if given == "renew" or given == "wait":
            continue
        number, job = given
        if job.corpus is None and connection is None:
            connection = Connection()
        outcome = None
        try:
            outcome = _train(host, number, job)
        except Exception as error:
            kind, said = "error", f"{error}"[:2000]
            if isinstance(error, GroupEnded):
                kind, said = "outcome", error.outcome
            elif isinstance(error, UserError) and not isinstance(error, StorageError):
                kind = "out_of_memory" if isinstance(error, WorkerOutOfMemory) else "refused"
            untested = proven is None and kind == "refused"
            kind = "error" if untested else kind
            whole = job.corpus is not None or untested
            ray.get(host.post.remote(number, kind, said, whole))
            if whole:
                raise  # others may wait for this worker: all begin anew
        told = rank == 0 and outcome is not None
        if told and ray.get(host.post.remote(number, "outcome", outcome)):
            raise RuntimeError("a node of the group is about to go")  # the host starts it on others
        done = number
        if whole and proven is None:
            proven = True
        if connection is not None and not distributed.is_initialized():
            whole = False  # the user's function has ended it
        if connection is not None and not whole:
            connection.drop()


def _train(host: Any, number: int, job: Job) -> TrialOutcome:
    from ray.train.torch import get_device

    from raysweep.training.loop import train as train_one
    from raysweep.training.parallel import Workers

    spec, corpus = job.spec, job.corpus
    resources = spec.cell.resources
    if corpus is None:
        return _train_own(host, number, job)
    if isinstance(corpus, Corpus) and job.checkpoints is not None:
        corpus = fetch(corpus, job.checkpoints)  # this worker's node may not have it yet
    workers = Workers.of_process_group(resources.strategy)
    # The first worker looks for all: another node may not see yet what was written last.
    branches = workers.from_leader(job.branches() if workers.rank == 0 else None)
    return train_one(
        spec,
        corpus,
        reporter=WorkerReporter(host, number, spec.horizon),
        checkpoints=job.checkpoints,
        device=get_device(),
        threads=resources.threads,
        workers=workers,
        branches=branches,
        on_branch=job.on_branch,
    )


def _train_own(host: Any, number: int, job: Job) -> TrialOutcome:
    """Train by the user's function on this worker, one of several."""
    spec, context = job.spec, train.get_context()
    assert job.checkpoints is not None

    def end(reason: str) -> None:
        ray.get(host.post.remote(number, "refused", reason))
        os._exit(1)  # and with it the group, whose other workers wait

    return train_by_function(
        spec,
        job.folder,
        job.checkpoints,
        WorkerReporter(host, number, spec.horizon),
        on_timeout=end,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
    )
