"""The surface model against truth: finite differences, dense algebra, planted valleys."""

import logging

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.scaling.surface import CellFeatures, Surface, SurfaceSettings, fit_surface
from raysweep.scaling.surface_arrow import invert, solve
from raysweep.scaling.surface_features import covariates_of, prior_exponents, prior_optimum
from raysweep.scaling.surface_shape import PARAMETERS, curvature, gap, gap_derivatives

VALLEY = np.log([0.009, 1e-4, 0.004, 0.001, 0.0045, 2e-4, 1.1, 0.9])
LADDER = [CellFeatures(f"{n:.2g}-{d:.2g}", n, d) for n in (3e7, 1e8, 4e8) for d in (1e9, 5e9, 2e10)]


def planted_optimum(cell: CellFeatures) -> np.ndarray:
    """ln learning rate ~ N^-0.5 D^0.1 and ln batch ~ N^0.1 D^0.4."""
    n, d = np.log(cell.params / 1e8), np.log(cell.tokens / 5e9)
    return np.log([0.002, 3e5]) + np.array([-0.5 * n + 0.1 * d, 0.1 * n + 0.4 * d])


def planted_loss(cell: CellFeatures, point: np.ndarray) -> np.ndarray:
    u, v = (point - planted_optimum(cell)).T
    level = 1.8 + 300 / cell.params**0.34 + 400 / cell.tokens**0.28
    return level * np.exp(gap(u, v, VALLEY))


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def trials(
    cells: list[CellFeatures], each: int, seed: int, noise: float = 0.001, spread: float = 0.7
) -> Columns:
    """Random trials about the planted optima: the arguments of fit_surface after the cells."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(len(cells)), each)
    point = np.concatenate(
        [planted_optimum(c) + spread * rng.standard_normal((each, 2)) for c in cells]
    )
    loss = np.concatenate(
        [planted_loss(c, point[index == i]) for i, c in enumerate(cells)]
    ) * np.exp(noise * rng.standard_normal(len(index)))
    return index, np.exp(point[:, 0]), np.exp(point[:, 1]), loss


@pytest.fixture(scope="module")
def fitted() -> Surface:
    return fit_surface(LADDER, *trials(LADDER, 8, seed=1))


def test_valley_is_lowest_at_its_optimum_and_convex():
    rng = np.random.default_rng(0)
    for _ in range(50):
        valley = np.r_[rng.normal(np.log(0.003), 2, 6), rng.normal(0, 0.3, 2)]
        a, b = rng.uniform(-3, 3, (2, 40, 2))
        ends = gap(a[:, 0], a[:, 1], valley), gap(b[:, 0], b[:, 1], valley)
        half = 0.5 * (a + b)
        middle = gap(half[:, 0], half[:, 1], valley)
        assert (ends[0] >= -1e-12).all()
        assert (middle <= 0.5 * (ends[0] + ends[1]) + 1e-12).all()
    assert gap(np.zeros(1), np.zeros(1), VALLEY)[0] == pytest.approx(0, abs=1e-15)


def test_valley_derivatives_match_finite_differences():
    rng = np.random.default_rng(1)
    u, v = rng.normal(0, 1, (2, 12))
    value, by_point, by_valley = gap_derivatives(u, v, VALLEY)
    np.testing.assert_allclose(value, gap(u, v, VALLEY), rtol=1e-10, atol=1e-14)
    h = 1e-5
    np.testing.assert_allclose(
        by_point[:, 0], (gap(u + h, v, VALLEY) - gap(u - h, v, VALLEY)) / (2 * h), rtol=1e-5
    )
    np.testing.assert_allclose(
        by_point[:, 1], (gap(u, v + h, VALLEY) - gap(u, v - h, VALLEY)) / (2 * h), rtol=1e-5
    )
    for k in range(PARAMETERS):
        step = h * np.eye(PARAMETERS)[k]
        difference = (gap(u, v, VALLEY + step) - gap(u, v, VALLEY - step)) / (2 * h)
        np.testing.assert_allclose(by_valley[:, k], difference, rtol=1e-4, atol=1e-9)


def test_curvature_is_the_second_difference_at_the_optimum():
    h = 1e-3
    axes = np.eye(2) * h

    def at(point: np.ndarray) -> float:
        return float(gap(point[0], point[1], VALLEY))

    numeric = np.empty((2, 2))
    for i in range(2):
        for j in range(2):
            corners = [(s * t) * at(s * axes[i] + t * axes[j]) for s in (1, -1) for t in (1, -1)]
            numeric[i, j] = sum(corners) / (4 * h * h)
    np.testing.assert_allclose(curvature(VALLEY), numeric, rtol=1e-3)


def test_arrow_blocks_match_the_dense_inverse():
    rng = np.random.default_rng(2)
    cells, shared = 4, 5
    size = shared + 3 * cells
    rows = []
    for cell in range(cells):
        row = np.zeros((6, size))
        row[:, :shared] = rng.normal(size=(6, shared))
        row[:, shared + 3 * cell : shared + 3 * cell + 3] = rng.normal(size=(6, 3))
        rows.append(row)
    dense = sum(row.T @ row for row in rows) + np.eye(size)
    own = [slice(shared + 3 * c, shared + 3 * c + 3) for c in range(cells)]
    head = dense[:shared, :shared]
    cross = np.stack([dense[:shared, block] for block in own])
    tail = np.stack([dense[block, block] for block in own])
    inverse = np.linalg.inv(dense)
    blocks = invert(head, cross, tail)
    np.testing.assert_allclose(blocks.shared, inverse[:shared, :shared], rtol=1e-9, atol=1e-12)
    for c, block in enumerate(own):
        np.testing.assert_allclose(blocks.cross[c], inverse[:shared, block], rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(blocks.own[c], inverse[block, block], rtol=1e-8, atol=1e-11)
    target = rng.normal(size=size)
    first, rest = solve(head, cross, tail, target[:shared], target[shared:].reshape(-1, 3))
    np.testing.assert_allclose(np.r_[first, rest.ravel()], inverse @ target, rtol=1e-8)


def test_prior_exponents_are_the_published_law_in_the_regressors():
    cells = [
        CellFeatures("dense", 1e8, 2e9),
        CellFeatures("sparse", 1e8, 8e9, experts=8, top_k=2, params_total=3.5e8),
        CellFeatures("sparser", 3e8, 8e9, experts=64, top_k=2, params_total=6e9),
    ]
    covariates = covariates_of(cells)
    assert covariates.names == (
        "params",
        "tokens",
        "sparsity",
        "experts=8,top_k=2",
        "experts=64,top_k=2",
    )
    predicted = covariates.matrix(cells) @ prior_exponents(covariates).T
    np.testing.assert_allclose(predicted, prior_optimum(cells), rtol=1e-12)
    assert covariates_of(LADDER).names == ("params", "tokens")


def test_recovers_planted_optima_losses_and_laws(fitted: Surface):
    assert fitted.status == "converged"
    for cell in LADDER:
        posterior = fitted.optimum(cell)
        error = posterior.mean - planted_optimum(cell)
        assert error @ np.linalg.solve(posterior.covariance, error) < 16  # 3.6 sd in the plane
        assert np.abs(error).max() < 0.25
        true_gap = planted_loss(cell, posterior.mean[None])[0]
        true_gap /= planted_loss(cell, planted_optimum(cell)[None])[0]
        assert true_gap - 1 < 4e-4
        assert posterior.loss == pytest.approx(
            planted_loss(cell, planted_optimum(cell)[None])[0], rel=2e-3
        )
    truth = {
        ("learning_rate", "params"): -0.5,
        ("learning_rate", "tokens"): 0.1,
        ("batch", "params"): 0.1,
        ("batch", "tokens"): 0.4,
    }
    for (target, name), exponent in truth.items():
        mean, low, high = fitted.laws.exponent(target, name)
        assert low < exponent < high
        assert low < mean < high
        assert high - low < 0.45
    samples = fitted.laws.samples(4000)
    np.testing.assert_allclose(samples.mean(0), fitted.laws.exponents, atol=0.03)


def test_a_cell_without_trials_is_predicted_by_the_laws():
    known = LADDER[:-1]
    ahead = LADDER[-1]
    without = fit_surface(known, *trials(known, 8, seed=2))
    registered = fit_surface(LADDER, *trials(known, 8, seed=2))
    posterior = without.optimum(ahead)
    error = posterior.mean - planted_optimum(ahead)
    assert error @ np.linalg.solve(posterior.covariance, error) < 16
    assert posterior.trials == 0
    assert posterior.expected_gap > without.optimum(known[0]).expected_gap
    np.testing.assert_allclose(
        posterior.covariance, registered.optimum(ahead).covariance, rtol=0.3, atol=1e-3
    )
    by_law = np.log(without.laws.predict(ahead))
    np.testing.assert_allclose(by_law, posterior.mean, atol=1e-9)


def test_prediction_is_lowest_at_the_optimum_and_draws_agree_with_it(fitted: Surface):
    cell = LADDER[4]
    posterior = fitted.optimum(cell)
    rates = posterior.learning_rate * np.array([[0.25, 1.0, 4.0]])
    batches = posterior.batch_tokens * np.array([[0.25], [1.0], [4.0]])
    loss, sd = fitted.predict(cell, rates, batches)
    assert loss.shape == sd.shape == (3, 3)
    assert loss.argmin() == 4
    assert loss[1, 1] == pytest.approx(posterior.loss, rel=1e-9)
    assert (sd > 0).all()
    point = np.array([[np.log(rates[0, 2]), np.log(batches[1, 0])]])
    draws = fitted.sample_cell(cell, point, 4000, np.random.default_rng(0))
    drawn = np.exp(draws.levels + draws.gaps[:, 0])
    assert drawn.mean() == pytest.approx(loss[1, 2], rel=3e-3)
    assert drawn.std() == pytest.approx(sd[1, 2], rel=0.3)
    np.testing.assert_allclose(np.cov(draws.optima.T), posterior.covariance, rtol=0.15, atol=1e-4)


def test_without_data_it_says_it_guesses_by_the_published_law(caplog):
    cells = [CellFeatures("a", 1e8, 2e9), CellFeatures("b", 4e8, 8e9)]
    empty = np.array([])
    with caplog.at_level(logging.INFO, logger="raysweep"):
        surface = fit_surface(cells, empty, empty, empty, empty)
    assert "Step Law" in caplog.text
    assert surface.status == "prior"
    posterior = surface.optimum("a")
    assert posterior.learning_rate == pytest.approx(1.79 * 1e8**-0.713 * 2e9**0.307, rel=1e-6)
    assert posterior.batch_tokens == pytest.approx(0.58 * 2e9**0.571, rel=1e-6)
    assert (posterior.covariance.diagonal() > 1).all()


def test_divergence_moves_the_optimum_away_from_high_learning_rates():
    cell = CellFeatures("a", 1e8, 2e9)
    none = np.zeros(0)
    start = fit_surface([cell], none, none, none, none).optimum("a")
    lost = fit_surface(
        [cell],
        np.array([0]),
        np.array([start.learning_rate * 1.5]),
        np.array([start.batch_tokens]),
        np.array([np.nan]),
    ).optimum("a")
    assert lost.learning_rate < 0.9 * start.learning_rate
    # Far above the optimum it is no news.
    news = (4, 0.5, 3e5, np.inf)
    data = trials(LADDER, 8, 1)
    index, rate, batch, loss = (np.r_[a, b] for a, b in zip(data, news, strict=True))
    expected = fit_surface(LADDER, index, rate, batch, loss)
    before = fit_surface(LADDER, *data)
    np.testing.assert_allclose(
        expected.optimum(LADDER[4]).mean, before.optimum(LADDER[4]).mean, atol=0.01
    )


def test_a_cell_of_bad_trials_only_neither_misleads_the_laws_nor_its_level():
    index, rate, batch, loss = trials(LADDER, 8, seed=1)
    keep = index != 8
    bad = (np.array([8, 8]), np.array([0.1, 0.2]), np.array([3e5, 3e5]), np.array([7.0, 7.5]))
    rows = zip((index, rate, batch, loss), bad, strict=True)
    index, rate, batch, loss = (np.r_[a[keep], b] for a, b in rows)
    surface = fit_surface(LADDER, index, rate, batch, loss)
    posterior = surface.optimum(LADDER[8])
    assert posterior.loss < 3
    assert np.abs(posterior.mean - planted_optimum(LADDER[8])).max() < 0.6


def test_an_outlier_weighs_little():
    data = trials(LADDER, 8, seed=1)
    spoiled = data[3].copy()
    spoiled[36] *= 1.03  # 30 sd of noise
    clean, dirty = fit_surface(LADDER, *data), fit_surface(LADDER, *data[:3], spoiled)
    for cell in LADDER:
        moved = clean.optimum(cell).mean - dirty.optimum(cell).mean
        assert np.abs(moved).max() < 0.15


def test_losses_of_known_error_weigh_less():
    index, rate, batch, loss = trials(LADDER, 8, seed=1)
    wrong = np.where(index == 4, loss * np.exp(0.02 * np.log(rate / 0.002)), loss)
    error = np.where(index == 4, 0.3, 0.0)
    trusted = fit_surface(LADDER, index, rate, batch, wrong).optimum(LADDER[4])
    doubted = fit_surface(LADDER, index, rate, batch, wrong, loss_se=error).optimum(LADDER[4])
    truth = planted_optimum(LADDER[4])
    assert np.abs(doubted.mean - truth).max() < np.abs(trusted.mean - truth).max()
    assert doubted.log_loss_sd > 3 * trusted.log_loss_sd


def test_answers_lean_little_on_prior_widths():
    data = trials(LADDER, 6, seed=3)
    for factor in (0.5, 2.0):
        surface = fit_surface(LADDER, *data, settings=SurfaceSettings().scaled(factor))
        for cell in LADDER:
            mean = surface.optimum(cell).mean
            excess = planted_loss(cell, mean[None]) / planted_loss(
                cell, planted_optimum(cell)[None]
            )
            assert excess[0] - 1 < 1e-3


def test_sparse_cells_are_told_apart():
    sparse = [
        CellFeatures(f"moe-{c.name}", c.params, c.tokens, 8, 2, params_total=3.5 * c.params)
        for c in LADDER
    ]
    cells = [*LADDER, *sparse]
    index, rate, batch, loss = trials(LADDER, 6, seed=4)
    shift = np.exp(-0.6), np.exp(-0.3)
    surface = fit_surface(
        cells,
        np.r_[index, index + len(LADDER)],
        np.r_[rate, rate * shift[0]],
        np.r_[batch, batch * shift[1]],
        np.r_[loss, loss * 0.95],
    )
    dense, moe = surface.optimum(LADDER[4]), surface.optimum(sparse[4])
    assert np.log(moe.learning_rate / dense.learning_rate) == pytest.approx(-0.6, abs=0.15)
    assert np.log(moe.batch_tokens / dense.batch_tokens) == pytest.approx(-0.3, abs=0.15)
    _, low, high = surface.laws.exponent("learning_rate", "sparsity")
    assert low < -0.6 / np.log(3.5) < high


def test_edges_name_the_bounds_that_do_not_bracket(fitted: Surface):
    cell = LADDER[4]
    rate, batch = fitted.optimum(cell).learning_rate, fitted.optimum(cell).batch_tokens
    assert fitted.edges(cell, (rate / 4, rate * 4), (batch / 4, batch * 4)) == ()
    assert fitted.edges(cell, (rate * 2, rate * 8), (batch / 4, batch * 1.1)) == (
        ("learning_rate", "low"),
        ("batch", "high"),
    )


def test_recommends_a_trial_that_did_better_than_the_optimum(fitted: Surface):
    cell = LADDER[0]
    optimum = fitted.optimum(cell)
    data = trials(LADDER, 8, seed=1)
    better = (0, optimum.learning_rate * 1.2, optimum.batch_tokens, optimum.loss * 0.98)
    index, rate, batch, loss = (np.r_[a, b] for a, b in zip(data, better, strict=True))
    surface = fit_surface(LADDER, index, rate, batch, loss)
    assert surface.recommend(cell) == pytest.approx(better[1:3])
    unknown = CellFeatures("new", 1e9, 1e11)
    posterior = surface.optimum(unknown)
    assert surface.recommend(unknown) == (posterior.learning_rate, posterior.batch_tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": np.array([0.0])}, "positive"),
        ({"loss": np.array([1.0, 2.0])}, "equal lengths"),
        ({"cell_index": np.array([3])}, "cell_index"),
        ({"cells": []}, "at least one"),
        ({"cells": [LADDER[0], LADDER[0]]}, "distinct"),
    ],
)
def test_what_cannot_be_fitted_is_said(change: dict, message: str):
    good = {
        "cells": LADDER[:1],
        "cell_index": np.array([0]),
        "learning_rate": np.array([1e-3]),
        "batch_tokens": np.array([1e5]),
        "loss": np.array([3.0]),
    }
    with pytest.raises(UserError, match=message):
        fit_surface(**(good | change))


def test_names_that_are_not_there_are_user_errors(fitted: Surface):
    with pytest.raises(UserError, match="nowhere"):
        fitted.optimum("nowhere")
    with pytest.raises(UserError, match="sparsity"):
        fitted.laws.exponent("batch", "sparsity")
    with pytest.raises(UserError, match="params"):
        CellFeatures("bad", -1, 1e9)
    with pytest.raises(UserError, match="params_total"):
        CellFeatures("bad", 1e8, 1e9, params_total=1e7)


def test_one_lucky_repeat_among_others_is_not_recommended(fitted: Surface):
    cell = LADDER[0]
    optimum = fitted.optimum(cell)
    data = trials(LADDER, 8, seed=1)
    place = optimum.learning_rate * 1.3, optimum.batch_tokens
    losses = optimum.loss * np.array([0.996, 1.004, 1.004, 1.004])
    repeats = np.zeros(4), np.full(4, place[0]), np.full(4, place[1]), losses
    index, rate, batch, loss = (np.r_[a, b] for a, b in zip(data, repeats, strict=True))
    surface = fit_surface(LADDER, index.astype(int), rate, batch, loss)
    assert surface.recommend(cell) != pytest.approx(place)
