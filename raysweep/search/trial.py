"""The trainable: one trial inside a reused Tune actor. It writes its own row, then reports."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.exceptions import RayActorError

from raysweep.data.corpus import Corpus, data_hash
from raysweep.data.shipping import fetch
from raysweep.errors import StorageError, UserError
from raysweep.results import Results
from raysweep.results.filesystem import Storage, patient
from raysweep.search.early_stopping import REPORT_PERCENT
from raysweep.search.interruption import INTERRUPTED, StopRequest
from raysweep.study import Resources, Study, TrialSpec
from raysweep.training.command import train_by_command
from raysweep.training.own import TIMEOUT, train_by_function
from raysweep.training.record import trial_row, unfinished_row
from raysweep.training.trial_folder import TrialFolder

if TYPE_CHECKING:
    from raysweep.training.outcome import TrialOutcome

REPORT_SECONDS = 5.0
"""Least time between two progress reports of one trial: each costs a round trip."""
ALIVE_SECONDS = 30.0
"""Without progress to report, a trial says this often that it lives."""
FAILED = "failed"
"""What a trial reports last that ends by an error of its own."""
LOST = "lost"
"""What a trial reports whose workers are begun anew."""


@dataclass(frozen=True)
class TrialContext:
    """What every trial of a study needs; shipped to each actor once."""

    study: Study
    corpus: Corpus | None
    """None where the user's own code trains."""
    results_uri: str
    begun: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def data_hash(self) -> str:
        return data_hash(self.study, self.corpus)


