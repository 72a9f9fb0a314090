"""The outcome of a run, or of a branch of it, from its state and its evaluation."""

from __future__ import annotations

import math

from raysweep.training import runtime
from raysweep.training.evaluate import Evaluation, Evaluations
from raysweep.training.horizon_metrics import HorizonMetrics
from raysweep.training.learner import Learner
from raysweep.training.outcome import Status, TrialOutcome
from raysweep.training.run_state import Pace, RunState


def make_outcome(
    state: RunState,
    learner: Learner,
    metrics: HorizonMetrics,
    status: Status,
    reason: str | None,
    evaluations: Evaluations | None = None,
) -> TrialOutcome:
    """The outcome at a horizon: the current one, or one that waited and is lost with the run.

    All workers must call this.
    """
    evaluation = evaluations and evaluations.main
    averaged = evaluations and evaluations.averaged
    spec, workers, device, micro = metrics.spec, learner.workers, learner.device, learner.micro
    current = metrics is state.metrics
    # One that diverged was told of no steps after, though the run may have made some.
    step = metrics.monitor.step if metrics.diverged else state.step
    trained = (step - state.begun) * spec.batch_tokens if current else 0
    local_sequences = spec.batch_sequences // workers.world_size
    pace = state.pace if current else Pace()
    noise_sequences = metrics.noise.sequences
    return TrialOutcome(
        status=status,
        reason=reason,
        step=step,
        tokens_seen=step * spec.batch_tokens,
        tokens_trained=trained,
        loss=evaluation and evaluation.loss,
        loss_se=evaluation and evaluation.loss_se,
        loss_ema=averaged and averaged.loss,
        loss_ema_se=averaged and averaged.loss_se,
        named_losses={n: (e.loss, e.loss_se) for n, e in evaluations.named.items()}
        if evaluations
        else {},
        bits_per_byte=evaluation and _bits_per_byte(evaluation, learner.corpus.bytes_per_token),
        train_loss=metrics.monitor.final_loss,
        seconds_train=state.seconds if current else 0.0,
        tokens_per_second=pace.steps * spec.batch_tokens / pace.seconds if pace.steps else 0.0,
        peak_memory_bytes=workers.largest(runtime.peak_memory(device), device),
        micro_batch_sequences=micro,
        accumulation=micro and -(-local_sequences // micro),
        world_size=workers.world_size,
        noise_scale_tokens=noise_sequences and noise_sequences * spec.cell.shape.sequence_length,
        noise_grad_sq=metrics.noise.grad_sq,
        noise_trace=metrics.noise.trace,
        noise_quarters=metrics.noise.along,
        expert_load_entropy=evaluation and evaluation.load_entropy,
        expert_load_max_over_mean=evaluation and evaluation.load_max_over_mean,
        router_confidence=evaluation and evaluation.confidence,
        device=runtime.device_name(device),
        curve=metrics.monitor.curve,
    )


def _bits_per_byte(evaluation: Evaluation, bytes_per_token: float | None) -> float | None:
    return evaluation.loss / math.log(2) / bytes_per_token if bytes_per_token else None
