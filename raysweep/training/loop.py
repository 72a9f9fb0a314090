"""The training loop: one trial from its specification to its outcome, without Ray."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raysweep.config.study import TrialSpec
from raysweep.data.corpus import Corpus
from raysweep.errors import UserError
from raysweep.model import build
from raysweep.results.filesystem import Storage
from raysweep.training import optimizer, runtime
from raysweep.training.checkpoint import Checkpoints, Timer, snapshot
from raysweep.training.evaluate import Evaluation, evaluate
from raysweep.training.outcome import Reporter, Silent, Status, TrialOutcome
from raysweep.training.parallel import Workers
from raysweep.training.step import GradientMaker
from raysweep.training.track import Track

LOOK_SECONDS = 5.0
"""A run asks this often whether to stop or to save, however far apart its curve's points are."""


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
    on_branch: Callable[[TrialSpec, TrialOutcome], object] | None = None,
) -> TrialOutcome:
    """Train one model and measure it.

    The result is a function of `spec` and the corpus alone: on CPUs bit for bit, whatever ran in
    the process before. Divergence is an outcome, not an error, and so is lack of memory, except
    where several workers cannot agree on it: that is a UserError. Where `checkpoints` can be kept,
    a run that was killed goes on from its last one; the caller forgets it once the outcome is safe
    (`checkpoint.forget`). With several `workers`, all call this with the same arguments and get the
    same outcome. `branches` are the trial at shorter horizons: each decays from the stable phase of
    this run (WSD), and `on_branch` hears of its outcome, on the first worker. Raises UserError also
    where the batch does not divide by the workers, or the corpus is too small.
    """
    workers = workers or Workers()
    resources = spec.cell.resources
    device = runtime.choose_device(resources) if device is None else torch.device(device)
    if spec.batch_sequences % workers.world_size:
        raise UserError(
            f"a batch of {spec.batch_sequences} sequences does not divide by "
            f"{workers.world_size} workers: raise search.batch_sequences.low, or use fewer workers"
        )
    with runtime.clean_slate(device, threads, spec.seed):
        run = _Run(spec, corpus, device, workers, reporter or Silent(), checkpoints, branches)
        try:
            return run.to_the_end(on_branch)
        finally:
            run.close()


