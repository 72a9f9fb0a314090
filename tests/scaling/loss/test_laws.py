"""The registry: planted coefficients come back, Jacobians are right, bad data are refused."""

import json
import pickle

import numpy as np
import pytest

from benchmarks.huber_fit import fit_law
from benchmarks.planted_laws import PLANTED, simulated_cells
from raysweep.errors import UserError
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.expression import compile_expression, evaluate, read_inputs
from raysweep.scaling.loss.laws import LOSS_LAWS


def test_registry_holds_the_nine_laws() -> None:
    assert set(LOSS_LAWS) == set(PLANTED)
    for key, law in LOSS_LAWS.items():
        assert law.key == key
        assert law.formula
        assert law.source
        assert law.parameter_count.startswith("params_")
        assert set(law.names) == set(PLANTED[key])


@pytest.mark.parametrize("key", LOSS_LAWS)
def test_planted_coefficients_come_back(key: str) -> None:
    law, planted, inputs = LOSS_LAWS[key], PLANTED[key], simulated_cells(key)
    fit = fit_law(law, LossData.of(inputs, law.predict(planted, inputs)))
    assert fit.status == "converged", fit.message
    assert fit.coefficients == pytest.approx(planted, rel=1e-4)
    assert np.abs(fit.residuals).max() < 1e-8
    np.testing.assert_allclose(fit.predict(inputs), fit.loss, rtol=1e-8)


@pytest.mark.parametrize("key", LOSS_LAWS)
def test_jacobian_matches_finite_differences(key: str) -> None:
    law, inputs = LOSS_LAWS[key], simulated_cells(key, 20)
    values = np.array([PLANTED[key][name] for name in law.names])
    design = compile_expression(law.expression, read_inputs(law.expression, inputs), centre=False)
    fitted = law.expression.unstate(values)
    slopes = [c.slope(fitted[j]) for j, c in enumerate(law.expression.coefficients)]
    at = evaluate(design, fitted[None])
    jacobian = np.exp(at.value[0])[:, None] * at.jacobian()[0] * np.array(slopes)
    for j, value in enumerate(values):
        step = 1e-5 * abs(value)
        up, down = values.copy(), values.copy()
        up[j] += step
        down[j] -= step
        numeric = (law.predict(up, inputs) - law.predict(down, inputs)) / (2 * step)
        np.testing.assert_allclose(
            jacobian[:, j], numeric, rtol=1e-5, atol=1e-7 * np.abs(numeric).max()
        )


def test_formulas_by_hand() -> None:
    n, d, e = 1e9, 2e10, 8.0
    c = PLANTED["chinchilla"]
    expected = c["E0"] + c["A"] / n ** c["a"] + c["B"] / d ** c["b"]
    got = LOSS_LAWS["chinchilla"].predict(c, {"params": n, "tokens": d})
    assert got == pytest.approx(expected, rel=1e-12)

    c = PLANTED["joint_moe"]
    experts = 1 / (1 / (e - 1 + 1 / (1 / c["E_start"] - 1 / c["E_max"])) + 1 / c["E_max"])
    log_e = np.log(experts)
    expected = (
        c["a"] * experts ** c["d"] * n ** (c["al"] + c["g"] * log_e)
        + c["b"] * experts ** c["w"] * d ** (c["be"] + c["z"] * log_e)
        + c["c"]
    )
    got = LOSS_LAWS["joint_moe"].predict(c, {"params": n, "tokens": d, "experts": e})
    assert got == pytest.approx(expected, rel=1e-12)

    c = PLANTED["clark"]
    experts = 1 / (1 / (e - 1 + 1 / (1 / c["E_start"] - 1 / c["E_max"])) + 1 / c["E_max"])
    log_n, log_e = np.log10(n), np.log10(experts)
    expected = 10 ** (c["a"] * log_n + c["b"] * log_e + c["c"] * log_n * log_e + c["d"])
    got = LOSS_LAWS["clark"].predict(c, {"params": n, "experts": e})
    assert got == pytest.approx(expected, rel=1e-12)

    c = PLANTED["yun"]
    experts = 1 / (1 / (e - 1 + 1 / (1 / c["E_start"] - 1 / c["E_max"])) + 1 / c["E_max"])
    expected = np.log(
        c["A"] / n ** c["a"] + c["B"] / experts ** c["b"] + c["C"] / d ** c["g"] + c["F"]
    )
    expected += c["d"] * np.log(n) * np.log(experts)
    got = LOSS_LAWS["yun"].predict(c, {"params": n, "tokens": d, "experts": e})
    assert np.log(got) == pytest.approx(expected, rel=1e-12)

    c = PLANTED["sparsity"]
    s = 1 - 2 / e
    expected = c["a"] / n ** c["al"] + c["b"] / d ** c["be"] + c["c"] / (1 - s) ** c["lam"] + c["e"]
    expected += c["d"] / ((1 - s) ** c["del"] * n ** c["gam"])
    got = LOSS_LAWS["sparsity"].predict(c, {"params": n, "tokens": d, "experts": e, "top_k": 2.0})
    assert got == pytest.approx(expected, rel=1e-12)

    c = PLANTED["fine_grained"]
    expected = c["c"] + (c["g"] / 4 ** c["gam"] + c["a"]) / n ** c["al"] + c["b"] / d ** c["be"]
    got = LOSS_LAWS["fine_grained"].predict(c, {"params": n, "tokens": d, "granularity": 4.0})
    assert got == pytest.approx(expected, rel=1e-12)


