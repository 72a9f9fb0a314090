"""Optima of planted valleys: where, how sure, and what is said when they cannot be told."""

from dataclasses import replace

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.scaling.cells import cell_table
from raysweep.scaling.optimum import OPTIMUM_METHODS, find_optima
from raysweep.scaling.quadratic import fit_valley

METHODS = list(OPTIMUM_METHODS)


def miss(optimum, truth=(3e-3, 2e5)):
    found = np.log([optimum.learning_rate, optimum.batch_tokens])
    return found - np.log(truth)


@pytest.mark.parametrize(
    ("method", "within"),
    [
        ("surface", 0.05),
        ("quadratic", 0.08),
        ("interpolate", 0.05),
        ("mean_within", 0.26),
        ("argmin", 0.26),
    ],
)
def test_a_noiseless_grid_gives_the_planted_optimum(cell_trials, method, within):
    # The grid's step is 0.5; its points lie 0.1 and -0.15 off the optimum.
    trials = cell_trials(grid=True, off=(0.1, -0.15))
    (optimum,) = find_optima([trials], method)
    assert optimum.status == "interior"
    assert np.abs(miss(optimum)).max() < within
    assert optimum.loss == pytest.approx(2.5, rel=2e-3)
    assert optimum.n_trials == 49


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("off", "status"),
    [
        ((2.2, 0.0), "edge: learning_rate low"),
        ((-2.2, 0.0), "edge: learning_rate high"),
        ((0.0, 2.5), "edge: batch low"),
        ((0.0, -2.5), "edge: batch high"),
    ],
)
def test_an_optimum_outside_the_searched_range_is_an_edge(cell_trials, method, off, status):
    (optimum,) = find_optima([cell_trials(grid=True, off=off)], method)
    assert optimum.status.startswith("edge: ")
    assert status.removeprefix("edge: ") in optimum.status
    axis = 0 if "learning_rate" in status else 1
    assert np.isnan(optimum.covariance[axis, axis])
    assert not optimum.interior


@pytest.mark.parametrize("method", METHODS)
def test_equal_losses_are_flat(cell_trials, method):
    trials = replace(cell_trials(grid=True), loss=np.full(49, 2.0))
    (optimum,) = find_optima([trials], method)
    assert optimum.status == "flat"
    assert np.isnan(optimum.covariance).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2])
def test_a_trial_or_two_are_too_few(cell_trials, method, n):
    trials = cell_trials(n=n)
    (optimum,) = find_optima([trials], method)
    assert optimum.status == "too few trials"
    assert optimum.n_trials == n
    assert optimum.learning_rate > 0


def test_interpolation_needs_a_grid(cell_trials):
    (optimum,) = find_optima([cell_trials(n=30)], "interpolate")
    assert optimum.status == "too few trials"


def test_one_batch_leaves_the_batch_unidentified(cell_trials):
    trials = replace(cell_trials(grid=True), batch_tokens=np.full(49, 2e5))
    trials = replace(trials, loss=2.5 * np.exp(0.02 * np.log(trials.learning_rate / 3e-3) ** 2))
    for method in ("surface", "quadratic", "argmin", "mean_within"):
        (optimum,) = find_optima([trials], method)
        assert optimum.status == "interior", method
        assert np.isfinite(optimum.covariance[0, 0])
        assert np.isnan(optimum.covariance[1]).all()
        assert np.isnan(optimum.covariance[:, 1]).all()


def test_a_diverged_trial_bounds_the_searched_range(cell_trials):
    trials = cell_trials(grid=True, off=(-1.5, 0.0))  # the highest rate is the best
    (edge,) = find_optima([trials], "argmin")
    assert edge.status == "edge: learning_rate high"
    trials = replace(
        trials, failed_learning_rate=np.array([3e-2]), failed_batch_tokens=np.array([2e5])
    )
    (inside,) = find_optima([trials], "argmin")
    assert inside.status == "interior"


@pytest.mark.parametrize("method", ["quadratic", "surface"])
def test_the_covariance_matches_the_scatter_of_repeated_studies(cell_trials, method):
    optima = [
        find_optima([cell_trials(n=30, noise=0.002, seed=s, reach=1.0)], method)[0]
        for s in range(60)
    ]
    inside = [o for o in optima if o.interior]
    assert len(inside) > 50
    scatter = np.std([miss(o) for o in inside], axis=0)
    stated = np.sqrt(np.mean([np.diag(o.covariance) for o in inside], axis=0))
    assert (stated / scatter > 0.6).all()
    assert (stated / scatter < 2.5).all()


def test_few_trials_stay_near_the_best_one(cell_trials):
    for seed in range(20):
        trials = cell_trials(n=4, seed=seed, noise=0.001)
        (optimum,) = find_optima([trials], "quadratic")
        for found, tried in (
            (optimum.learning_rate, trials.learning_rate),
            (optimum.batch_tokens, trials.batch_tokens),
        ):
            assert tried.min() * (1 - 1e-9) <= found <= tried.max() * (1 + 1e-9)
        assert 0.9 * trials.loss.min() < optimum.loss < 1.01 * trials.loss.min()


def test_a_saddle_is_fitted_by_a_valley():
    point = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    fitted = fit_valley(point, 0.05 * (point[:, 0] ** 2 - point[:, 1] ** 2), noise=1e-3)
    assert (np.linalg.eigvalsh(fitted.hessian) > 0).all()
    low, high = np.full(2, -1.0), np.full(2, 1.0)
    best = fitted.minimum_within(low, high)
    around = np.random.default_rng(1).uniform(-1, 1, (500, 2))
    assert fitted.value(best) <= min(fitted.value(p) for p in around) + 1e-12


def test_a_known_quadratic_is_recovered_exactly():
    rng = np.random.default_rng(3)
    point = rng.uniform(-1.2, 1.2, (60, 2))
    x = point - [0.2, -0.3]
    hessian = np.array([[0.03, -0.01], [-0.01, 0.02]])
    fitted = fit_valley(point, 1.0 + 0.5 * np.einsum("ni,ij,nj->n", x, hessian, x), noise=1e-5)
    np.testing.assert_allclose(fitted.optimum, [0.2, -0.3], atol=5e-3)
    np.testing.assert_allclose(fitted.hessian, hessian, atol=2e-3)


def test_the_own_estimate_does_not_lean_on_the_law_of_the_others(planted_study):
    # One cell's optimum lies off the law that the others follow; its few noisy trials let the
    # surface pull it back to that law.
    name, leaning, own = "dense-9e+07-40tpp", [], []
    truth = np.log(3e-3 * 0.9**-0.6 * 1.8**0.25) + 0.5
    for seed in range(12):
        frame = planted_study(per_cell=8, noise=0.006, seed=seed)
        frame.loc[frame["cell"] == name, "learning_rate"] *= np.exp(0.5)
        optima = {o.cell: o for o in find_optima(cell_table(frame).searched(), "surface")}
        stray = optima[name]
        if stray.interior:
            leaning.append(np.log(stray.learning_rate) - truth)
            own.append(stray.own[0] - truth)
    assert len(own) > 8
    assert np.mean(leaning) < -0.05
    assert abs(np.mean(own)) < 0.7 * abs(np.mean(leaning))


def test_an_unknown_method_is_named(cell_trials):
    with pytest.raises(UserError, match="unknown optimum method 'best'; known: surface, quadratic"):
        find_optima([cell_trials()], "best")


def test_no_cells_no_optima():
    for method in METHODS:
        assert find_optima([], method) == []
