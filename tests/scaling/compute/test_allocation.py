"""Allocation, IsoFLOP parabolas and the savings of experts, on laws whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.scaling.compute.allocation import compute_optimal
from raysweep.scaling.compute.efficiency import data_efficiency, efficiency_leverage
from raysweep.scaling.compute.isoflop import ParabolaBias, isoflop, parabola_bias
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.fit import LossFit, fit_law
from raysweep.scaling.loss.laws import LOSS_LAWS

WANG = {"A": 420.0, "B": 1700.0, "s": 1.8, "a": 0.34, "b": 0.35, "g": 0.13}


def fitted(
    key: str, coefficients: dict[str, float], noise: float = 0.0, bootstrap: int = 0
) -> LossFit:
    """The law fitted to 64 cells of its own predictions."""
    rng = np.random.default_rng(0)
    inputs = {
        "params": np.exp(rng.uniform(np.log(3e7), np.log(7e9), 64)),
        "tokens": np.exp(rng.uniform(np.log(5e8), np.log(2e11), 64)),
        "experts": 2.0 ** rng.integers(0, 6, 64),
        "granularity": 2.0 ** rng.integers(0, 5, 64),
    }
    law = LOSS_LAWS[key]
    loss = law.predict(coefficients, inputs) * np.exp(rng.normal(0, noise, 64))
    return fit_law(law, LossData.of(inputs, loss), bootstrap=bootstrap)


def test_chinchilla_closed_form_is_the_minimum_on_the_budget() -> None:
    c = dict(LOSS_LAWS["chinchilla"].published)
    fit = fitted("chinchilla", c)
    flops = 5.76e23
    best = compute_optimal(fit, flops)
    assert best.method == "closed form"
    ratio = (c["a"] * c["A"] / (c["b"] * c["B"])) ** (1 / (c["a"] + c["b"]))
    assert best.params == pytest.approx(
        ratio * (flops / 6) ** (c["b"] / (c["a"] + c["b"])), rel=1e-5
    )
    assert 6 * best.params * best.tokens == pytest.approx(flops)
    assert best.exponent == pytest.approx(c["b"] / (c["a"] + c["b"]), rel=1e-6)
    around = best.params * np.array([0.97, 1.03])
    assert (fit.predict({"params": around, "tokens": flops / (6 * around)}) > best.loss).all()


def test_numeric_agrees_with_the_closed_form() -> None:
    for key, c in (("chinchilla", dict(LOSS_LAWS["chinchilla"].published)), ("wang", WANG)):
        fit = fitted(key, c, noise=0.003, bootstrap=30)
        given = {"experts": 8} if key == "wang" else {}
        closed = compute_optimal(fit, 1e22, given=given)
        numeric = compute_optimal(fit, 1e22, given=given, flops_per_token=lambda n: 6 * n)
        assert numeric.method == "numeric"
        # The loss is flat at its minimum, so golden sections find N to the root of the precision.
        assert numeric.params == pytest.approx(closed.params, rel=1e-5)
        assert numeric.loss == pytest.approx(closed.loss, rel=1e-12)
        assert numeric.exponent == pytest.approx(closed.exponent, abs=1e-3)
        assert closed.intervals["params"] == pytest.approx(numeric.intervals["params"], rel=1e-3)
        low, high = closed.intervals["exponent"]
        assert low < closed.exponent < high


def test_a_split_outside_what_was_fitted_says_how_far() -> None:
    """Cells of 3e7 to 7e9 parameters on 5e8 to 2e11 tokens, budgets within, beyond and below."""
    fit = fitted("chinchilla", dict(LOSS_LAWS["chinchilla"].published))
    ranges = fit.ranges()
    inside = compute_optimal(fit, 1e21)
    assert inside.status == "interior"
    assert inside.extrapolation == {"params": 1.0, "tokens": 1.0}
    largest = compute_optimal(fit, 6 * ranges["params"][1] * ranges["tokens"][1])
    assert 1 < max(largest.extrapolation.values()) < 2  # as any split there but the cell's own
    assert largest.status == "interior"
    for flops, end in ((5.76e23, 1), (1e16, 0)):
        best = compute_optimal(fit, flops)
        assert best.status == "outside"
        for name, run in (("params", best.params), ("tokens", best.tokens)):
            assert best.extrapolation[name] == pytest.approx(run / ranges[name][end])
            assert (best.extrapolation[name] > 1) == bool(end)


def test_laws_with_experts_and_granularity_are_solved_numerically() -> None:
    fit = fitted("joint_moe", dict(LOSS_LAWS["joint_moe"].published))
    dense = compute_optimal(fit, 1e22, given={"experts": 1})
    sparse = compute_optimal(fit, 1e22, given={"experts": 32})
    assert sparse.loss < dense.loss
    assert sparse.params < dense.params  # more experts, more tokens a parameter
    grid = np.geomspace(1e8, 1e12, 4001)
    loss = fit.predict({"params": grid, "tokens": 1e22 / (6 * grid), "experts": 32})
    assert sparse.params == pytest.approx(grid[np.argmin(loss)], rel=0.01)


def test_cost_of_a_token_moves_the_optimum() -> None:
    fit = fitted("chinchilla", dict(LOSS_LAWS["chinchilla"].published))
    cheap = compute_optimal(fit, 1e22, flops_per_token=lambda n: 2 * n)
    assert cheap.params * cheap.tokens * 2 == pytest.approx(1e22)
    assert cheap.loss < compute_optimal(fit, 1e22).loss


def test_allocation_refuses_what_it_cannot_do() -> None:
    fit = fitted("chinchilla", dict(LOSS_LAWS["chinchilla"].published))
    with pytest.raises(UserError, match="positive number of FLOPs"):
        compute_optimal(fit, -1.0)
    clark = fit_law(
        LOSS_LAWS["clark"],
        LossData.of({"params": [1e8, 1e9], "experts": [1, 2]}, np.array([3.0, 2.5])),
    )
    with pytest.raises(UserError, match="cannot say how to split"):
        compute_optimal(clark, 1e20)
    few = fit_law(
        LOSS_LAWS["chinchilla"],
        LossData.of({"params": [1e8, 1e9], "tokens": [1e9, 2e9]}, np.array([3, 2.5])),
    )
    nothing = compute_optimal(few, 1e20)
    assert nothing.status == "no fit"
    assert np.isnan(nothing.params)


def test_data_efficiency_is_wangs_arithmetic() -> None:
    """A/(N^a 8^g) + B/D^b = A/N^a + B/D'^b has a closed answer."""
    fit = fitted("wang", WANG, noise=0.002, bootstrap=100)
    c, n, d = fit.coefficients, 1e9, 2e10
    gain = c["A"] / n ** c["a"] * (1 - 8 ** -c["g"])
    needed = (d ** -c["b"] - gain / c["B"]) ** (-1 / c["b"])
    found = data_efficiency(fit, n, d, {"experts": 8}, {"experts": 1})
    assert found.ratio == pytest.approx(needed / d, rel=1e-9)
    assert found.saved == pytest.approx(1 - d / needed, rel=1e-9)
    assert found.interval is not None
    assert found.interval[0] < found.ratio < found.interval[1]
    same = data_efficiency(fit, n, d, {"experts": 1}, {"experts": 1})
    assert same.ratio == pytest.approx(1.0, rel=1e-9)


def test_a_loss_the_reference_cannot_reach_is_said_to_be_so() -> None:
    fit = fitted("wang", WANG)
    small = data_efficiency(fit, 1e7, 1e13, {"experts": 32}, {"experts": 1})
    assert np.isinf(small.ratio)
    assert small.saved == 1.0
    assert small.unreachable == 1.0
    assert "never reaches" in small.message


def test_efficiency_leverage_is_compute_for_equal_loss() -> None:
    fit = fitted("wang", WANG)
    found = efficiency_leverage(fit, 1e21, {"experts": 8}, {"experts": 1})
    moe = compute_optimal(fit, 1e21, given={"experts": 8})
    dense = compute_optimal(fit, found.ratio * 1e21, given={"experts": 1})
    assert dense.loss == pytest.approx(moe.loss, rel=1e-8)
    assert found.ratio > 1


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
        fit = fit_law(law, LossData.of(inputs, law.predict(truth, inputs)))
        assert fit.ok, fit.message
        return parabola_bias(fit, inputs["params"], inputs["tokens"])

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