class TuneReporter:
    """Sends progress to the driver now and then; at equal shares of the horizon if that counts."""

    def __init__(
        self, horizon: float, early_stopping: bool, stop: StopRequest | None = None
    ) -> None:
        self._last = time.monotonic()
        self._horizon = horizon
        self._early_stopping = early_stopping
        self._stop = stop
        self._percent = 0
        self._progress: dict[str, Any] = {"step": 0, "tokens": 0.0}

    def report(self, step: int, tokens: float, loss: float) -> None:
        """Progress of a running trial; `loss` is a smoothed training loss."""
        now = time.monotonic()
        share = 100 * tokens / self._horizon
        percent = int(share // REPORT_PERCENT) * REPORT_PERCENT
        due = now - self._last >= REPORT_SECONDS
        rung = self._early_stopping and self._percent < percent < 100
        if due or rung:
            self._last = now
            progress = {"step": step, "tokens": tokens, "train_loss": loss}
            self._progress = progress | {"timesteps_total": step}  # the x-axis of Ray's loggers
            if rung:
                self._percent = percent
            tune.report(self._progress | ({"percent": percent} if rung else {}))

    def lost(self, why: str) -> None:
        """Tell that the trial's workers are begun anew."""
        tune.report(self._progress | {LOST: why})

    def should_stop(self) -> bool:
        """Whether the driver winds down. (Early stopping raises in `report`.)"""
        if time.monotonic() - self._last >= ALIVE_SECONDS:
            self._last = time.monotonic()
            tune.report(self._progress)
        return self._stop is not None and self._stop()


def make_trainable(context: TrialContext) -> Callable[[dict[str, Any]], None]:
    """A Tune function trainable for the study's trials."""

    def trial(config: dict[str, Any]) -> None:
        # Without checkpoints a trial that stopped would be lost: it gets the time there is to
        # finish.
        stop = StopRequest() if context.study.space.recipe.checkpoint_seconds else None
        try:
            row = run_trial(context, config, stop)
        except RayActorError:
            raise  # the host of its group was lost: no failure of its own
        except Exception as error:
            tune.report({FAILED: str(error)})  # else the driver could not tell it from a lost node
            raise
        final = {name: row.get(name) for name in ("status", "reason", "loss", "seconds_train")}
        branches = branch_rows(context, config)
        final["seconds_train"] = (final["seconds_train"] or 0.0) + sum(
            b["seconds_train"] for b in branches
        )
        final["branches"] = [(b["cell"], b["status"], b["loss"]) for b in branches]
        tune.report(final | {"timesteps_total": row.get("step") or 0})

    return trial


@patient()
def run_trial(
    context: TrialContext, config: dict[str, Any], stop: StopRequest | None = None
) -> dict[str, Any]:
    """Train one trial and write its row; a trial whose row stands already is not run again.

    One that was interrupted has left a checkpoint, and no row: only `status`, `loss` and
    `seconds_train` are returned.
    """
    started_at, begun = datetime.now(UTC), time.monotonic()
    study, results = context.study, Results.open(context.results_uri)
    corpus = context.corpus and fetch(context.corpus, results.storage)
    spec = study.trial_of(config, context.data_hash)
    standing = results.find(spec.key, spec.study)  # written before the actor died, say
    if standing is not None and (_stands(standing) or _timed_out(standing, context.begun)):
        return standing
    write = RowWriter(
        context.results_uri,
        study.space.search.strategy,
        corpus and corpus.train_tokens,
        started_at,
        begun,
    )
    try:
        outcome = _train(context, config, spec, corpus, results.storage, write, stop)
    except StorageError:
        raise
    except UserError as error:  # it would end so again: no retry, but a row
        return write.refused(spec, error)
    if outcome.status == "stopped":
        if stop is not None and stop.leaves:
            os._exit(1)  # as if its node were gone already: Tune starts the trial on another
        return {"status": INTERRUPTED, "loss": None, "seconds_train": outcome.seconds_train}
    row = write(spec, outcome)
    if spec.training is None:
        from raysweep.training.checkpoint import forget  # here: drivers never import torch

        forget(results.storage, spec.key)
    elif spec.training.keep_folders:
        TrialFolder(results.storage, spec.key, kept=True).leave()
    else:
        with contextlib.suppress(UserError):  # the study sweeps up in the end
            TrialFolder(results.storage, spec.key).forget()
    return row


@dataclass(frozen=True)
class RowWriter:
    """Writes the rows of one trial and of its branches, in whichever process they end."""

    results_uri: str
    strategy: str
    train_tokens: int | None
    started_at: datetime
    begun: float
    """By the monotonic clock of `host`."""
    host: str = field(default_factory=socket.gethostname)

    def __call__(self, spec: TrialSpec, outcome: TrialOutcome) -> dict[str, Any]:
        """Write the row of an outcome, and return it."""
        row = trial_row(
            spec,
            outcome,
            strategy=self.strategy,
            train_tokens=self.train_tokens,
            started_at=self.started_at,
            seconds_wall=self._seconds_wall(),
        )
        Results.open(self.results_uri).write(row, outcome.curve)
        return row

    def _seconds_wall(self) -> float:
        if socket.gethostname() == self.host:
            return time.monotonic() - self.begun
        return (datetime.now(UTC) - self.started_at).total_seconds()

    def refused(self, spec: TrialSpec, error: UserError) -> dict[str, Any]:
        """Write the row of a trial that cannot run, with the reason, and return it."""
        from raysweep.training.outcome import WorkerOutOfMemory

        row = unfinished_row(
            spec,
            "out_of_memory" if isinstance(error, WorkerOutOfMemory) else "crashed",
            str(error),
            strategy=self.strategy,
            started_at=self.started_at,
            seconds_wall=self._seconds_wall(),
            last_report={},
        )
        Results.open(self.results_uri).write(row)
        return row


def branch_rows(context: TrialContext, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that stand of a trial's branches."""
    results = Results.open(context.results_uri)
    branches = context.study.branch_trials(context.study.trial_of(config, context.data_hash))
    rows = [results.find(branch.key, branch.study) for branch in branches]
    return [row for row in rows if row is not None and _stands(row)]


def _missing(results_uri: str, branches: list[TrialSpec]) -> list[TrialSpec]:
    results = Results.open(results_uri)
    return [branch for branch in branches if not _stands(results.find(branch.key, branch.study))]


def _stands(row: dict[str, Any] | None) -> bool:
    return row is not None and row["status"] != "crashed"


def _timed_out(row: dict[str, Any], since: datetime) -> bool:
    """Whether a row is of this run, and tells of a trial whose process ended itself as it hung."""
    late = str(row["reason"]).startswith(TIMEOUT)
    return row["status"] == "crashed" and late and row["started_at"] >= since


def _train(
    context: TrialContext,
    config: dict[str, Any],
    spec: TrialSpec,
    corpus: Corpus | None,
    storage: Storage,
    write: RowWriter,
    stop: StopRequest | None,
) -> TrialOutcome:
    """Train by the user's command or function, or one of our models."""
    study, resources = context.study, spec.cell.resources
    reporter = TuneReporter(spec.cell.tokens, study.space.search.early_stopping is not None, stop)
    if spec.training is not None and spec.training.command is not None:
        return train_by_command(spec, study.folder, storage, reporter)
    branches = functools.partial(_missing, context.results_uri, study.branch_trials(spec))
    if spec.cell.in_group:
        from raysweep.training.ray_train import Job, train_in_group

        job = Job(spec, corpus, storage, branches, write, str(study.folder))
        return train_in_group(_host(context, config, resources), job, reporter, reporter.lost)
    if corpus is None:

        def end(reason: str) -> None:
            write.refused(spec, UserError(reason))
            os._exit(1)  # Tune starts the trial anew, which finds this row

        return train_by_function(spec, study.folder, storage, reporter, on_timeout=end)
    from raysweep.training.loop import train  # here, so that the driver never imports torch

    return train(
        spec,
        corpus,
        reporter=reporter,
        checkpoints=storage,
        threads=resources.threads,
        branches=branches(),
        on_branch=write,
    )


def _host(context: TrialContext, config: dict[str, Any], resources: Resources) -> Any:
    """The host of a trial's group. Should the driver's be lost, this process keeps one."""
    name = config["group"]
    _hosts[name] = start_group(context, name, resources, config["one_node"])
    return _hosts[name]


_hosts: dict[str, Any] = {}
"""Handles of the groups that trials of this process have run in."""


def start_group(context: TrialContext, name: str, resources: Resources, one_node: bool) -> Any:
    """The host of a group of workers, started if there is none."""
    from raysweep.training.ray_train import find_group

    storage_path = _ray_storage(context.results_uri)
    return find_group(name, resources, strict=one_node, storage_path=storage_path)


def _ray_storage(results_uri: str) -> str:
    """Where Ray Train keeps its notes on runs of several workers: beside the results, since all
    nodes must reach it."""
    if "://" not in results_uri:
        return str(Path(results_uri).resolve() / "ray")
    root, mark, options = results_uri.partition("?")
    return f"{root.rstrip('/')}/ray{mark}{options}"