def test_dense_models_are_one_expert_in_every_moe_law() -> None:
    """Eh(1) = E_start, by the definition of the saturating count."""
    c = dict(PLANTED["clark"], a=0.0, c=0.0, b=1.0, d=0.0)
    got = LOSS_LAWS["clark"].predict(c, {"params": 1e9, "experts": 1.0})
    assert got == pytest.approx(c["E_start"])
    many = LOSS_LAWS["clark"].predict(c, {"params": 1e9, "experts": 1e12})
    assert many == pytest.approx(c["E_max"], rel=1e-6)


def test_coefficients_can_be_held_fixed() -> None:
    law, planted, inputs = LOSS_LAWS["kaplan"], PLANTED["kaplan"], simulated_cells("kaplan")
    loss = law.predict(dict(planted, E0=0.0), inputs)
    fit = fit_law(law, LossData.of(inputs, loss), fixed={"E0": 0.0})
    assert fit.ok
    assert fit.coefficients == pytest.approx(dict(planted, E0=0.0), rel=1e-6)
    assert fit.derived("C_c") == pytest.approx(planted["A"] ** (1 / planted["a"]), rel=1e-5)
    held = fit_law(
        law,
        LossData.of(inputs, law.predict(planted, inputs)),
        fixed={"A": planted["A"]},
        bootstrap=20,
    )
    assert held.coefficients == pytest.approx(planted, rel=1e-6)
    assert held.samples is not None
    assert np.ptp(held.draws("A")) == 0.0
    with pytest.raises(UserError, match="no coefficient 'zeta'"):
        fit_law(law, LossData.of(inputs, loss), fixed={"zeta": 1.0})


def _noisy(key: str = "chinchilla", n: int = 60) -> tuple[dict[str, np.ndarray], np.ndarray]:
    inputs = simulated_cells(key, n)
    noise = np.exp(np.random.default_rng(1).normal(0, 0.003, n))
    return inputs, LOSS_LAWS[key].predict(PLANTED[key], inputs) * noise


def _everything_nan(fit) -> bool:
    return all(np.isnan(v) for v in fit.coefficients.values()) and not fit.ok


def test_degenerate_data_have_a_status_and_no_numbers() -> None:
    law = LOSS_LAWS["chinchilla"]
    inputs, loss = _noisy()
    few = fit_law(law, LossData.of({k: v[:2] for k, v in inputs.items()}, loss[:2]))
    assert few.status == "too few cells"
    five = fit_law(law, LossData.of({k: v[:5] for k, v in inputs.items()}, loss[:5]))
    assert five.status == "too few cells"
    assert "at least 6" in five.message
    one_cell = fit_law(law, LossData.of(inputs, loss, cell=np.zeros(60)))
    assert one_cell.status == "too few cells"
    one_n = fit_law(law, LossData.of(dict(inputs, params=np.full(60, 1e8)), loss))
    assert one_n.status == "one value"
    assert "params" in one_n.message
    line = fit_law(law, LossData.of(dict(inputs, tokens=20 * inputs["params"]), loss))
    assert line.status == "collinear"
    assert "params and tokens" in line.message
    flat = fit_law(law, LossData.of(inputs, np.full(60, 2.5)))
    assert flat.status == "identical losses"
    dense_only = fit_law(LOSS_LAWS["wang"], LossData.of({**inputs, "experts": np.ones(60)}, loss))
    assert dense_only.status == "one value"
    assert "experts" in dense_only.message
    for fit in (few, five, one_cell, one_n, line, flat, dense_only):
        assert _everything_nan(fit)
        assert np.isnan(fit.predict({"params": 1e9, "tokens": 1e10, "experts": 8})).all()
        assert json.dumps(fit.to_dict(), allow_nan=False)
        with pytest.raises(UserError, match="no resamples"):
            fit.interval({"params": 1e9, "tokens": 1e10})


