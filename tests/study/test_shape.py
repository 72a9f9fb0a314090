"""Counts and derived shapes, against sums done by hand."""

import pytest

from raysweep.errors import UserError
from raysweep.study import Study
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


def space(**changes) -> dict:
    given = {
        "study": "s",
        "architectures": {"moe": {"experts": 8, "top_k": 2}},
        "model": {"sequence_length": 16},
        "scales": [{"d_model": 32, "layers": 1, "heads": 2}],
        "horizons": [{"tokens": 1e5}],
    }
    return {**given, **changes}


@pytest.mark.parametrize("multiple", [1, 2, 8, 12])
def test_experts_are_as_wide_as_their_kernel_takes(multiple: int) -> None:
    model = {"sequence_length": 16, "ffn_multiple": multiple}
    (cell,) = Study.from_dict(space(model=model)).cells
    assert cell.shape.expert_ff % 8 == 0


@pytest.mark.parametrize(
    ("d_model", "changes", "mend"),
    [
        (30, {}, "multiple of 4 .*: use 32"),
        (100, {}, None),
        (100, {"resources": {"gpus_per_worker": 1}}, "multiple of 8 .*: use 96"),
        (100, {"recipe": {"precision": "bfloat16"}}, "multiple of 8"),
        (100, {"architectures": {"dense": {}}, "resources": {"gpus_per_worker": 1}}, None),
    ],
)
def test_shapes_that_the_experts_kernel_refuses(d_model: int, changes: dict, mend: str) -> None:
    scales = [{"d_model": d_model, "layers": 1, "heads": 5}]
    if mend is None:
        assert Study.from_dict(space(scales=scales, **changes)).cells
    else:
        with pytest.raises(UserError, match=f"d_model {d_model} .*{mend}"):
            Study.from_dict(space(scales=scales, **changes))


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"resources": {"gpus_per_worker": 8}}, "set workers: 8 and gpus_per_worker: 1"),
        (
            {
                "resources": {"workers": 8, "strategy": "fsdp"},
                "data": {"validation_sequences": 4},
            },
            "validation_sequences 4 is less than 8 workers",
        ),
        (
            {
                "resources": {"workers": 8},
                "search": {"batch_sequences": {"low": 1, "high": 4, "hard_high": 4}},
            },
            "hard_high 4 is less than 8 workers",
        ),
    ],
)
def test_workers_that_would_have_nothing_to_do(changes: dict, mend: str) -> None:
    with pytest.raises(ValueError, match=mend):
        Study.from_dict(space(**changes))


def test_a_trials_key_is_of_what_its_result_depends_on() -> None:
    def key(**changes) -> str:
        study = Study.from_dict(space(**changes))
        return study.trial(study.cells[0], "data", 1e-3, 8, 0).key

    plain = key()
    for same in (
        {"resources": {"workers": 2, "strategy": "hsdp"}},
        {"search": {"batch_sequences": {"low": 2}}},
        {"recipe": {"compile": "on", "noise_scale": False}},
    ):
        assert key(**same) == plain
    routed = {"experts": 8, "top_k": 2}
    others = [key(architectures={"moe": routed | changed}) for changed in (
        {"scores": "sigmoid"}, {"balance": "bias"}, {"balance": "bias", "scores": "sigmoid"}
    )]  # fmt: skip
    assert len({plain, *others}) == 4
