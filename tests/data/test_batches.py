"""Batches are pure functions of seed, step and rank, and visit the corpus without repetition."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from raysweep.data.batches import (
    permute,
    train_batch,
    validation_batches,
    window_starts,
    windows_per_epoch,
)
from raysweep.data.tokens import Shard, ShardedTokens, open_shards
from raysweep.errors import UserError

TOKENS = np.arange(1003, dtype=np.uint32)
"""Tokens that name their own position."""

seeds = st.integers(0, 2**31 - 1)


@given(size=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 10**6))
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    images = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(images), np.arange(size))


@given(size=st.integers(1, 10**15), seed=seeds, data=st.data())
def test_permute_of_a_part_is_part_of_the_permutation(size: int, seed: int, data) -> None:
    index = data.draw(st.integers(0, size - 1))
    indices = np.unique([0, index, size - 1])
    images = permute(indices, size, seed, 3)
    assert len(np.unique(images)) == len(indices)
    assert images.min() >= 0
    assert images.max() < size
    alone = permute(np.array([index]), size, seed, 3)
    assert alone[0] == images[np.searchsorted(indices, index)]


@pytest.mark.parametrize("size", [2, 7, 40])
def test_permute_sends_every_index_everywhere_alike(size: int) -> None:
    images = np.array([permute(np.arange(size), size, seed, 0) for seed in range(4000)])
    for column in images.T[:: max(1, size // 5)]:
        counts = np.bincount(column, minlength=size)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_permute_leaves_no_order_behind() -> None:
    images = permute(np.arange(20_000), 20_000, 5, 0)
    for lag in (1, 2, 141, 142):  # 142 is about the side of the Feistel square
        assert abs(np.corrcoef(images[lag:], images[:-lag])[0, 1]) < 0.03
    other = permute(np.arange(20_000), 20_000, 5, 1)
    assert abs(np.corrcoef(images, other)[0, 1]) < 0.03


@given(
    seed=seeds,
    step=st.integers(0, 500),
    part=st.integers(1, 6),
    world_size=st.integers(1, 5),
    cut=st.integers(0, 6),
)
def test_ranks_and_micro_batches_make_up_the_same_global_batch(
    seed: int, step: int, part: int, world_size: int, cut: int
) -> None:
    settings: dict[str, Any] = {
        "seed": seed,
        "step": step,
        "batch_sequences": part * world_size,
        "sequence_length": 16,
    }
    whole = train_batch(TOKENS, **settings)
    pieces = [
        train_batch(TOKENS, **settings, rank=rank, world_size=world_size, micro=micro)
        for rank in range(world_size)
        for micro in (slice(0, cut), slice(cut, None))
    ]
    for side in (0, 1):
        assert np.array_equal(np.concatenate([piece[side] for piece in pieces]), whole[side])


@given(seed=seeds, batches=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 3, 24])))
def test_data_order_does_not_depend_on_the_batch_size(seed: int, batches: tuple[int, int]) -> None:
    orders = []
    for batch in batches:
        settings: dict[str, Any] = {"seed": seed, "batch_sequences": batch, "sequence_length": 16}
        steps = range(48 // batch)
        orders.append([train_batch(TOKENS, step=step, **settings)[0] for step in steps])
    assert np.array_equal(np.concatenate(orders[0]), np.concatenate(orders[1]))


@given(seed=seeds, tokens=st.integers(17, 1003), length=st.sampled_from([2, 5, 16]))
def test_an_epoch_visits_windows_once_and_without_overlap(
    seed: int, tokens: int, length: int
) -> None:
    corpus = TOKENS[:tokens]
    windows = windows_per_epoch(tokens, length)
    inputs, targets = train_batch(
        corpus, seed=seed, step=1, batch_sequences=windows, sequence_length=length
    )
    assert inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(targets, inputs + 1)
    assert len(np.unique(inputs)) == inputs.size  # no token is an input twice
    assert inputs.size > tokens - 2 * length or windows == 1  # and few are left out


def test_a_batch_may_span_several_epochs() -> None:
    starts = window_starts(0, 50, tokens=100, sequence_length=16, seed=1)
    windows = windows_per_epoch(100, 16)
    for epoch in range(50 // windows):
        one = starts[epoch * windows : (epoch + 1) * windows]
        assert np.all(np.diff(np.sort(one)) == 16)
    assert len({int(s) % 16 for s in starts}) > 1  # each pass starts at its own offset


def test_the_seed_decides_the_order() -> None:
    settings: dict[str, Any] = {"step": 0, "batch_sequences": 8, "sequence_length": 16}
    first, again, other = (train_batch(TOKENS, seed=s, **settings)[0] for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.data())
def test_shards_read_like_one_array(borders: list[int], data) -> None:
    flat = np.arange(400, dtype=np.uint16)
    sharded = ShardedTokens(np.split(flat, sorted(borders)))
    assert len(sharded) == len(flat)
    start = data.draw(st.integers(0, 400))
    stop = data.draw(st.integers(0, 420))
    assert np.array_equal(sharded[start:stop], flat[start:stop])
    settings: dict[str, Any] = {"seed": 3, "step": 2, "batch_sequences": 6, "sequence_length": 9}
    assert np.array_equal(train_batch(sharded, **settings)[1], train_batch(flat, **settings)[1])


def test_open_shards_maps_parts_of_files(tmp_path) -> None:
    for name, first in (("a.bin", 0), ("b.bin", 100)):
        np.arange(first, first + 100, dtype="<u2").tofile(tmp_path / name)
    shards = [Shard(tmp_path / "a.bin", 90, 10), Shard(tmp_path / "b.bin", 0, 5)]
    assert np.array_equal(open_shards(shards, "uint16")[0:15], np.arange(90, 105))
    one = open_shards(shards[:1], "uint16")
    assert isinstance(one, np.ndarray)
    assert isinstance(one.base, np.memmap)


def test_validation_is_one_fixed_evenly_spaced_slice() -> None:
    def read(batch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        settings: dict[str, Any] = {
            "sequences": 13,
            "sequence_length": 16,
            "batch_sequences": batch,
        }
        parts = validation_batches(TOKENS, **settings, rank=rank, world_size=world_size)
        pairs = list(parts)
        assert all(np.array_equal(inputs + 1, targets) for inputs, targets in pairs)
        return np.concatenate([inputs for inputs, _ in pairs])

    whole = read(4)
    assert whole.shape == (13, 16)
    assert len(np.unique(whole)) == whole.size
    assert whole[0, 0] == 0
    assert whole[-1, -1] == len(TOKENS) - 2
    assert np.ptp(np.diff(whole[:, 0])) <= 1
    assert np.array_equal(read(13), whole)
    assert np.array_equal(np.concatenate([read(4, rank, 3) for rank in range(3)]), whole)


def test_validation_may_use_every_token() -> None:
    settings: dict[str, Any] = {"sequences": 6, "sequence_length": 5, "batch_sequences": 6}
    ((inputs, _),) = validation_batches(TOKENS[:31], **settings)
    assert np.array_equal(inputs.ravel(), np.arange(30))
    with pytest.raises(UserError, match=r"30 tokens.*need 31.*validation_sequences"):
        next(validation_batches(TOKENS[:30], **settings))


def test_impossible_batches_are_the_users_errors() -> None:
    settings: dict[str, Any] = {"seed": 0, "step": 0, "sequence_length": 16}
    with pytest.raises(UserError, match="6 sequences does not divide by 4 workers"):
        train_batch(TOKENS, batch_sequences=6, world_size=4, **settings)
    with pytest.raises(UserError, match="fewer than one sequence"):
        train_batch(TOKENS[:16], batch_sequences=1, **settings)
