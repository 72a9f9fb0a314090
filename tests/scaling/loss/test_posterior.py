"""The posterior of a law: its mode, and the mathematics of its mean and spread."""

import numpy as np
import pytest

from benchmarks.planted_laws import PLANTED, simulated_cells
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.loss.posterior import (
    LENGTH,
    Scatter,
    correlation,
    correlation_factor,
    fit_posterior,
)


@pytest.mark.parametrize("key", ["chinchilla", "wang", "kaplan", "joint_moe", "sparsity"])
def test_the_truth_is_predicted_between_the_cells(key: str) -> None:
    law, inputs = LOSS_LAWS[key], simulated_cells(key, 60)
    truth = np.log(law.predict(PLANTED[key], inputs))
    noise = np.random.default_rng(0).normal(0, 0.002, 60)
    seen = np.arange(60) < 45
    at = {name: v[seen] for name, v in inputs.items()}
    found = fit_posterior(law, at, np.exp(truth + noise)[seen], np.zeros(45), fine=True)
    mean, sd = found.predict({name: v[~seen] for name, v in inputs.items()})
    off = (mean - truth[~seen]) / sd
    assert np.sqrt(np.mean(off**2)) < 2
    assert sd.max() < 0.1
    assert 0.001 < found.noise < 0.004


def test_without_data_about_it_an_exponent_keeps_its_prior() -> None:
    law = LOSS_LAWS["chinchilla"]
    inputs = {"params": np.array([1e8, 1.1e8, 1.2e8]), "tokens": np.array([2e9, 2.1e9, 2.2e9])}
    truth = law.predict(law.published, inputs)
    found = fit_posterior(law, inputs, truth, np.zeros(3), fine=True)
    a = law.names.index("a")
    assert found.theta[a] == pytest.approx(0.34, abs=0.06)
    assert np.sqrt(found.covariance[a, a]) == pytest.approx(0.1, rel=0.2)


def test_mean_and_sd_are_those_of_the_joint_normal() -> None:
    """Against the plain formulas of Gaussian conditioning with coefficients integrated out."""
    law, inputs = LOSS_LAWS["chinchilla"], simulated_cells("chinchilla", 30)
    rng = np.random.default_rng(1)
    loss = law.predict(law.published, inputs) * np.exp(rng.normal(0, 0.003, 30))
    found = fit_posterior(law, inputs, loss, np.zeros(30), fine=True)
    new = {"params": np.array([1e9, 1e11]), "tokens": np.array([1e10, 1e13])}
    step, slopes = 1e-5, []
    base = np.log(law.predict(found.stated(found.theta), new))
    for j in range(len(found.theta)):
        moved = found.theta.copy()
        moved[j] += step
        slopes.append((np.log(law.predict(found.stated(moved), new)) - base) / step)
    slopes = np.stack(slopes, axis=1)
    logs = np.log(np.stack([new["params"], new["tokens"]], axis=1))
    across = found.departure**2 * correlation(found.logs, logs)
    noise = np.eye(30) * found.scatter.variance
    covariance = noise + found.departure**2 * correlation(found.logs, found.logs)
    pull = np.linalg.solve(covariance, across)
    fitted = np.log(law.predict(found.stated(found.theta), inputs))
    mean = base + pull.T @ (np.log(loss) - fitted)
    left = slopes - pull.T @ found.jacobian
    spread = found.departure**2 * correlation(logs, logs) - across.T @ pull
    spread = spread + left @ found.covariance @ left.T
    got, sd = found.predict(new)
    np.testing.assert_allclose(got, mean, rtol=1e-6)
    np.testing.assert_allclose(sd, np.sqrt(np.diag(spread)), rtol=1e-3)


def test_a_stray_loss_counts_little() -> None:
    law, inputs = LOSS_LAWS["chinchilla"], simulated_cells("chinchilla", 40)
    loss = law.predict(law.published, inputs) * np.exp(
        np.random.default_rng(2).normal(0, 0.002, 40)
    )
    spoiled = loss.copy()
    spoiled[3] *= 1.3
    clean, robust = (
        fit_posterior(law, inputs, y, np.zeros(40), fine=True).mean(inputs) for y in (loss, spoiled)
    )
    assert np.abs(np.delete(robust - clean, 3)).max() < 0.01


def test_scatter_is_that_of_the_whole_matrix() -> None:
    """What goes through the factor of a departure against plain algebra on [n, n]."""
    rng = np.random.default_rng(0)
    logs, values = rng.uniform(0, 6, (80, 2)), rng.standard_normal(80)
    factor = correlation_factor(logs)
    assert factor.shape[1] < 80
    np.testing.assert_allclose(factor @ factor.T, correlation(logs, logs), atol=1e-12)
    variance = rng.uniform(1e-6, 1e-4, 80)
    scatter = Scatter(variance, 0.01 * factor)
    matrix = np.diag(variance) + 1e-4 * correlation(logs, logs)
    np.testing.assert_allclose(scatter.solve(values), np.linalg.solve(matrix, values), rtol=1e-7)
    whitened = scatter.whiten(np.column_stack([values, logs]))
    inverse = np.column_stack([values, logs]).T @ np.linalg.solve(
        matrix, np.column_stack([values, logs])
    )
    np.testing.assert_allclose(whitened.T @ whitened, inverse, rtol=1e-7)
    np.testing.assert_allclose(whitened[:, 0], scatter.whiten(values))
    density = 0.5 * values @ np.linalg.solve(matrix, values) + 0.5 * np.linalg.slogdet(matrix)[1]
    assert scatter.minus_log_density(values) == pytest.approx(density, rel=1e-9)


def test_departures_forget_over_their_length() -> None:
    at = np.array([[0.0, 0.0], [LENGTH, 0.0]])
    np.testing.assert_allclose(correlation(at, at)[0], [1.0, np.exp(-0.5)])
