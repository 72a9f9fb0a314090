"""The solver: derivatives, tight convergence, agreement with SciPy and with the published fit."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber as scipy_huber

from benchmarks import huber_solver as solver
from benchmarks.fits import read_chinchilla
from benchmarks.huber_fit import cell_multiplicities, fit_law, resample
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.expression import compile_expression, evaluate, read_inputs
from raysweep.scaling.loss.laws import LOSS_LAWS


@pytest.mark.parametrize("key", ["chinchilla", "yun", "joint_moe", "clark", "sparsity"])
def test_gradient_and_hessian_match_finite_differences(key: str) -> None:
    law, rng = LOSS_LAWS[key], np.random.default_rng(0)
    n = 30
    inputs = {
        "params": np.exp(rng.uniform(18, 23, n)),
        "tokens": np.exp(rng.uniform(20, 26, n)),
        "experts": 2.0 ** rng.integers(0, 7, n),
        "sparsity": 1 - 1 / 2.0 ** rng.integers(0, 7, n),
    }
    design = compile_expression(law.expression, read_inputs(law.expression, inputs), centre=True)
    unit = rng.random((3, len(law.names)))
    low, high = (np.array([c.start[i] for c in law.expression.coefficients]) for i in (0, 1))
    theta = low + unit * (high - low)
    curvature, pull = rng.random((3, n)), rng.normal(size=(3, n))

    def jacobian(at: np.ndarray) -> np.ndarray:
        return evaluate(design, at).jacobian()

    analytic = evaluate(design, theta)
    hessian = analytic.hessian(curvature, pull)
    jac = analytic.jacobian()
    np.testing.assert_allclose(analytic.gradient(pull), np.einsum("bn,bnp->bp", pull, jac))
    gauss = np.einsum("bn,bnp,bnq->bpq", curvature, jac, jac)
    for j in range(len(law.names)):
        step = np.zeros_like(theta)
        step[:, j] = 1e-5
        value = (evaluate(design, theta + step).value - evaluate(design, theta - step).value) / 2e-5
        np.testing.assert_allclose(jac[..., j], value, rtol=1e-5, atol=1e-8)
        second = (jacobian(theta + step) - jacobian(theta - step)) / 2e-5
        numeric = gauss[:, j] + np.einsum("bn,bnp->bp", pull, second)
        np.testing.assert_allclose(hessian[:, j], numeric, rtol=1e-5, atol=1e-6)


def test_huber_is_scipys() -> None:
    r = np.linspace(-0.01, 0.01, 41)
    np.testing.assert_allclose(solver.huber(r, 1e-3), scipy_huber(1e-3, r), rtol=1e-12)


def test_chinchilla_reaches_the_known_minimum(shared_data) -> None:
    inputs, loss = read_chinchilla(shared_data)
    assert len(loss) == 240
    law = LOSS_LAWS["chinchilla"]
    fit = fit_law(law, LossData.of(inputs, loss))
    assert fit.status == "converged"
    assert fit.objective <= 0.0010183
    published = np.log(law.predict(law.published, inputs)) - np.log(loss)
    assert scipy_huber(1e-3, published).sum() == pytest.approx(0.0010228, abs=1e-7)
    assert fit.objective == pytest.approx(scipy_huber(1e-3, fit.residuals).sum(), rel=1e-12)
    expected = {"E0": 1.8172, "A": 477.8, "B": 2143.0, "a": 0.3473, "b": 0.3672}
    assert fit.coefficients == pytest.approx(expected, rel=3e-4)


def test_all_245_points_give_the_other_published_fit(shared_data) -> None:
    inputs, loss = read_chinchilla(shared_data, drop=0)
    fit = fit_law(LOSS_LAWS["chinchilla"], LossData.of(inputs, loss))
    expected = {"E0": 1.891, "A": 495.6, "B": 12842.0, "a": 0.3493, "b": 0.4530}
    assert fit.coefficients == pytest.approx(expected, rel=1e-3)


def test_bootstrap_matches_published_sds_and_every_refit_converges(shared_data) -> None:
    inputs, loss = read_chinchilla(shared_data)
    fit = fit_law(LOSS_LAWS["chinchilla"], LossData.of(inputs, loss), bootstrap=1000)
    assert fit.n_failed == 0
    assert fit.samples is not None
    assert len(fit.samples) == 1000
    for name, sd in {"E0": 0.026, "a": 0.015, "b": 0.021, "N_opt exponent": 0.020}.items():
        assert np.std(fit.draws(name), ddof=1) == pytest.approx(sd, rel=0.15), name


def test_no_refit_can_be_improved_by_scipy(shared_data) -> None:
    """SciPy, from our answer and from three others, never finds a lower objective."""
    inputs, loss = read_chinchilla(shared_data)
    law = LOSS_LAWS["chinchilla"]
    fit = resample(fit_law(law, LossData.of(inputs, loss)), 8, seed=3)
    assert fit.samples is not None
    weights = cell_multiplicities(fit.cells, 8, np.random.default_rng(3))
    n, d, y = np.log(inputs["params"]), np.log(inputs["tokens"]), np.log(loss)
    centre_n, centre_d = n.mean(), d.mean()
    for sample, w in zip(fit.samples, weights, strict=True):

        def objective(x: np.ndarray, w=w) -> tuple[float, np.ndarray]:
            terms = np.exp(
                [
                    np.full_like(n, x[0]),
                    x[1] - x[3] * (n - centre_n),
                    x[2] - x[4] * (d - centre_d),
                ]
            )
            total = terms.sum(axis=0)
            r = np.log(total) - y
            pull = w * np.clip(r, -1e-3, 1e-3) * terms / total
            slope = [*pull.sum(axis=1), -(pull[1] * (n - centre_n)).sum()]
            slope.append(-(pull[2] * (d - centre_d)).sum())
            return float((w * scipy_huber(1e-3, r)).sum()), np.array(slope)

        e0, a_big, b_big, a, b = sample
        ours = np.array(
            [np.log(e0), np.log(a_big) - a * centre_n, np.log(b_big) - b * centre_d, a, b]
        )
        value, slope = objective(ours)
        assert np.abs(slope).max() < 1e-8
        rng = np.random.default_rng(0)
        for start in [ours, *(ours + rng.normal(0, 0.2, (3, 5)))]:
            peer = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-10})
            assert value <= peer.fun + 1e-12


def test_outliers_move_nothing_much() -> None:
    rng = np.random.default_rng(0)
    law = LOSS_LAWS["chinchilla"]
    inputs = {
        "params": np.exp(rng.uniform(18, 23, 80)),
        "tokens": np.exp(rng.uniform(20, 26, 80)),
    }
    loss = law.predict(law.published, inputs)
    spoiled = loss.copy()
    spoiled[::16] *= 1.5
    fit = fit_law(law, LossData.of(inputs, spoiled))
    assert fit.coefficients["a"] == pytest.approx(law.published["a"], rel=0.01)
    assert fit.coefficients["b"] == pytest.approx(law.published["b"], rel=0.01)


def test_result_does_not_depend_on_units() -> None:
    """Parameters counted in millions change A only, by a factor 1e6^-a."""
    rng = np.random.default_rng(0)
    law = LOSS_LAWS["chinchilla"]
    params, tokens = np.exp(rng.uniform(18, 23, 60)), np.exp(rng.uniform(20, 26, 60))
    loss = law.predict(law.published, {"params": params, "tokens": tokens})
    loss *= np.exp(rng.normal(0, 0.003, 60))
    one = fit_law(law, LossData.of({"params": params, "tokens": tokens}, loss)).coefficients
    two = fit_law(law, LossData.of({"params": params / 1e6, "tokens": tokens}, loss)).coefficients
    assert two["a"] == pytest.approx(one["a"], rel=1e-6)
    assert two["A"] == pytest.approx(one["A"] * 1e6 ** -one["a"], rel=1e-5)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_a_straight_line_converges_where_every_point_lies_beyond_the_width(n: int) -> None:
    """Without a floor Kaplan's law is linear in its coefficients: no Hessian beyond the width."""
    law, rng = LOSS_LAWS["kaplan"], np.random.default_rng(n)
    for _ in range(10):
        flops = np.exp(rng.uniform(np.log(1e17), np.log(1e21), n))
        truth = law.predict({"E0": 0.0, "A": 90.0, "a": 0.12}, {"flops": flops})
        exact = fit_law(law, LossData.of({"flops": flops}, truth), fixed={"E0": 0.0})
        assert exact.status == "converged"
        assert exact.coefficients["a"] == pytest.approx(0.12, rel=1e-6)
        loss = truth * np.exp(0.02 * rng.standard_normal(n))
        fit = fit_law(law, LossData.of({"flops": flops}, loss), fixed={"E0": 0.0})
        assert fit.status == "converged", fit.message
        # A line of least absolute values passes through two points: none of those does better.
        x, y = np.log(flops), np.log(loss)
        for i, j in zip(*np.triu_indices(n, 1), strict=True):
            slope = (y[i] - y[j]) / (x[i] - x[j])
            off = solver.huber(y - y[i] - slope * (x - x[i]), fit.huber).sum()
            assert fit.objective <= off * (1 + 1e-9)


def test_fewer_cells_than_coefficients_are_refused() -> None:
    law, flops = LOSS_LAWS["kaplan"], np.array([1e18, 1e19, 1e20])
    loss = law.predict({"E0": 1.7, "A": 90.0, "a": 0.12}, {"flops": flops})
    assert fit_law(law, LossData.of({"flops": flops}, loss)).status == "too few cells"
    few = fit_law(law, LossData.of({"flops": flops[:2]}, loss[:2]), fixed={"E0": 0.0})
    assert few.status == "too few cells"
