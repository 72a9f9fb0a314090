"""Batches as pure functions of (seed, step, rank): no state to save, restore or shuffle.

Training walks the corpus in windows of `sequence_length` tokens that do not overlap. Each pass
(epoch) visits every window once, in an order permuted by the seed and from an offset drawn for
that pass. Sequence number `step * batch_sequences + i` decides the window, so that runs of one
seed see the same sequences in the same order whatever their batch size, number of workers or
accumulation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from raysweep.data.tokens import TokenArray
from raysweep.errors import UserError

Batch = tuple[np.ndarray, np.ndarray]
"""Inputs and targets, int64, (sequences, sequence_length); targets are one token ahead. Both are
views of one array, so not contiguous."""

_ROUNDS = 6


def train_batch(
    tokens: TokenArray,
    *,
    seed: int,
    step: int,
    batch_sequences: int,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
    micro: slice | None = None,
) -> Batch:
    """Rank's contiguous part of the global batch at a step, or the slice `micro` of that part.

    Raises UserError where the batch does not divide by the world size, or where the corpus is
    shorter than one sequence.
    """
    part = sequences_each(batch_sequences, world_size)
    start, stop, _ = (micro or slice(None)).indices(part)
    starts = window_starts(
        step * batch_sequences + rank * part + start,
        max(0, stop - start),
        tokens=len(tokens),
        sequence_length=sequence_length,
        seed=seed,
    )
    return _gather(tokens, starts, sequence_length)


def sequences_each(batch_sequences: int, world_size: int) -> int:
    """Sequences of a batch that each worker takes; UserError where it does not divide."""
    if batch_sequences % world_size:
        raise UserError(
            f"a batch of {batch_sequences} sequences does not divide by {world_size} workers: "
            "raise search.batch_sequences.low, or use fewer workers"
        )
    return batch_sequences // world_size


def validation_batches(
    tokens: TokenArray,
    *,
    sequences: int,
    sequence_length: int,
    batch_sequences: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The fixed validation slice, in batches: windows spaced evenly over the validation tokens.

    They do not overlap, and are the same for every seed, batch size and model. Rank r takes a
    contiguous part (parts differ by at most one sequence). Raises UserError where the tokens do
    not suffice.
    """
    spare = len(tokens) - 1 - sequences * sequence_length
    if spare < 0:
        raise UserError(too_small_for_validation(len(tokens), sequences, sequence_length))
    last = len(tokens) - 1 - sequence_length
    starts = np.arange(sequences, dtype=np.int64) * last // max(1, sequences - 1)
    starts = starts[rank * sequences // world_size : (rank + 1) * sequences // world_size]
    for begin in range(0, len(starts), batch_sequences):
        yield _gather(tokens, starts[begin : begin + batch_sequences], sequence_length)


def too_small_for_validation(tokens: int, sequences: int, sequence_length: int) -> str:
    """What to tell a user whose validation data are too few for the slice."""
    return (
        f"the validation data hold {tokens:,} tokens, but {sequences} sequences of "
        f"{sequence_length} need {sequences * sequence_length + 1:,}: lower "
        "data.validation_sequences, raise data.validation_fraction, or give more data"
    )


def windows_per_epoch(tokens: int, sequence_length: int) -> int:
    """Sequences in one pass over that many tokens, the same from every offset of the pass."""
    if tokens < sequence_length + 1:
        raise UserError(
            f"the training data hold {tokens:,} tokens, fewer than one sequence of "
            f"{sequence_length} and its last target: give more data, or lower sequence_length"
        )
    return max(1, tokens // sequence_length - 1)


def window_starts(
    first: int, count: int, *, tokens: int, sequence_length: int, seed: int
) -> np.ndarray:
    """First token of each of `count` training sequences from number `first` on (int64)."""
    windows = windows_per_epoch(tokens, sequence_length)
    starts = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        epoch, index = divmod(first + done, windows)
        here = min(count - done, windows - index)
        order = permute(np.arange(index, index + here), windows, seed, epoch)
        offset = int(_epoch_keys(seed, epoch)[-1]) % (tokens - windows * sequence_length)
        starts[done : done + here] = order * sequence_length + offset
        done += here
    return starts


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Images of the indices under a permutation of range(size), computed without a table.

    A Feistel network over Z_a x Z_b (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"), a and b near sqrt(size), whose few images beyond `size` are permuted again.
    """
    side = math.isqrt(size - 1) + 1
    left_size, right_size = np.uint64(side), np.uint64(-(-size // side))
    keys = _epoch_keys(seed, epoch)
    out = indices.astype(np.uint64)
    beyond = slice(None)
    while True:
        left, right = np.divmod(out[beyond], right_size)
        for round_ in range(0, _ROUNDS, 2):
            left = (left + _scramble(right, keys[round_])) % left_size
            right = (right + _scramble(left, keys[round_ + 1])) % right_size
        out[beyond] = left * right_size + right
        beyond = np.flatnonzero(out >= size)
        if not len(beyond):
            return out.astype(np.int64)


_SHIFT = np.uint64(32)
_FACTORS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


def _scramble(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """32-bit pseudo-random numbers of integers (a multiply-xorshift hash)."""
    mixed = (values + key) * _FACTORS[0]
    mixed ^= mixed >> _SHIFT
    mixed *= _FACTORS[1]
    mixed >>= _SHIFT
    return mixed


@lru_cache(maxsize=64)
def _epoch_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    """One key a round and one for the offset, unrelated between seeds and epochs."""
    digest = hashlib.shake_256(f"{seed}/{epoch}".encode()).digest(8 * (_ROUNDS + 1))
    return tuple(np.frombuffer(digest, dtype="<u8"))


def _gather(tokens: TokenArray, starts: np.ndarray, sequence_length: int) -> Batch:
    rows = np.empty((len(starts), sequence_length + 1), dtype=np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):  # copies beat one fancy index
        row[:] = tokens[start : start + sequence_length + 1]
    return rows[:, :-1], rows[:, 1:]
