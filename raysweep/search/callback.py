"""What the driver does as trials come and go: progress, books, rows of trials that cannot."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial

from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.search.hangs import HangDetector
from raysweep.search.interruption import (
    GRACE_SECONDS,
    INTERRUPTED,
    Interrupted,
    Interruption,
    tell_trials_to_stop,
)
from raysweep.search.overview import Gauges, overview
from raysweep.search.progress import Progress
from raysweep.search.ray_internals import (
    actor_of,
    allow_another_failure,
    drop_snapshot,
    forget_results,
)
from raysweep.search.record import RunningRecord
from raysweep.search.scheduler import StudyScheduler
from raysweep.search.trial import FAILED, LOST
from raysweep.training.record import unfinished_row

TIDY_EVERY, TIDY_ROWS_EVERY = 128, 3
"""Trials after which files are merged; those of rows in an object store sooner, where each costs
whoever looks at the study two requests."""
STILL_READ = ("trial_id", "status", "training_iteration", "done")
"""Of a concluded trial's last result, what Tune or this module may still look at."""
RETRIES = 2
"""How often a trial is started again that failed, or hung."""
LOSSES = 20
"""How often in a row one may lose its worker without getting further than before: spot nodes come
and go, and a loss is no failure of the trial's own."""
OVERVIEW_SECONDS = 10.0
"""Least time between two overviews of how the study goes."""
LOOK_SECONDS = 1.0
"""Least time between two looks for workers that hang."""

_log = logging.getLogger("raysweep")


