"""Token shards: flat binary files of token ids, memory-mapped, read as one array."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

DTYPES = ("uint8", "uint16", "uint32")
_READ_TOKENS = 2**22


class TokenArray(Protocol):
    """What batches need: a one-dimensional array, or shards that slice like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Shard:
    """`count` tokens of a flat binary file, from token `start`."""

    path: Path
    start: int
    count: int


class ShardedTokens:
    """Several shards end to end, read by plain slices (a copy where one crosses a border)."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    @property
    def dtype(self) -> np.dtype:
        return self._parts[0].dtype

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, span: slice, /) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        assert step == 1
        pieces = []
        index = bisect_right(self._ends, start)
        while start < stop:
            base = self._ends[index] - len(self._parts[index])
            end = min(stop, self._ends[index])
            pieces.append(self._parts[index][start - base : end - base])
            start, index = end, index + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype)


def open_shards(shards: Sequence[Shard], dtype: str) -> np.ndarray | ShardedTokens:
    """Map the shards read-only; nothing is read yet. One shard is a plain array over a memmap."""
    item = np.dtype(dtype).newbyteorder("<")
    parts = [
        np.asarray(np.memmap(s.path, item, "r", offset=s.start * item.itemsize, shape=(s.count,)))
        for s in shards
    ]
    if not parts:
        return np.empty(0, dtype=item)
    return parts[0] if len(parts) == 1 else ShardedTokens(parts)


def fingerprint(*arrays: TokenArray) -> tuple[str, int]:
    """Hash of token arrays, whatever files they are spread over, and their largest id."""
    lengths = [len(tokens) for tokens in arrays]
    total = hashlib.sha256(repr(lengths).encode())
    largest = 0
    for tokens in arrays:
        for start in range(0, len(tokens), _READ_TOKENS):
            block = tokens[start : start + _READ_TOKENS]
            total.update(block.dtype.str.encode())
            total.update(block.data)
            largest = max(largest, int(block.max()))
    return total.hexdigest()[:32], largest


def smallest_dtype(vocab_size: int) -> str:
    """The narrowest unsigned type that holds every id."""
    return next(name for name in DTYPES if vocab_size <= 2 ** (8 * np.dtype(name).itemsize))
