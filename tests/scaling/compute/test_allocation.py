"""Allocation, IsoFLOP parabolas and the savings of experts, on laws whose answers are known."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.scaling.compute.allocation import (
    allocations_text,
    best_size,
    compute_optimal,
    ranges_of,
)
from raysweep.scaling.compute.budgets import ParabolaBias, parabola_bias, splitting
from raysweep.scaling.compute.isoflop import isoflop, read_minimum
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import choose_loss
from raysweep.scaling.plain import to_json
from raysweep.scaling.runs import flops_trend

CHINCHILLA = LOSS_LAWS["chinchilla"]
TRUTH = dict(CHINCHILLA.published)
WANG = {"A": 420.0, "B": 1700.0, "s": 1.8, "a": 0.34, "b": 0.35, "g": 0.13}


def six_n(params: np.ndarray) -> np.ndarray:
    return 6.0 * params


def planted(
    key: str, coefficients: dict[str, float], noise: float = 1e-4, *, sizes: int = 8
) -> LossModel:
    """The model of a ladder of sizes by horizons, dense and of eight experts where told apart."""
    rng = np.random.default_rng(0)
    law = LOSS_LAWS[key]
    routings = [1.0, 8.0] if "experts" in law.inputs else [1.0]
    n, ratio, e = (
        g.ravel() for g in np.meshgrid(np.geomspace(3e7, 3e9, sizes), [5, 15, 50, 150], routings)
    )
    columns = {"params": n, "tokens": n * ratio, "experts": e, "top_k": np.minimum(e, 2.0)}
    loss = law.predict(coefficients, columns) * np.exp(rng.normal(0, noise, len(n)))
    return choose_loss(LossData.of({**columns, "flops": 6 * n * n * ratio}, loss), [key])


@pytest.fixture(scope="module")
def chinchilla() -> LossModel:
    return planted("chinchilla", TRUTH)


@pytest.fixture(scope="module")
def wang() -> LossModel:
    return planted("wang", WANG, 5e-4)


def test_the_planted_split_is_recovered(chinchilla: LossModel) -> None:
    a, b = TRUTH["a"], TRUTH["b"]
    for flops in (1e19, 1e20, 1e21):
        (best,) = compute_optimal(chinchilla, flops)
        ratio = (a * TRUTH["A"] / (b * TRUTH["B"])) ** (1 / (a + b))
        truth = ratio * (flops / 6) ** (b / (a + b))
        assert best.status == "interior"
        assert best.params == pytest.approx(truth, rel=0.05)
        assert best.estimate("params").covers(truth)
        assert best.estimate("tokens").covers(flops / (6 * truth))
        assert best.estimate("exponent").covers(b / (a + b))
        assert best.estimate("tokens_exponent").covers(a / (a + b))
        assert 6 * best.params * best.tokens == pytest.approx(flops)
        assert best.exponent + best.tokens_exponent == pytest.approx(1.0)
        truth = CHINCHILLA.predict(TRUTH, {"params": best.params, "tokens": best.tokens})
        assert best.estimate("loss").covers(float(truth[0]))


@pytest.mark.slow
def test_intervals_that_leave_out_budgets_hold_the_planted_exponent() -> None:
    """Six noisy studies of six budgets, each tilted by an error that its runs share."""
    inside = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        flops = np.repeat(1e18 * 2.5 ** np.arange(6), 9)
        n = 0.09 * np.sqrt(flops) * np.tile(np.geomspace(0.25, 4, 9), 6)
        d = flops / (6 * n)
        tilt = np.repeat(rng.normal(0, 0.002, 6), 9) * np.tile(np.linspace(-1, 1, 9), 6)
        noise = tilt + rng.normal(0, 0.001, 54)
        loss = CHINCHILLA.predict(TRUTH, {"params": n, "tokens": d}) * np.exp(noise)
        model = choose_loss(LossData.of({"params": n, "tokens": d, "flops": flops}, loss))
        (best,) = compute_optimal(model, 1e20, seed=seed)
        exponent = best.estimate("exponent")
        inside.append(exponent.covers(TRUTH["b"] / (TRUTH["a"] + TRUTH["b"])))
        assert exponent.high - exponent.low < 0.5
    assert sum(inside) >= 5


def test_a_split_outside_what_was_fitted_says_how_far(chinchilla: LossModel) -> None:
    ranges = ranges_of(chinchilla)
    inside, far = compute_optimal(chinchilla, [1e20, 5.76e23])
    assert inside.extrapolation == {"params": 1.0, "tokens": 1.0}
    assert far.status == "outside"
    assert far.extrapolation["params"] == pytest.approx(far.params / ranges["params"][1])
    wide, narrow = (np.ptp(np.log(a.intervals["params"])) for a in (far, inside))
    assert wide > 2 * narrow


def test_what_is_not_determined_has_a_word_and_no_number(chinchilla: LossModel) -> None:
    with pytest.raises(UserError, match="positive number of FLOPs"):
        compute_optimal(chinchilla, -1.0)
    n = np.full(6, 1e8)
    nothing = choose_loss(
        LossData.of({"params": n, "tokens": np.geomspace(1e9, 1e11, 6)}, np.linspace(3, 2.5, 6))
    )
    for split in compute_optimal(nothing, [1e20]):
        assert split.status == "not determined"
        assert "the same params" in split.why
        assert math.isnan(split.params)
        assert not split.estimate("params").known
        assert split.intervals == {}
    # Loss falls with N alone as far as one looks: there is no best size.
    grid_n, grid_d = (g.ravel() for g in np.meshgrid(np.geomspace(1e7, 1e9, 6), [1e9, 4e9, 1.6e10]))
    falls = 1 + 200 / grid_n**0.3
    model = choose_loss(LossData.of({"params": grid_n, "tokens": grid_d}, falls), ["chinchilla"])
    (open_,) = compute_optimal(model, 1e22)
    assert open_.status in ("out of range", "not determined")
    assert math.isnan(open_.params)
    text = allocations_text({"odd": [open_], "dense": compute_optimal(chinchilla, 1e20)})
    assert open_.status in text
    assert "N is all parameters" in text
    assert "nan" not in text
    json.dumps(to_json(open_), allow_nan=False)


def test_a_law_blind_to_the_split_is_not_asked_for_it() -> None:
    n = np.geomspace(1e7, 1e9, 9)
    d = 20 * n * np.tile([0.7, 1.0, 1.5], 3)
    loss = CHINCHILLA.predict(TRUTH, {"params": n, "tokens": d})
    data = LossData.of({"params": n, "tokens": d}, loss)
    blind = choose_loss(data, ["kaplan"])
    assert compute_optimal(blind, 1e20)[0].status == "not determined"
    both = choose_loss(data)
    able = splitting(both)
    assert able.law is CHINCHILLA


def test_what_tokens_take_over_6n_fades_beyond_the_runs() -> None:
    n = np.geomspace(1e4, 1e6, 5)
    rest = 1.5 * (n / 1e4) ** -0.45
    cost = flops_trend(n, 6 * n * (1 + rest))
    np.testing.assert_allclose(cost(n), 6 * n * (1 + rest), rtol=1e-9)
    assert cost(1e9) == pytest.approx(6e9 * (1 + 1.5 * 1e5**-0.45))
    assert cost(1e3) == pytest.approx(6e3 * (1 + 1.5 * 0.1**-0.45))
    one = flops_trend(np.full(3, 1e8), np.full(3, 7e8))
    assert one(1e8) == pytest.approx(7e8)
    assert one(1e12) == pytest.approx(6e12, rel=0.002)


@pytest.mark.parametrize("each", [2.2, 5.0, 6.0, 10.0])
def test_a_told_ratio_that_is_the_same_in_all_runs_stays(each: float) -> None:
    n = np.geomspace(1e7, 1e9, 5)
    np.testing.assert_allclose(flops_trend(n, each * n)(10 * n), each * 10 * n, rtol=1e-6)


def test_a_ratio_on_both_sides_of_6n_is_held_at_its_ends() -> None:
    n = np.geomspace(1e7, 1e9, 5)
    per_token = 6 * n * (n / 1e8) ** 0.08
    cost = flops_trend(n, per_token)
    np.testing.assert_allclose(cost(n), per_token, rtol=1e-9)
    assert cost(1e12) == pytest.approx(6e12 * 10**0.08)


def test_cost_of_a_token_moves_the_optimum(chinchilla: LossModel) -> None:
    (cheap,) = compute_optimal(chinchilla, 1e20, flops_per_token=lambda n: 2 * n, draws=0)
    assert cheap.params * cheap.tokens * 2 == pytest.approx(1e20)
    assert cheap.loss < compute_optimal(chinchilla, 1e20, draws=0)[0].loss
    best = best_size(chinchilla, 1e20, flops_per_token=six_n)
    grid = np.geomspace(best / 3, 3 * best, 2001)
    loss, _, _ = chinchilla.predict_mean({"params": grid, "tokens": 1e20 / (6 * grid)})
    assert best == pytest.approx(grid[np.argmin(loss)], rel=0.01)


def test_experts_have_their_own_split(wang: LossModel) -> None:
    (dense,), (sparse,) = (
        compute_optimal(wang, 1e21, given={"experts": e}, draws=0) for e in (1.0, 8.0)
    )
    assert sparse.loss < dense.loss
    assert sparse.params < dense.params  # more experts, more tokens a parameter


def test_a_budgets_best_size_is_read_near_its_best_run() -> None:
    n = np.geomspace(1e7, 1e9, 13)
    loss = np.exp(0.02 * np.log(n / 1.3e8) ** 2)
    assert read_minimum(n, loss) == pytest.approx(1.3e8, rel=1e-6)
    assert math.isnan(read_minimum(n, 1 / n))
    assert math.isnan(read_minimum(n[:3], loss[:3]))


def _grid(off_centre: float = 0.0, drift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Five budgets of nine sizes about the optimum N_opt ~ C^0.5 of a symmetric law."""
    params, tokens = [], []
    for k, flops in enumerate(np.geomspace(1e18, 1e20, 5)):
        centre = np.sqrt(flops / 6) * np.exp(off_centre + k * drift)
        n = centre * np.geomspace(0.25, 4, 9)
        params.append(n)
        tokens.append(flops / (6 * n))
    return np.concatenate(params), np.concatenate(tokens)


