"""Loss and routing on the validation slice, the same for all trials of a study."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from raysweep.data.batches import Batch, too_small_for_validation, validation_batches
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


@dataclass(frozen=True)
class Evaluations:
    """All that is measured of a model at the end of a run."""

    main: Evaluation
    """Of the weights, on the set that the search minimises."""
    averaged: Evaluation | None
    """Of the averaged weights, on the same; None where none are kept."""
    named: dict[str, Evaluation]
    """Of the weights, on each set that has a name."""


def check_validation(tokens: TokenArray, sequences: int, length: int, workers: Workers) -> None:
    """Raises UserError, before any training, where the slice cannot be evaluated."""
    if len(tokens) < sequences * length + 1:
        raise UserError(too_small_for_validation(len(tokens), sequences, length))
    if workers.sharded and sequences < workers.world_size:
        raise UserError(
            f"data.validation_sequences {sequences} are fewer than the {workers.world_size} "
            "workers: raise it"
        )


def evaluate(
    model: Decoder,
    tokens: TokenArray,
    *,
    sequences: int,
    batch_sequences: int,
    workers: Workers,
    device: torch.device,
) -> Evaluation:
    """Measure the slice of `sequences` sequences, each worker its part.

    All batches have one size, so that they share a compiled graph: the last is filled up with
    sequences that do not count.
    """
    shape = model.shape
    losses = torch.zeros(sequences, dtype=torch.float64, device=device)
    load = torch.zeros(model.expert_load.shape, dtype=torch.float64, device=device)
    confidence = torch.zeros(len(load), dtype=torch.float64, device=device)
    size = min(batch_sequences, -(-sequences // workers.world_size))
    batches = validation_batches(
        tokens,
        sequences=sequences,
        sequence_length=shape.sequence_length,
        batch_sequences=size,
        rank=workers.rank,
        world_size=workers.world_size,
    )
    at = workers.rank * sequences // workers.world_size
    for inputs, targets, count in _equal_rounds(batches, sequences, size, workers):
        batch, routing = model.evaluate(
            torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), count
        )
        losses[at : at + count] = batch
        at += count
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
    batches: Iterator[Batch], sequences: int, size: int, workers: Workers
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The batches, filled up to `size`, and how many sequences count; for workers that shard a
    model, then the last one again (0 count) until all have made equally many passes, as gathering
    parameters requires."""
    done = 0
    last: Batch | None = None
    for inputs, targets in batches:
        shape = size, inputs.shape[1]
        last = np.resize(inputs, shape), np.resize(targets, shape)
        yield last[0], last[1], len(inputs)
        done += 1
    most = -(-sequences // workers.world_size)
    while workers.sharded and done < -(-most // size):
        assert last is not None, "check_validation"
        yield last[0], last[1], 0
        done += 1
