"""One global batch to one gradient: micro-batches, out-of-memory, pairs for the noise scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysweep.data.batches import train_batch
from raysweep.data.tokens import TokenArray
from raysweep.model import Decoder
from raysweep.training import noise_scale, runtime
from raysweep.training.optimizer import Parameters, squared_norm
from raysweep.training.parallel import Workers


@dataclass(frozen=True)
class BatchGradient:
    """What a global batch gave; its gradient, averaged over workers, lies in the parameters."""

    numbers: Tensor
    """(3,): mean cross-entropy in nats a token; squared norm of the gradient; how many workers
    had not even the memory for one sequence, which makes the other two worthless."""
    trace: Tensor | None
    """An estimate of tr S, where one was asked for and could be made; NaN where a worker lacked
    the memory for it."""


@dataclass
class GradientAccumulator:
    """Turns steps into gradients. `micro` shrinks when memory runs out, never the batch."""

    model: Decoder
    parameters: Parameters
    tokens: TokenArray
    workers: Workers
    device: torch.device
    seed: int
    batch_sequences: int
    micro: int
    """Sequences this worker puts through the model at once."""

    @property
    def local_sequences(self) -> int:
        return self.batch_sequences // self.workers.world_size

    def __call__(self, step: int, *, want_trace: bool) -> BatchGradient:
        """The gradient of a step's batch. Out of memory is retried without the trace, which takes
        a copy of the gradient, then with half the micro-batch; only workers that shard a model
        cannot agree on that, so there the error passes on."""
        result, failed, tracing = None, False, want_trace
        while result is None:
            try:
                result = self._accumulate(step, tracing)
            except (RuntimeError, MemoryError) as error:
                if not runtime.is_out_of_memory(error) or self.workers.sharded:
                    raise
                failed = self.micro == 1 and not tracing
            if failed:
                # The other workers still wait for this one's part of the sums.
                self.parameters.zero()
                result = torch.zeros((), device=self.device), None
            elif result is None:
                # Outside the handler, whose traceback keeps the failed step's tensors alive.
                if not tracing:
                    self.micro //= 2
                tracing = False
                self.model.expert_load.zero_()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return self._share(*result, want_trace, failed)

    def _accumulate(self, step: int, want_trace: bool) -> tuple[Tensor, Tensor | None]:
        """Sum micro-batches into the gradient; the mean loss, and tr S from the first two."""
        local = self.local_sequences
        size = max(1, min(self.micro, local // 2)) if want_trace else self.micro
        first: list[Tensor] | None = None
        trace = None
        total = torch.zeros((), device=self.device)
        self.parameters.zero()
        for begin in range(0, local, size):
            inputs, targets = train_batch(
                self.tokens,
                seed=self.seed,
                step=step,
                batch_sequences=self.batch_sequences,
                sequence_length=self.model.shape.sequence_length,
                rank=self.workers.rank,
                world_size=self.workers.world_size,
                micro=slice(begin, begin + size),
            )
            share = len(inputs) / local
            losses = self.model(self._upload(inputs), self._upload(targets))
            (losses.objective * share).backward()
            total += losses.cross_entropy * share
            if want_trace and begin == 0 and size < local:
                first = [g.clone() for g in self.parameters.gradients()]
            elif first is not None:
                # What has been summed is (g1 + g2) share: take g1 share off twice, in place.
                for g, g1 in zip(self.parameters.gradients(), first, strict=True):
                    g1.mul_(-2).add_(g)
                trace = noise_scale.trace_of_pair(1.0, size) * squared_norm(first) / share**2
                first = None
        return total, trace

    def _share(
        self, loss: Tensor, trace: Tensor | None, want_trace: bool, failed: bool
    ) -> BatchGradient:
        """Average loss, gradient and tr S over the workers; sum expert loads."""
        workers, gradients = self.workers, self.parameters.gradients()
        n, sharded = workers.world_size, workers.sharded
        in_pairs = want_trace and self.local_sequences > 1
        by_worker = want_trace and not in_pairs and n > 1 and not sharded
        alone = squared_norm(gradients) if by_worker else None
        workers.mean_gradient(gradients)
        if len(self.model.expert_load):
            workers.sum(self.model.expert_load)
        grad_sq = workers.sum_of_parts(squared_norm(gradients))
        lost = torch.full_like(loss, float(failed))
        numbers = workers.sum(torch.stack([loss, grad_sq, lost]))
        if n > 1:
            numbers[:2] /= n
        if in_pairs:
            trace = torch.full_like(loss, math.nan) if trace is None else trace
            # Of sharded models each worker holds a shard of a pair n times the size.
            trace = workers.sum_of_parts(trace) * n if sharded else workers.sum(trace) / n
        elif alone is not None:
            unit = noise_scale.trace_of_workers(1.0, 0.0, self.local_sequences, n)
            trace = unit * (workers.sum(alone) / n - grad_sq)
        return BatchGradient(numbers, trace)

    def _upload(self, batch: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(batch)
        if self.device.type == "cuda":
            return tensor.contiguous().pin_memory().to(self.device, non_blocking=True)
        return tensor
