"""The training loop: one trial from its specification to its outcome, without Ray."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import torch
from torch import Tensor

from raysweep.config.study import TrialSpec
from raysweep.data.corpus import Corpus
from raysweep.errors import UserError
from raysweep.model import build
from raysweep.results.filesystem import Storage
from raysweep.training import optimizer, runtime, schedule
from raysweep.training.checkpoint import Checkpoints, Timer
from raysweep.training.evaluate import Evaluation, evaluate
from raysweep.training.monitor import Monitor
from raysweep.training.noise_scale import NoiseScale
from raysweep.training.outcome import Reporter, Silent, Status, TrialOutcome
from raysweep.training.parallel import Workers
from raysweep.training.step import GradientMaker

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
) -> TrialOutcome:
    """Train one model and measure it.

    The result is a function of `spec` and the corpus alone: on CPUs bit for bit, whatever ran in
    the process before. Divergence and lack of memory are outcomes, not errors. Where `checkpoints`
    can be kept, a run that was killed goes on from its last one. With several `workers`, all call
    this with the same arguments and get the same outcome. Raises UserError where the batch does
    not divide by the workers, or the corpus is too small.
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
        run = _Run(spec, corpus, device, workers, reporter or Silent(), checkpoints)
        try:
            return run.to_the_end()
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
    ) -> None:
        self.spec, self.corpus, self.device, self.workers = spec, corpus, device, workers
        self.reporter = reporter
        self.checkpoints = None
        if storage is not None and spec.recipe.checkpoint_seconds:
            self.checkpoints = Checkpoints(storage, spec.key)
        recipe, shape = spec.recipe, spec.cell.shape
        self.horizon = spec.steps * spec.batch_tokens
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
        self.gradient = GradientMaker(
            model=self.model,
            forward=torch.compile(self.model, dynamic=False) if compiled else self.model,
            parameters=self.parameters,
            tokens=corpus.train,
            workers=workers,
            device=device,
            precision=functools.partial(runtime.autocast, device, recipe),
            seed=spec.seed,
            batch_sequences=spec.batch_sequences,
            micro=runtime.micro_batch(shape, spec.cell.resources, device, local),
        )
        self.monitor = Monitor(spec.steps, spec.batch_tokens)
        self.noise = NoiseScale(spec.steps, spec.batch_sequences)
        self.step = 0
        self.seconds = 0.0
        self.out_of_memory = False
        self.pending: list[Tensor] = []
        self.traces: list[Tensor] = []

    def to_the_end(self) -> TrialOutcome:
        """Train, evaluate and sum up."""
        self._resume()
        status, reason = self._steps()
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
        if self.checkpoints and self.workers.rank == 0 and status != "stopped":
            self.checkpoints.remove()
        return self._outcome(status, reason, evaluation, seconds_steps)

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self.checkpoints:
            self.checkpoints.wait()

    def _steps(self) -> tuple[Status, str | None]:
        """Train to the horizon or to whatever ends the run before it."""
        spec, recipe = self.spec, self.spec.recipe
        started, before = time.perf_counter(), self.seconds
        due = Timer(recipe.checkpoint_seconds)
        first, look = self.step, self.step + 1
        self.model.train()
        while self.step < spec.steps:
            rate = schedule.learning_rate(
                recipe, spec.learning_rate, (self.step + 0.5) * spec.batch_tokens, self.horizon
            )
            self._one_step(rate)
            point = self.step % self.monitor.every == 0 or self.step == spec.steps
            if not point and self.step < look:
                continue
            reason = self._read_numbers(rate) if point else None
            seconds = time.perf_counter() - started
            self.seconds = before + seconds
            if self.out_of_memory:
                return "out_of_memory", reason
            if reason:
                return "diverged", reason
            if point:
                self.reporter.report(self.step, self.step * spec.batch_tokens, self.monitor.smooth)
            pause = max(1, int(LOOK_SECONDS / (seconds / (self.step - first))))
            stop, save, pause = self._decide(due, min(pause, self.monitor.every))
            look = self.step + pause
            stop = stop and self.step < spec.steps
            if (stop or save) and self.checkpoints:
                state = self._state()
                if self.workers.rank == 0:
                    self.checkpoints.save(state)
            if stop:
                return "stopped", f"stopped after {self.step} of {spec.steps} steps"
        return "finished", None

    def _one_step(self, rate: float) -> None:
        recipe = self.spec.recipe
        want_trace = recipe.noise_scale and self.noise.wants_pair(self.step)
        batch = self.gradient(self.step, want_trace=want_trace)
        if recipe.clip_norm is not None:
            norm = batch.numbers[1].sqrt()
            optimizer.clip(self.parameters.gradients(), norm, recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.model.finish_step()
        self.pending.append(batch.numbers)
        if batch.trace is not None:
            self.traces.append(batch.trace)
        self.step += 1

    def _read_numbers(self, rate: float) -> str | None:
        """Wait for the device and take in the steps since the last time; why it diverged."""
        rows = torch.stack(self.pending).tolist()
        losses, grad_sqs, failed = zip(*rows, strict=True)
        first = self.step - len(rows)
        self.pending.clear()
        if any(failed):
            self.out_of_memory = True
            return f"no memory for one sequence at step {first + 1}"
        reason = self.monitor.add(losses, [math.sqrt(sq) for sq in grad_sqs], rate)
        for step, sq in enumerate(grad_sqs, start=first):
            if self.noise.counts(step):
                self.noise.add_norm(sq)
        for trace in self.traces:
            self.noise.add_trace(trace.item())
        self.traces.clear()
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
            "learned": self.workers.gather_state(self.model, self.optimizer),
            "monitor": self.monitor.state(),
            "noise": self.noise.state(),
            "pending": self.pending,
            "traces": self.traces,
        }

    def _resume(self) -> None:
        """Take up the checkpoint of an earlier attempt, if there is one."""
        if self.checkpoints is None:
            return
        state = self.checkpoints.load() if self.workers.rank == 0 else None
        state = self.workers.from_leader(state)
        if state is None:
            return
        self.step, self.seconds, self.gradient.micro = (
            state["step"],
            state["seconds"],
            state["micro"],
        )
        self.workers.scatter_state(self.model, self.optimizer, state["learned"])
        self.monitor.load(state["monitor"])
        self.noise = NoiseScale(**state["noise"])
        self.pending = [numbers.to(self.device) for numbers in state["pending"]]
        self.traces = [trace.to(self.device) for trace in state["traces"]]

    def _outcome(
        self, status: Status, reason: str | None, measured: Evaluation | None, seconds_steps: float
    ) -> TrialOutcome:
        spec, gradient = self.spec, self.gradient
        tokens = self.step * spec.batch_tokens
        return TrialOutcome(
            status=status,
            reason=reason,
            step=self.step,
            tokens_seen=tokens,
            loss=measured and measured.loss,
            loss_se=measured and measured.loss_se,
            bits_per_byte=measured and _bits_per_byte(measured.loss, self.corpus.bytes_per_token),
            train_loss=self.monitor.final_loss,
            seconds_train=self.seconds,
            tokens_per_second=tokens / seconds_steps if seconds_steps else 0.0,
            peak_memory_bytes=runtime.peak_memory(self.device),
            micro_batch_sequences=gradient.micro,
            accumulation=-(-gradient.local_sequences // gradient.micro),
            world_size=self.workers.world_size,
            noise_scale_tokens=_times(self.noise.sequences, spec.cell.shape.sequence_length),
            noise_grad_sq=self.noise.grad_sq,
            noise_trace=self.noise.trace,
            expert_load_entropy=measured and measured.load_entropy,
            expert_load_max_over_mean=measured and measured.load_max_over_mean,
            router_confidence=measured and measured.confidence,
            device=runtime.device_name(self.device),
            curve=self.monitor.curve,
        )


def _bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