class _Run:
    """The state of one run."""

    def __init__(
        self,
        spec: TrialSpec,
        corpus: Corpus,
        device: torch.device,
        workers: Workers,
        reporter: Reporter,
        storage: Storage | None,
        branches: Sequence[TrialSpec] = (),
    ) -> None:
        self.spec, self.corpus, self.device, self.workers = spec, corpus, device, workers
        self.reporter = reporter
        self.checkpoints = None
        if storage is not None and spec.recipe.checkpoint_seconds:
            self.checkpoints = Checkpoints(storage, spec.key)
        self.trunk: dict[str, Any] | None = None
        """In a branch: the state of the run that it left."""
        self.track = Track(spec)
        self.waiting = sorted(map(Track, branches), key=lambda t: t.leaves_at)
        """Branches that have not begun."""
        self.step = 0
        self.seconds = 0.0
        self.out_of_memory = False
        self.pending: list[Tensor] = []
        self.rates: list[float] = []
        self.traces: dict[int, Tensor] = {}

    def _begin(self) -> None:
        """Build the model and what trains it; go on from the checkpoint, if there is one."""
        spec, device, workers = self.spec, self.device, self.workers
        recipe, shape = spec.recipe, spec.cell.shape
        self.model = build(
            shape,
            spec.cell.settings,
            rope_base=spec.model.rope_base,
            init_std=recipe.init_std,
            z_loss=recipe.z_loss,
            seed=spec.seed,
        ).to(device)
        self.parameters = workers.distribute(self.model)
        self.optimizer = optimizer.build_optimizer(self.parameters, recipe, spec.batch_tokens)
        compiled = recipe.compile == "on" or (
            recipe.compile == "auto"
            and device.type == "cuda"
            and spec.cell.flops > runtime.COMPILE_FLOPS
        )
        local = spec.batch_sequences // workers.world_size
        micro = runtime.micro_batch(shape, spec.cell.resources, device, local)
        if workers.sharded:  # all must make equally many passes: as many as the fullest device
            micro = -workers.largest(-micro, device)
        self.gradient = GradientMaker(
            model=self.model,
            forward=torch.compile(self.model, dynamic=False) if compiled else self.model,
            parameters=self.parameters,
            tokens=self.corpus.train,
            workers=workers,
            device=device,
            precision=functools.partial(runtime.autocast, device, recipe),
            seed=spec.seed,
            batch_sequences=spec.batch_sequences,
            micro=micro,
        )
        self._resume()

    def to_the_end(
        self, on_branch: Callable[[TrialSpec, TrialOutcome], object] | None = None
    ) -> TrialOutcome:
        """Train, evaluate and sum up; branches as they come."""
        outcome = self._within_memory(self._begin)
        while outcome is None:
            outcome = self._within_memory(self._stretch)
            if outcome is None:
                self._fork(on_branch)
            elif self.trunk is not None and outcome.status != "stopped":
                self._tell(on_branch, self.track, outcome)
                outcome = self._within_memory(self._back_to_trunk)
        if outcome.status in ("diverged", "out_of_memory"):
            for track in self.waiting:
                lost = self._outcome(track, outcome.status, outcome.reason, None, 0.0)
                self._tell(on_branch, track, lost)
        return outcome

    def _within_memory(self, work: Callable[[], TrialOutcome | None]) -> TrialOutcome | None:
        """Do a part of the run. One worker may lack memory: that is the outcome. Others would wait
        for it in vain, so several workers fail together."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
            if self.workers.world_size > 1:
                raise UserError(self._mend()) from error
        reason = f"no memory beside that for the gradient, after {self.step} steps"
        return self._outcome(self.track, "out_of_memory", reason, None, 0.0)

    def _mend(self) -> str:
        """What to tell the user where several workers are out of memory."""
        micro = self._micro or 1
        if not self.workers.sharded:
            mend = "set resources.strategy to fsdp"
        elif micro > 1:
            mend = f"set resources.micro_batch_sequences to {micro // 2} (tried: {micro})"
        else:
            mend = "raise resources.workers"
        return f"worker {self.workers.rank} is out of memory: {mend}"

    def _stretch(self) -> TrialOutcome | None:
        """Train and evaluate; None where a branch begins before."""
        status, reason = self._steps()
        return None if status is None else self._conclude(status, reason)

    def _conclude(self, status: Status, reason: str | None) -> TrialOutcome:
        """Evaluate what has finished."""
        seconds_steps, evaluation = self.seconds, None
        if status == "finished":
            started = time.perf_counter()
            evaluation = evaluate(
                self.model,
                self.corpus.validation,
                sequences=self.spec.validation_sequences,
                batch_sequences=self.gradient.micro,
                workers=self.workers,
                device=self.device,
                precision=self.gradient.precision,
            )
            self.seconds += time.perf_counter() - started
            if not math.isfinite(evaluation.loss):
                status, reason, evaluation = "diverged", "non-finite validation loss", None
        return self._outcome(self.track, status, reason, evaluation, seconds_steps)

    def _tell(
        self,
        on_branch: Callable[[TrialSpec, TrialOutcome], object] | None,
        track: Track,
        outcome: TrialOutcome,
    ) -> None:
        if on_branch is not None and self.workers.rank == 0:
            on_branch(track.spec, outcome)

    def _fork(self, on_branch: Callable[[TrialSpec, TrialOutcome], object] | None) -> None:
        """Leave the run for the branch whose decay begins here."""
        branch = self.waiting.pop(0)
        if branch.diverged:
            lost = self._outcome(branch, "diverged", branch.diverged, None, 0.0)
            self._tell(on_branch, branch, lost)
            return
        self.trunk = snapshot(self._state())
        self.track, self.seconds = branch, 0.0

    def _back_to_trunk(self) -> None:
        self.out_of_memory = False
        assert self.trunk is not None
        self._load(self.trunk)

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self.checkpoints:
            self.checkpoints.wait()

    def _steps(self) -> tuple[Status | None, str | None]:
        """Train to the horizon, to where a branch begins (None), or to what ends the run before."""
        started, before = time.perf_counter(), self.seconds
        due = Timer(self.spec.recipe.checkpoint_seconds)
        track, first, look = self.track, self.step, self.step + 1
        in_branch = self.trunk is not None
        forks = [] if in_branch else [t.leaves_at for t in self.waiting]
        end = min((track.steps, *forks))
        self.model.train()
        while self.step < end:
            self._one_step(track.rate(self.step))
            point = self.step % track.monitor.every == 0 or self.step == end
            if not point and self.step < look:
                continue
            reason = self._read_numbers() if point else None
            seconds = time.perf_counter() - started
            self.seconds = before + seconds
            if self.out_of_memory:
                return "out_of_memory", reason
            if reason:
                return "diverged", reason
            if point:
                tokens = self.step * self.spec.batch_tokens
                self.reporter.report(self.step, tokens, track.monitor.smooth)
            pause = max(1, int(LOOK_SECONDS / (seconds / (self.step - first))))
            stop, save, pause = self._decide(due, min(pause, track.monitor.every))
            look = self.step + pause
            stop = stop and self.step < track.steps
            if (stop or save) and self.checkpoints:
                state = self._state()
                if self.workers.rank == 0:
                    self.checkpoints.save(state)
            if stop:
                return "stopped", f"stopped after {self.step} of {track.steps} steps"
        return (None if self.step < track.steps or forks else "finished"), None

    def _one_step(self, rate: float) -> None:
        recipe = self.spec.recipe
        want_trace = recipe.noise_scale and any(
            track.noise.wants_pair(self.step) for track in self._tracks()
        )
        batch = self.gradient(self.step, want_trace=want_trace)
        if recipe.clip_norm is not None:
            norm = batch.numbers[1].sqrt()
            optimizer.clip(self.parameters.gradients(), norm, recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.model.finish_step()
        self.pending.append(batch.numbers)
        self.rates.append(rate)
        if batch.trace is not None:
            self.traces[self.step] = batch.trace
        self.step += 1

    def _tracks(self) -> list[Track]:
        """Those that the next step belongs to."""
        return [self.track] if self.trunk is not None else [self.track, *self.waiting]

    def _read_numbers(self) -> str | None:
        """Wait for the device and take in the steps since the last time; why it diverged."""
        rows = torch.stack(self.pending).tolist()
        losses, grad_sqs, failed = zip(*rows, strict=True)
        first = self.step - len(rows)
        self.pending.clear()
        if any(failed):
            self.out_of_memory = True
            return f"no memory for one sequence at step {first + 1}"
        traces = {
            step: value
            for step, trace in self.traces.items()
            if not math.isnan(value := trace.item())
        }
        numbers = first, losses, grad_sqs, traces, self.rates
        reason = self.track.add(*numbers)
        if self.trunk is None:
            for track in self.waiting:
                track.add(*numbers)
        self.traces.clear()
        self.rates.clear()
        return reason

    def _decide(self, due: Timer, pause: int) -> tuple[bool, bool, int]:
        """Whether to stop and to save now, and steps to the next look: rank 0 decides for all."""
        leader = self.workers.rank == 0
        stop = leader and self.reporter.should_stop()
        busy = self.checkpoints is not None and self.checkpoints.writing
        save = leader and not busy and due.due()
        if self.workers.world_size == 1:
            return stop, save, pause
        flags = torch.tensor([stop, save, pause if leader else 0], device=self.device).float()
        stop, save, pause = self.workers.sum(flags).tolist()
        return bool(stop), bool(save), int(pause)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "micro": self.gradient.micro,
            "sharded": self.workers.sharded,
            "learned": self.workers.gather_state(self.model, self.optimizer),
            "track": self.track.spec.key,
            "tracks": {t.spec.key: t.state() for t in self._tracks()},
            "pending": self.pending,
            "rates": self.rates,
            "traces": self.traces,
            "trunk": self.trunk,
        }

    def _resume(self) -> None:
        """Take up the checkpoint of an earlier attempt, if there is one."""
        if self.checkpoints is None:
            return
        state = self.checkpoints.load_on_all(self.workers)
        if state is None:
            return
        wanted = {track.spec.key for track in (self.track, *self.waiting)}
        if state["track"] not in wanted:  # a branch whose row stands
            state = state["trunk"]
        self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        """Take up what `_state` gave, on the run or in a branch of it."""
        self.step, self.seconds, self.trunk = state["step"], state["seconds"], state["trunk"]
        self.gradient.micro = min(state["micro"], self.gradient.micro)
        on_run = state if self.trunk is None else self.trunk
        tracks = {t.spec.key: t for t in (Track(self.spec), self.track, *self.waiting)}
        known = {**on_run["tracks"], **state["tracks"]}
        for key, track in tracks.items():
            if key in known:
                track.load(known[key])
        self.track = tracks[state["track"]]
        self.waiting = [
            t for t in self.waiting if t is not self.track and t.spec.key in on_run["tracks"]
        ]
        self.pending = [numbers.to(self.device) for numbers in state["pending"]]
        self.rates = list(state["rates"])
        self.traces = {step: trace.to(self.device) for step, trace in state["traces"].items()}
        self.workers.scatter_state(self.model, self.optimizer, state["learned"])

    @property
    def _micro(self) -> int | None:
        """Sequences at once; None before there is a model."""
        return self.gradient.micro if hasattr(self, "gradient") else None

    def _outcome(
        self,
        track: Track,
        status: Status,
        reason: str | None,
        measured: Evaluation | None,
        seconds_steps: float,
    ) -> TrialOutcome:
        spec, micro = track.spec, self._micro
        local = spec.batch_sequences // self.workers.world_size
        step = track.monitor.step if track.diverged else self.step
        begun = step if track is not self.track else self.trunk["step"] if self.trunk else 0
        trained = (step - begun) * spec.batch_tokens
        return TrialOutcome(
            status=status,
            reason=reason,
            step=step,
            tokens_seen=step * spec.batch_tokens,
            tokens_trained=trained,
            loss=measured and measured.loss,
            loss_se=measured and measured.loss_se,
            bits_per_byte=measured and _bits_per_byte(measured.loss, self.corpus.bytes_per_token),
            train_loss=track.monitor.final_loss,
            seconds_train=self.seconds if track is self.track else 0.0,
            tokens_per_second=trained / seconds_steps if seconds_steps else 0.0,
            peak_memory_bytes=self.workers.largest(runtime.peak_memory(self.device), self.device),
            micro_batch_sequences=micro,
            accumulation=micro and -(-local // micro),
            world_size=self.workers.world_size,
            noise_scale_tokens=_times(track.noise.sequences, spec.cell.shape.sequence_length),
            noise_grad_sq=track.noise.grad_sq,
            noise_trace=track.noise.trace,
            expert_load_entropy=measured and measured.load_entropy,
            expert_load_max_over_mean=measured and measured.load_max_over_mean,
            router_confidence=measured and measured.confidence,
            device=runtime.device_name(self.device),
            curve=track.monitor.curve,
        )


def _bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
