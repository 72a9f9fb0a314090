"""What an answer warns of: how far it lies outside the cells, by axis and in both directions."""

import pytest

from raysweep.scaling.cautions import FAR, far, no_law, reach
from raysweep.scaling.fits import fit


@pytest.fixture(scope="module")
def dense(planted_study):
    return fit(planted_study(noise=0.0), n_boot=5)


def long(answer) -> list[str]:
    return [w for w in answer.warnings if w.startswith("a long extrapolation")]


@pytest.mark.parametrize(
    ("times_params", "times_tokens", "said"),
    [
        (1.0, 1.0, None),
        (9.0, 1.0, None),
        (1.0, 9.0, None),
        (12.0, 0.05, "beyond the cells by 12x in params"),  # the FLOPs say nothing
        (0.05, 12.0, "beyond the cells by 12x in tokens"),
        (0.001, 1.0, "in params"),
        (1.0, 1e-4, "in tokens"),
        (7.0, 7.0, "beyond the cells by 49x in FLOPs"),
    ],
)
def test_every_axis_and_direction_is_watched(dense, times_params, times_tokens, said) -> None:
    cells = dense.cells
    params = times_params * cells["params_active_non_embedding"].max()
    tokens = times_tokens * cells["tokens"].max()
    warnings = long(dense.recommend("dense", params, tokens))
    assert len(warnings) == (said is not None)
    if said:
        assert said in warnings[0]
        assert ("below the cells" in warnings[0]) == (min(times_params, times_tokens) < 0.01)


def test_limits_hold_alike_in_both_directions() -> None:
    for axis, limit in FAR.items():
        assert far({axis: 1.01 * limit}) == {axis: 1.01 * limit}
        assert list(far({axis: 1 / (1.01 * limit)})) == [axis]
        assert far({axis: 0.99 * limit}) == far({axis: 1 / (0.99 * limit)}) == far({axis: 1}) == {}
    assert reach({"params": 93.13, "tokens": 0.25, "FLOPs": 1.0}) == (
        "beyond the cells by 93.1x in params; below the cells by 4x in tokens"
    )
    assert reach({"params": 1.0, "tokens": 1.0}) == ""


def test_a_law_that_does_not_read_experts_says_so(planted_study) -> None:
    both = fit(planted_study(kinds=("dense", "moe"), noise=0.0), n_boot=5)
    own, together = both.groups["dense"], both.groups["(all)"]
    assert "does not read experts" in no_law(together, "batch_tokens")
    assert "does not read experts" not in no_law(own, "batch_tokens")