@pytest.mark.parametrize("key", ["yun", "clark", "joint_moe", "sparsity"])
def test_two_numbers_of_experts_cannot_shape_an_experts_term(key: str) -> None:
    law, inputs = LOSS_LAWS[key], simulated_cells(key)
    two = np.where(np.arange(120) % 2, 8.0, 1.0)
    few = {"experts": two, "sparsity": 1 - 1 / two}
    inputs = {name: few.get(name, column) for name, column in inputs.items()}
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(120))
    fit = fit_law(law, LossData.of(inputs, law.predict(PLANTED[key], inputs) * noise))
    assert fit.status == "collinear", fit.message
    assert "trade off" in fit.message
    assert _everything_nan(fit)


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, np.inf])
@pytest.mark.parametrize("column", ["params", "tokens", "loss"])
def test_impossible_values_name_column_and_row(bad: float, column: str) -> None:
    inputs, loss = _noisy()
    table = {**inputs, "loss": loss}
    table[column] = table[column].copy()
    table[column][[7, 9]] = bad
    named = "params_total_non_embedding" if column == "params" and np.isnan(bad) else column
    with pytest.raises(UserError, match=f"column '{named}'.* row 7"):
        fit_law(
            LOSS_LAWS["chinchilla"],
            LossData.of({"params": table["params"], "tokens": table["tokens"]}, table["loss"]),
        )


def test_misuse_is_one_line() -> None:
    law = LOSS_LAWS["chinchilla"]
    inputs, loss = _noisy()
    with pytest.raises(UserError, match="needs a column 'tokens'"):
        fit_law(law, LossData.of({"params": inputs["params"]}, loss))
    with pytest.raises(UserError, match="differ in length"):
        fit_law(
            law, LossData.of({"params": inputs["params"], "tokens": inputs["tokens"][:-1]}, loss)
        )
    with pytest.raises(UserError, match="one loss a run"):
        fit_law(law, LossData.of(inputs, loss[:-1]))
    with pytest.raises(UserError, match="not negative"):
        fit_law(law, LossData.of(inputs, loss), weights=-np.ones(60))
    with pytest.raises(UserError, match="too"):
        law.predict({"E0": 1.0}, inputs)
    with pytest.raises(UserError, match="row 0 holds 1"):
        LOSS_LAWS["sparsity"].predict(
            PLANTED["sparsity"], {"params": 1e9, "tokens": 1e10, "sparsity": 1.0}
        )


def test_a_floor_the_data_do_not_show_is_said_to_be_at_its_bound() -> None:
    law, planted = LOSS_LAWS["chinchilla"], dict(PLANTED["chinchilla"], E0=0.0)
    inputs = simulated_cells("chinchilla")
    fit = fit_law(law, LossData.of(inputs, law.predict(planted, inputs)))
    assert fit.status == "at bound"
    assert "E0" in fit.message
    assert fit.coefficients["a"] == pytest.approx(planted["a"], rel=0.01)


def test_fit_is_plain_data() -> None:
    inputs, loss = _noisy()
    fit = fit_law(LOSS_LAWS["chinchilla"], LossData.of(inputs, loss), bootstrap=50)
    record = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert record["law"] == "chinchilla"
    assert record["status"] == "converged"
    assert record["n_resamples"] == 50
    assert set(record["intervals"]) == {*fit.law.names, "N_opt exponent", "D_opt exponent"}
    assert record["ranges"]["params"][0] == inputs["params"].min()
    again = pickle.loads(pickle.dumps(fit))
    assert again.coefficients == fit.coefficients


def test_weights_choose_the_points() -> None:
    law = LOSS_LAWS["chinchilla"]
    inputs, loss = _noisy()
    spoiled = loss.copy()
    spoiled[:10] *= 3
    weights = np.ones(60)
    weights[:10] = 0
    left_out = fit_law(law, LossData.of({k: v[10:] for k, v in inputs.items()}, loss[10:]))
    fit = fit_law(law, LossData.of(inputs, spoiled), weights=weights)
    assert fit.coefficients == pytest.approx(left_out.coefficients, rel=1e-5)
