"""The user's own token shards: checked once, then mapped where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.data.tokens import Shard, fingerprint, open_shards
from raysweep.errors import UserError
from raysweep.study.schema import Data

_HEADERS = {
    b"\x93NUMPY": "a NumPy file",
    (20240520).to_bytes(4, "little"): "a shard with a header of 1024 bytes",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
    b"MMIDIDX": "an index, not tokens",
}
"""Known beginnings of files that are not flat: their headers would be read as tokens."""


def describe_shards(
    data: Data,
    files: Sequence[Path],
    held_out: Sequence[Sequence[Path]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The part of the manifest that says which tokens are training and which validation.

    A validation set is its files, else the last `validation_fraction` of the tokens. All tokens are
    read once, for their hash and to check that they are below the vocabulary size.
    """
    train = [_shard(path, data.token_dtype) for path in files]
    if data.max_megabytes is not None:
        limit = int(data.max_megabytes * 1e6) // np.dtype(data.token_dtype).itemsize
        train = _cut(train, 0, limit)
    sets = [[_shard(path, data.token_dtype) for path in paths] for paths in held_out]
    if not all(sets):
        total = _count(train)
        border = total - int(total * data.validation_fraction)
        share, train = _cut(train, border, total), _cut(train, 0, border)
        sets = [shards or share for shards in sets]
    assert data.vocab_size is not None
    everything = (train, *sets)
    say(f"corpus: checking {sum(map(_count, everything)):,} tokens")
    digest, largest = fingerprint(*(open_shards(split, data.token_dtype) for split in everything))
    if largest >= data.vocab_size:
        shards = [shard for split in everything for shard in split]
        raise UserError(
            f"{_holder(largest, shards, data.token_dtype)} holds token {largest}, "
            f"but data.vocab_size is {data.vocab_size}: raise it, or check data.token_dtype "
            f"({data.token_dtype})"
        )
    return {
        "in_place": True,
        "dtype": data.token_dtype,
        **splits(data, [_entry(split) for split in everything], digest),
        "bytes_per_token": None,
    }


def splits(data: Data, entries: Sequence[dict[str, Any]], digest: str) -> dict[str, Any]:
    """The manifest's splits: training, the set that is minimised, the others by name; and the hash,
    which knows the names."""
    train, validation, *others = entries
    found = {"train": train, "validation": validation, "hash": digest}
    names = data.validation_sets
    if names:
        found["named"] = dict(zip(names[1:], others, strict=True))
        found["content"] = digest
        found["hash"] = hashlib.sha256(repr((digest, names)).encode()).hexdigest()[:32]
    return found


def _shard(path: Path, dtype: str) -> Shard:
    item = np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check data.paths") from None
    for magic, kind in _HEADERS.items():
        if start.startswith(magic):
            raise UserError(f"{path} is {kind}: token shards must be flat {dtype} without header")
    if not size:
        raise UserError(f"{path} is empty: drop it from data.paths")
    if size % item:
        raise UserError(
            f"{path} has {size} bytes, no multiple of {item}: check data.token_dtype ({dtype})"
        )
    return Shard(path, 0, size // item)


def _holder(token: int, shards: Sequence[Shard], dtype: str) -> Path:
    """The first file whose largest token is the given one."""
    return next(s.path for s in shards if fingerprint(open_shards([s], dtype))[1] == token)


def _cut(shards: Sequence[Shard], start: int, stop: int) -> list[Shard]:
    """The part from token `start` to `stop` of the shards laid end to end."""
    kept: list[Shard] = []
    base = 0
    for shard in shards:
        first, last = max(start - base, 0), min(stop - base, shard.count)
        if first < last:
            kept.append(Shard(shard.path, shard.start + first, last - first))
        base += shard.count
    return kept


def _count(shards: Sequence[Shard]) -> int:
    return sum(shard.count for shard in shards)


def _entry(shards: Sequence[Shard]) -> dict[str, Any]:
    listed = [{"path": str(s.path), "start": s.start, "count": s.count} for s in shards]
    return {"tokens": _count(shards), "shards": listed}
