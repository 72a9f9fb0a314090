"""Loss and routing on the validation slice, the same for all trials of a study."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from raysweep.data.batches import Batch, validation_batches
from raysweep.data.tokens import TokenArray
from raysweep.errors import UserError
from raysweep.model import Decoder
from raysweep.training.parallel import Workers


@dataclass(frozen=True)
class Evaluation:
    """Of a model on the validation slice; routing is None for dense models."""

    loss: float
    """Mean over the slice, nats a token."""
    loss_se: float
    """Standard deviation of the sequences' losses over the root of their number."""
    load_entropy: float | None
    """Entropy of expert load over its maximum ln E, mean over MoE layers."""
    load_max_over_mean: float | None
    """Load of the busiest expert over the mean, mean over MoE layers."""
    confidence: float | None
    """Probability given to the chosen experts together, mean over tokens and MoE layers."""


def evaluate(
    model: Decoder,
    tokens: TokenArray,
    *,
    sequences: int,
    batch_sequences: int,
    workers: Workers,
    device: torch.device,
    precision: Callable[[], contextlib.AbstractContextManager[object]],
) -> Evaluation:
    """Measure the slice of `sequences` sequences, each worker its part."""
    shape = model.shape
    losses = torch.zeros(sequences, dtype=torch.float64, device=device)
    load = torch.zeros(model.expert_load.shape, dtype=torch.float64, device=device)
    confidence = torch.zeros(len(load), dtype=torch.float64, device=device)
    batches = validation_batches(
        tokens,
        sequences=sequences,
        sequence_length=shape.sequence_length,
        batch_sequences=batch_sequences,
        rank=workers.rank,
        world_size=workers.world_size,
    )
    at = workers.rank * sequences // workers.world_size
    for inputs, targets, counted in _equal_rounds(batches, sequences, batch_sequences, workers):
        with precision():
            batch, routing = model.evaluate(
                torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
            )
        if not counted:
            continue
        losses[at : at + len(batch)] = batch
        at += len(batch)
        if routing is not None:
            load += routing.load
            confidence += routing.confidence
    for tensor in (losses, load, confidence):
        workers.sum(tensor)

    spread = losses.std(correction=1).item() if sequences > 1 else math.nan
    loss, loss_se = losses.mean().item(), spread / math.sqrt(sequences)
    if not len(load):
        return Evaluation(loss, loss_se, None, None, None)
    share = load / load.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1) / math.log(shape.experts)
    busiest = share.amax(1) * shape.experts
    per_token = confidence / (sequences * shape.sequence_length)
    return Evaluation(
        loss, loss_se, entropy.mean().item(), busiest.mean().item(), per_token.mean().item()
    )


def _equal_rounds(
    batches: Iterator[Batch], sequences: int, batch_sequences: int, workers: Workers
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """The batches; for workers that shard a model, then the last one again (False: not to be
    counted) until all have made equally many passes, as gathering parameters requires."""
    done, last = 0, None
    for last in batches:
        yield *last, True
        done += 1
    most = -(-sequences // workers.world_size)
    while workers.sharded and done < -(-most // batch_sequences):
        if last is None:
            raise UserError(
                f"data.validation_sequences {sequences} are fewer than the "
                f"{workers.world_size} workers: raise it"
            )
        yield *last, False
        done += 1