def test_parabolas_are_right_where_theory_says_so() -> None:
    """Equal exponents and amplitudes on a centred grid: the loss is symmetric in log N."""
    params, tokens = _grid()
    loss = 1.8 + 500.0 * (params**-0.35 + tokens**-0.35)
    found = isoflop(params, tokens, loss, resamples=50)
    assert [p.status for p in found.parabolas] == ["interior"] * 5
    for p in found.parabolas:
        assert p.params == pytest.approx(np.sqrt(p.flops / 6), rel=1e-6)
        assert p.params * p.tokens * 6 == pytest.approx(p.flops)
    assert found.exponent == pytest.approx(0.5, abs=1e-6)
    assert found.interval is not None
    assert "biased" in found.note


def test_bias_of_parabolas_is_measured_on_the_grid_at_hand() -> None:
    """Without noise: none for a symmetric law, 7 % in N for exponents of 0.6 and 0.3, and a wrong
    exponent where the grid drifts across the budgets."""
    law = LOSS_LAWS["chinchilla"]

    def bias(truth: dict[str, float], drift: float) -> ParabolaBias:
        a, b = truth["a"], truth["b"]
        budgets = np.geomspace(1e18, 1e20, 5)
        best = (a * truth["A"] / (b * truth["B"]) * (budgets / 6) ** b) ** (1 / (a + b))
        centre = best * np.exp(drift * np.arange(-2, 3))
        params = centre[:, None] * np.geomspace(0.25, 4, 9)
        inputs = {"params": params.ravel(), "tokens": (budgets[:, None] / (6 * params)).ravel()}
        model = choose_loss(LossData.of(inputs, law.predict(truth, inputs)), ["chinchilla"])
        assert model.ok, model.why
        return parabola_bias(model, inputs["params"], inputs["tokens"])

    even = bias({"E0": 1.8, "A": 500.0, "B": 500.0, "a": 0.35, "b": 0.35}, 0.0)
    assert abs(even.exponent_error) < 1e-4
    np.testing.assert_allclose(even.params_ratio, 1.0, rtol=1e-3)
    steep = {"E0": 1.8, "A": 30000.0, "B": 300.0, "a": 0.6, "b": 0.3}
    uneven = bias(steep, 0.0)
    np.testing.assert_allclose(uneven.params_ratio, 1.07, atol=0.01)
    assert abs(uneven.exponent_error) < 1e-3
    assert abs(bias(steep, 0.3).exponent_error) > 2e-3


def test_parabolas_have_a_status() -> None:
    params, tokens = _grid(off_centre=3.0)
    loss = 1.8 + 500.0 * (params**-0.35 + tokens**-0.35)
    away = isoflop(params, tokens, loss)
    assert away.status == "too few budgets"
    assert {p.status for p in away.parabolas} <= {"at edge", "not convex"}
    few = isoflop(params[:3], tokens[:3], loss[:3])
    assert few.parabolas[0].status == "too few points"
    with pytest.raises(UserError, match="column 'tokens'"):
        isoflop(params, -tokens, loss)


def test_isoflop_of_real_runs(shared_data) -> None:
    table = pd.read_csv(shared_data / "isoflop_marin_comma.csv")
    runs = table[~table["outlier"]]
    columns = (runs[c].to_numpy() for c in ("params", "tokens", "loss", "budget"))
    found = isoflop(*columns, resamples=100)
    assert found.status == "fitted"
    assert len(found.parabolas) == 6
    assert 0.3 < found.exponent < 0.7
