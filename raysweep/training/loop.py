"""The training loop: one trial from its specification to its outcome, without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from raysweep.data.batches import sequences_each
from raysweep.data.corpus import Corpus
from raysweep.study.spec import TrialSpec
from raysweep.training import runtime
from raysweep.training.checkpoint import Checkpoints, Timer, snapshot
from raysweep.training.evaluate import check_validation
from raysweep.training.horizon_metrics import HorizonMetrics
from raysweep.training.learner import Learner
from raysweep.training.outcome import Reporter, Silent, Status, TrialOutcome, WorkerOutOfMemory
from raysweep.training.parallel import Workers
from raysweep.training.run_state import Pace, RunState
from raysweep.training.summary import make_outcome

if TYPE_CHECKING:  # training as such needs no Arrow
    from raysweep.results.filesystem import Storage

LOOK_SECONDS = 5.0
"""A run asks this often whether to stop or to save, however far apart its curve's points are."""

OnBranch = Callable[[TrialSpec, TrialOutcome], object]


def train(
    spec: TrialSpec,
    corpus: Corpus,
    *,
    reporter: Reporter | None = None,
    checkpoints: Storage | None = None,
    device: torch.device | str | None = None,
    threads: int | None = 1,
    workers: Workers | None = None,
    branches: Sequence[TrialSpec] = (),
    on_branch: OnBranch | None = None,
) -> TrialOutcome:
    """Train one model and measure it.

    The result is a function of `spec` and the corpus alone: on CPUs bit for bit, whatever ran in
    the process before. Divergence is an outcome, not an error, and so is lack of memory, except
    where several workers cannot agree on it: that is a WorkerOutOfMemory. Where `checkpoints` can
    be kept, a run that was killed goes on from its last one; the caller forgets it once the outcome
    is safe (`checkpoint.forget`). With several `workers`, all call this with the same arguments and
    get the same outcome. `branches` are the trial at shorter horizons: each decays from the stable
    phase of this run (WSD), and `on_branch` hears of its outcome, on the first worker. Raises
    UserError also where the batch does not divide by the workers, or the corpus is too small.
    """
    workers = workers or Workers()
    resources = spec.cell.resources
    device = runtime.choose_device(resources) if device is None else torch.device(device)
    sequences_each(spec.batch_sequences, workers.world_size)
    length = spec.cell.shape.sequence_length
    others = (corpus.named_validation(name) for name in spec.validation_sets[1:])
    for tokens in (corpus.validation, *others):
        check_validation(tokens, spec.validation_sequences, length, workers)
    with runtime.clean_slate(
        device,
        threads,
        spec.seed,
        dtype=runtime.compute_dtype(device, spec.recipe),
        gpu_share=resources.gpus_per_worker,
    ):
        run = _Run(
            spec, corpus, device, workers, reporter or Silent(), checkpoints, branches, on_branch
        )
        try:
            return run.to_the_end()
        finally:
            run.close()
            del run