class StudyCallback(tune.Callback):
    """Hears of every trial from Tune."""

    def __init__(
        self,
        scheduler: StudyScheduler,
        results: Results,
        progress: Progress,
        interruption: Interruption,
        look: Callable[[Sequence[Trial]], None],
        record: RunningRecord,
    ) -> None:
        self.training_seconds = 0.0
        """Worker-seconds spent inside training loops."""
        self.available_seconds = 0.0
        """Worker-seconds that the cluster offered, as it grew and shrank."""
        self.concluded = 0
        self._scheduler = scheduler
        self._study = scheduler.study
        self._results = results
        self._progress = progress
        self._interruption = interruption
        self._look_at_nodes = look
        self._record = record
        self._recorded = -1
        self._tidied_at = self._all_tidied_at = 0
        self._tidying = self._tidied()
        self._gauges = Gauges(self._study.name)
        self._now: dict[str, Any] = {}
        self._looked_over = -math.inf
        self._widenings = 0
        self._winding_down = False
        self._starts: dict[str, tuple[float, datetime]] = {}
        self._hangs = HangDetector(self._study.space.search.stall_seconds)
        self._looked = time.monotonic()
        self._failed: set[str] = set()
        self._ended: list[Trial] = []
        """Trials concluded in this step."""
        self._reports: dict[str, Mapping[str, Any]] = {}
        """What running trials said last of their progress."""
        self._hung: dict[str, str] = {}
        """Why the last worker of a trial was killed."""
        self._losses: dict[str, tuple[int, float]] = {}
        """Of trials that lost workers: how often without progress, and the tokens reached."""
        self._said: set[tuple[str, str | None]] = set()
        """Cells, and why trials of theirs could not run, that the terminal has shown."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune snapshots its callbacks, and nobody reads that: rows are the only truth."""
        return tune.Callback, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> StudyCallback:
        """Tune copies its callbacks; the books must be kept in one place."""
        return self

    def on_step_end(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        """The refresh tick. Raises Interrupted once an interrupted run has wound down."""
        self._progress.refresh()
        self._keep_ranges()
        self._look_over()
        if self._scheduler.changes != self._recorded:
            self.keep_record()
        while self._ended:
            drop_snapshot(self._ended.pop())
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._kill_hanging(trials)
            self.count_available()
        signum = self._interruption.signum
        if signum is None:
            self._look_at_nodes(trials)
            return
        if not self._winding_down:
            self._winding_down = True
            tell_trials_to_stop()
            self._progress.say(
                f"{signal.Signals(signum).name}: running trials finish or leave a checkpoint, "
                f"{GRACE_SECONDS:g} s at most; another one ends at once"
            )
        if self._interruption.overdue or not any(t.status == Trial.RUNNING for t in trials):
            raise Interrupted(signum)

    def keep_record(self) -> None:
        """Have noted which trials are in flight: the next run takes them up."""
        self._recorded = self._scheduler.changes
        self._record.keep({"trials": self._scheduler.in_flight, "now": self._now})

    def end_record(self) -> None:
        """Have noted what the run leaves behind, all else being written."""
        self._tidying.join()
        self._now = overview(self._scheduler) | {"ended": True}
        self.keep_record()

    def _look_over(self) -> None:
        """Tell, now and then, how the study goes: in the record, and as metrics."""
        if time.monotonic() - self._looked_over < OVERVIEW_SECONDS:
            return
        self._looked_over = time.monotonic()
        self._now = overview(self._scheduler)
        self._gauges.set(self._now)
        self.keep_record()

    def count_available(self) -> None:
        """Add the worker-seconds offered since the last look."""
        now = time.monotonic()
        self.available_seconds += (now - self._looked) * self._scheduler.workers
        self._looked = now

    def on_trial_start(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any
    ) -> None:
        """Note when a trial began."""
        if trial.trial_id not in self._starts:  # else it goes on after a loss
            self._scheduler.started(trial.trial_id)
        self._starts[trial.trial_id] = time.monotonic(), datetime.now(UTC)
        self._hung.pop(trial.trial_id, None)
        cell = self._study.cell(trial.config["cell"])
        # A user's own code need not report at all: `training.timeout` is for that.
        if not cell.in_group and cell.own is None:
            self._hangs.started(trial.trial_id, cell.name)

    def on_trial_result(
        self,
        iteration: int,
        trials: Sequence[Trial],
        trial: Trial,
        result: Mapping[str, Any],
        **info: Any,
    ) -> None:
        """A sign of life, or the last words of a trial that failed."""
        cell = self._study.cell(trial.config["cell"])
        if cell.own is not None and not cell.in_group and trial.trial_id not in self._reports:
            self._hangs.started(trial.trial_id, cell.name, patient=True)
        self._hangs.heard(trial.trial_id)
        if FAILED in result:
            self._failed.add(trial.trial_id)
        else:
            self._reports[trial.trial_id] = result
        if LOST in result:
            _log.warning("cell %s: its workers begin anew: %s", cell.name, result[LOST])

    def on_trial_recover(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any
    ) -> None:
        """The worker is gone; the trial waits for another. A lost node is no failure of its own: it
        may then fail once more than Tune thinks, as long as it gets on between losses."""
        self._hangs.ended(trial.trial_id)
        own = trial.trial_id in self._failed or trial.trial_id in self._hung
        self._failed.discard(trial.trial_id)
        if own:
            return
        tokens = float(self._reports.get(trial.trial_id, {}).get("tokens") or 0.0)
        fruitless, reached = self._losses.get(trial.trial_id, (0, -1.0))
        fruitless = 0 if tokens > reached else fruitless + 1
        self._losses[trial.trial_id] = fruitless, max(tokens, reached)
        if fruitless < LOSSES:
            allow_another_failure(trial)

    def on_trial_complete(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any
    ) -> None:
        """Count a trial that ended; write the row of one that early stopping ended."""
        self._hangs.ended(trial.trial_id)
        result = trial.last_result or {}
        if result.get("status") == INTERRUPTED:
            self._starts.pop(trial.trial_id, None)
            self._reports.pop(trial.trial_id, None)
            self.training_seconds += float(result["seconds_train"])
        elif "status" in result:
            self._conclude(trial)
            self._say_once(trial.config["cell"], result["status"], result.get("reason"))
        else:
            self._write_unfinished(trial, "stopped", "early stopping: behind others of its cell")

    def on_trial_error(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any
    ) -> None:
        """Write the row of a trial that died more often than it may."""
        self._hangs.ended(trial.trial_id)
        self._failed.discard(trial.trial_id)
        reason = self._hung.pop(trial.trial_id, None) or _reason(trial)
        self._write_unfinished(trial, "crashed", reason)

    def _say_once(self, cell: str, status: str, reason: str | None) -> None:
        """Why a trial could not run, the first time that it is heard of a cell."""
        if status in ("crashed", "out_of_memory") and (cell, reason) not in self._said:
            self._said.add((cell, reason))
            how = "crashed" if status == "crashed" else "out of memory"
            _log.warning("trial in cell %s: %s: %s", cell, how, reason)

    def _kill_hanging(self, trials: Sequence[Trial]) -> None:
        """Kill the workers that hang: Tune then gives their trials to others."""
        hanging = self._hangs.hanging()
        for trial in (t for t in trials if hanging and t.trial_id in hanging):
            self._hangs.ended(trial.trial_id)
            reason = f"worker hung: no sign of life for {hanging[trial.trial_id]:.0f} s"
            self._hung[trial.trial_id] = reason
            _log.warning("cell %s: %s: killed", trial.config["cell"], reason)
            if (actor := actor_of(trial)) is not None:
                ray.kill(actor)

    def _keep_ranges(self) -> None:
        """Keep the ranges whenever one was widened, for the runs that continue."""
        if self._scheduler.widenings > self._widenings:
            self._widenings = self._scheduler.widenings
            self._results.save_ranges(self._study.name, self._scheduler.widened)

    def _write_unfinished(self, trial: Trial, status: str, reason: str) -> None:
        report = self._reports.get(trial.trial_id, {})
        begun, started_at = self._conclude(trial)
        spec = self._study.trial_of(trial.config, self._scheduler.data_hash)
        standing = self._results.find(spec.key, spec.study)
        if standing is not None and standing["status"] != "crashed":
            return  # its worker died after it had written its row
        if status == "crashed":
            _log.warning("trial %s in cell %s crashed: %s", spec.key, spec.cell.name, reason)
        row = unfinished_row(
            spec,
            status,
            reason,
            strategy=self._study.space.search.strategy,
            started_at=started_at,
            seconds_wall=time.monotonic() - begun,
            last_report=report,
        )
        self._results.write(row)

    def _tidied(self) -> threading.Thread:
        """Keep the number of files bounded, in a thread that this returns; what fails now, the next
        run does."""

        def tidy() -> None:
            try:
                if self.concluded >= self._all_tidied_at + TIDY_EVERY or not self.concluded:
                    self._all_tidied_at = self.concluded
                    self._results.compact(kept=self._scheduler.open_keys)
                else:
                    self._results.compact_rows(kept=self._scheduler.open_keys)
            except UserError as error:
                _log.warning("files were not merged: %s", error)

        thread = threading.Thread(target=tidy, name="tidy", daemon=True)
        thread.start()
        return thread

    def _conclude(self, trial: Trial) -> tuple[float, datetime]:
        self.concluded += 1
        every = TIDY_EVERY if self._results.storage.is_local else TIDY_ROWS_EVERY
        if self.concluded >= self._tidied_at + every and not self._tidying.is_alive():
            self._tidied_at = self.concluded
            self._tidying = self._tidied()
        result = trial.last_result or {}
        self.training_seconds += float(result.get("seconds_train") or 0.0)
        self._reports.pop(trial.trial_id, None)
        self._losses.pop(trial.trial_id, None)
        start = self._starts.pop(trial.trial_id, (time.monotonic(), datetime.now(UTC)))
        forget_results(trial, STILL_READ)
        self._ended.append(trial)
        return start


def _reason(trial: Trial) -> str:
    """The last line of a trial's error."""
    if trial.error_file is None:
        return "worker died"
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "worker died"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "worker died"
