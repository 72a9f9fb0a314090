"""Counts and derived shapes, against sums done by hand."""

import pytest

from raysweep.errors import UserError
from raysweep.study.shape import ModelShape, count, derive_width_depth

SHAPE = ModelShape(
    d_model=8, layers=2, heads=2, kv_heads=1, d_ff=24, vocab_size=10, sequence_length=16
)


def test_dense_counts_by_hand() -> None:
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v of one head of 4, output
    norms = 2 * 8 + 2 * 4
    non_embedding = 2 * (attention + norms + 3 * 8 * 24) + 8
    counts = count(SHAPE)
    assert counts.params_total_non_embedding == counts.params_active_non_embedding == non_embedding
    assert counts.params_total == non_embedding + 2 * 10 * 8
    matmuls = 2 * (2 * (attention + 3 * 8 * 24) + 8 * 10)
    scores = 2 * (2 * 2 * 8) * (16 + 1) / 2
    assert counts.flops_per_token == 3 * (matmuls + scores)


def test_moe_counts_total_and_active_apart() -> None:
    moe = ModelShape(
        **{
            **SHAPE.__dict__,
            "experts": 4,
            "top_k": 2,
            "shared_experts": 1,
            "expert_ff": 8,
            "moe_layers": (1,),
        }
    )
    dense, counts = count(SHAPE), count(moe)
    expert, router = 3 * 8 * 8, 8 * 4
    rest = dense.params_total_non_embedding - 3 * 8 * 24
    assert counts.params_total_non_embedding == rest + router + 5 * expert
    assert counts.params_active_non_embedding == rest + router + 3 * expert
    assert moe.dense_twin() == SHAPE


def test_tied_embeddings_are_counted_once() -> None:
    tied = ModelShape(**{**SHAPE.__dict__, "tie_embeddings": True})
    assert count(SHAPE).params_total - count(tied).params_total == 10 * 8


@pytest.mark.parametrize("params", [1e5, 2e7, 1.25e8, 1e9, 7e9, 7e10])
def test_derived_shapes_come_close_to_their_target(params: float) -> None:
    head_dim = 16 if params < 1e6 else 64
    d_model, layers = derive_width_depth(
        params, head_dim=head_dim, aspect_ratio=64, ffn_ratio=8 / 3, ffn_multiple=8
    )
    d_ff = round(8 / 3 * d_model / 8) * 8
    heads = d_model // head_dim
    shape = ModelShape(
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        d_ff=d_ff,
        vocab_size=256,
        sequence_length=64,
    )
    assert count(shape).params_active_non_embedding == pytest.approx(params, rel=0.08)
    if params >= 1e8:
        assert 32 <= d_model / layers <= 128


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"heads": 3}, "must split into 3 heads"),
        ({"heads": 8}, "heads of an even size"),
        ({"kv_heads": 3}, "must be a multiple of kv_heads"),
        ({"experts": 4, "top_k": 5, "expert_ff": 8, "moe_layers": (0,)}, "top_k 5 must lie"),
        ({"experts": 4, "top_k": 1}, "needs expert_ff"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_impossible_shapes(change: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        ModelShape(**{**SHAPE.__dict__, **change})