class _Run:
    """One run, and its branches as they come."""

    def __init__(
        self,
        spec: TrialSpec,
        corpus: Corpus,
        device: torch.device,
        workers: Workers,
        reporter: Reporter,
        storage: Storage | None,
        branches: Sequence[TrialSpec] = (),
        on_branch: OnBranch | None = None,
    ) -> None:
        self.spec, self.device, self.workers, self.reporter = spec, device, workers, reporter
        self.on_branch = on_branch
        self.checkpoints = None
        if storage is not None and spec.recipe.checkpoint_seconds:
            self.checkpoints = Checkpoints(storage, spec.key, workers)
        self.learner = Learner(spec, corpus, device, workers)
        self.state = RunState(spec, branches)

    def to_the_end(self) -> TrialOutcome:
        """Train, evaluate and sum up."""
        outcome = self._within_memory(self._begin)
        while outcome is None:
            outcome = self._within_memory(self._stretch)
            if outcome is None:
                self._fork()
            elif self.state.stable_run is not None and outcome.status != "stopped":
                self._tell(self.state.metrics, outcome)
                outcome = self._within_memory(self._back_to_stable_run)
        if outcome.status in ("diverged", "out_of_memory"):
            for metrics in self.state.waiting:
                self._lose(metrics, outcome.status, outcome.reason)
        return outcome

    def close(self) -> None:
        """Wait for what this worker is writing of a checkpoint."""
        if self.checkpoints:
            self.checkpoints.wait()

    def _within_memory(self, work: Callable[[], TrialOutcome | None]) -> TrialOutcome | None:
        """Do a part of the run. Out of memory on a single worker is an outcome of the trial; of
        several workers the others would wait for it in vain, so all fail together."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
            if self.workers.world_size > 1:
                raise WorkerOutOfMemory(self._mend()) from error
        reason = f"no memory beside that for the gradient, after {self.state.step} steps"
        return make_outcome(self.state, self.learner, self.state.metrics, "out_of_memory", reason)

    def _mend(self) -> str:
        """What to tell the user where several workers are out of memory."""
        micro = self.learner.micro or 1
        if not self.workers.sharded:
            mend = "set resources.strategy to fsdp"
        elif micro > 1:
            mend = f"set resources.micro_batch_sequences to {micro // 2} (tried: {micro})"
        else:
            mend = "raise resources.workers"
        return f"worker {self.workers.rank} is out of memory: {mend}"

    def _begin(self) -> None:
        """Build the model; go on from the checkpoint of an earlier attempt, if there is one."""
        self.learner.build()
        saved = None
        if self.checkpoints:
            saved = self.checkpoints.load_on_all(self.learner.parts())
        if saved is None:
            return
        wanted = {metrics.spec.key for metrics in self.state.horizons}
        # Of a branch whose row stands, only the run that it left is of use.
        self._load(saved if saved["metrics"] in wanted else saved["trunk"])

    def _stretch(self) -> TrialOutcome | None:
        """Train and evaluate; None where a branch begins before."""
        state, learner = self.state, self.learner
        ended = self._steps()
        if ended is None:
            return None
        status, reason = ended
        evaluations = None
        if status == "finished":
            started = time.perf_counter()
            evaluations = learner.evaluate()
            state.seconds += time.perf_counter() - started
            if not math.isfinite(evaluations.main.loss):
                status, reason, evaluations = "diverged", "non-finite validation loss", None
        return make_outcome(state, learner, state.metrics, status, reason, evaluations)

    def _fork(self) -> None:
        """Leave the run for the branch whose decay begins here."""
        branch = self.state.waiting.pop(0)
        if branch.diverged:
            self._lose(branch, "diverged", branch.diverged)
        else:
            self.state.enter(branch, stable_run=snapshot(self._saved()))

    def _back_to_stable_run(self) -> None:
        assert self.state.stable_run is not None
        self._load(self.state.stable_run)

    def _lose(self, branch: HorizonMetrics, status: Status, reason: str | None) -> None:
        """Give up a branch that has not begun."""
        self._tell(branch, make_outcome(self.state, self.learner, branch, status, reason))

    def _tell(self, branch: HorizonMetrics, outcome: TrialOutcome) -> None:
        if self.on_branch is not None and self.workers.rank == 0:
            self.on_branch(branch.spec, outcome)

    def _steps(self) -> tuple[Status, str | None] | None:
        """Train to the horizon, or to what ends the run before: how and why; None where a branch
        begins."""
        state, metrics, branch = self.state, self.state.metrics, self.state.next_branch
        started, before, timed = time.perf_counter(), state.seconds, state.pace
        due = Timer(self.spec.recipe.checkpoint_seconds)
        first, look = state.step, state.step + 1
        end = metrics.steps if branch is None else min(metrics.steps, branch.leaves_at)
        self.learner.model.train()
        while state.step < end:
            rate = metrics.rate(state.step)
            state.add(self.learner.learn(state.step, rate, want_trace=state.wants_trace()), rate)
            if state.step == first + 1 and self.learner.compiled:
                # Compilation is no part of the speed. (The first step alone may compile.)
                runtime.wait_for(self.device)
                timed = Pace(timed.steps - 1, timed.seconds - (time.perf_counter() - started))
            point = state.step % metrics.monitor.every == 0 or state.step == end
            if not point and state.step < look:
                continue
            ended = state.read() if point else None
            seconds = time.perf_counter() - started
            state.seconds = before + seconds
            state.pace = Pace(timed.steps + state.step - first, timed.seconds + seconds)
            if ended:
                return ended
            if point:
                tokens = state.step * self.spec.batch_tokens
                self.reporter.report(state.step, tokens, metrics.monitor.smooth)
            pause = max(1, int(LOOK_SECONDS / (seconds / (state.step - first))))
            stop, save, pause = self._decide(due, min(pause, metrics.monitor.every))
            look = state.step + pause
            stop = stop and state.step < metrics.steps
            if stop:  # what is under way first: the next goes where the one that counts now lies
                self._finish_checkpoint()
            if (stop or save) and self.checkpoints:
                self.checkpoints.save(self._saved())
            if stop:
                self._finish_checkpoint()
                return "stopped", f"stopped after {state.step} of {metrics.steps} steps"
        return ("finished", None) if branch is None else None

    def _decide(self, due: Timer, pause: int) -> tuple[bool, bool, int]:
        """Whether to stop and to save now, and steps to the next look: rank 0 decides for all. What
        all have written of a checkpoint by now is put in place."""
        leader, checkpoints = self.workers.rank == 0, self.checkpoints
        stop = leader and self.reporter.should_stop()
        busy = checkpoints is not None and checkpoints.writing
        if self.workers.world_size == 1:
            return stop, not busy and due.due(), pause
        failed = checkpoints is not None and checkpoints.failed
        # One that is due while another is written waits for the next look.
        save = leader and not busy and due.waits()
        flags = torch.tensor([stop, save, pause if leader else 0, busy, failed])
        flags = self.workers.sum(flags.float().to(self.device)).tolist()
        stop, save, any_busy, any_failed = (bool(flags[i]) for i in (0, 1, 3, 4))
        if checkpoints and not any_busy:
            checkpoints.commit(any_failed)
        save = save and not any_busy
        if save:
            due.restart()
        return stop, save, int(flags[2])

    def _finish_checkpoint(self) -> None:
        """Wait until all workers have written their parts, and put the checkpoint in place."""
        if self.checkpoints is None:
            return
        self.checkpoints.wait()
        if self.workers.world_size > 1:
            failed = self.workers.largest(int(self.checkpoints.failed), self.device)
            self.checkpoints.commit(bool(failed))

    def _saved(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {**self.state.state(), **self.learner.state()}

    def _load(self, saved: dict[str, Any]) -> None:
        """Restore what `_saved` returned."""
        self.state.load(saved, self.device)
        self.learner.load(saved, saved["step"])
