"""The one model against truth: finite differences, planted optima, laws, groups and levels."""

import logging

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.scaling.optima.literature import literature_prior
from raysweep.scaling.optima.model import (
    LINEAR,
    Design,
    Layout,
    level_terms,
    predict_rows,
)
from raysweep.scaling.optima.surface import Surface, fit_surface
from raysweep.scaling.optima.valley import gap
from raysweep.study.shape import RunSize

VALLEY = np.log([0.009, 1e-4, 0.004, 0.001, 0.0045, 2e-4, 3e-4, 5e-4, 1.1, 0.9])
LADDER = [RunSize(n, d, name=f"{n:.2g}-{d:.2g}") for n in (3e7, 1e8, 4e8) for d in (1e9, 5e9, 2e10)]


def planted_optimum(cell: RunSize) -> np.ndarray:
    """ln learning rate ~ N^-0.5 D^0.1 and ln batch ~ N^0.1 D^0.4."""
    n, d = np.log(cell.params_active_non_embedding / 1e8), np.log(cell.tokens / 5e9)
    return np.log([0.002, 3e5]) + np.array([-0.5 * n + 0.1 * d, 0.1 * n + 0.4 * d])


def planted_loss(cell: RunSize, point: np.ndarray) -> np.ndarray:
    u, v = (point - planted_optimum(cell)).T
    level = 1.8 + 300 / cell.params_active_non_embedding**0.34 + 400 / cell.tokens**0.28
    return level * np.exp(gap(u, v, VALLEY))


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def trials(
    cells: list[RunSize], each: int, seed: int, noise: float = 0.001, spread: float = 0.7
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


@pytest.mark.parametrize("beside", [1.5, -1.5])
@pytest.mark.parametrize("seed", [1, 2])
def test_trials_on_one_side_of_all_optima_leave_them_open(beside: float, seed: int):
    """Rates of a factor of 5 and less from e^1.5 above (below) each optimum, on that side alone."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(len(LADDER)), 15)
    rate, batch = np.meshgrid(np.linspace(-0.8, 0.8, 5), [-1.0, 0.0, 1.0])
    off = np.column_stack([rate.ravel() + beside, batch.ravel()])
    point = np.concatenate([planted_optimum(cell) + off for cell in LADDER])
    loss = np.concatenate([planted_loss(c, point[index == i]) for i, c in enumerate(LADDER)])
    loss = loss * np.exp(0.001 * rng.standard_normal(len(loss)))
    rates, batches = np.exp(point.T)
    surface = fit_surface(LADDER, index, rates, batches, loss)
    for cell in LADDER:
        low, high = surface.optimum(cell).interval()[0]
        assert low < planted_optimum(cell)[0] < high
        assert abs(surface.optimum(cell).mean[0] - planted_optimum(cell)[0]) < 2


@pytest.fixture(scope="module")
def fitted() -> Surface:
    return fit_surface(LADDER, *trials(LADDER, 8, seed=1))


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
        ("batch_tokens", "params"): 0.1,
        ("batch_tokens", "tokens"): 0.4,
    }
    for (target, name), exponent in truth.items():
        found = fitted.laws.exponent(target, name)
        assert found.covers(exponent)
        assert found.low < found.value < found.high
        assert found.high - found.low < 0.45


def test_a_cell_without_trials_is_predicted_by_the_laws():
    known = LADDER[:-1]
    ahead = LADDER[-1]
    without = fit_surface(known, *trials(known, 8, seed=2))
    registered = fit_surface(LADDER, *trials(known, 8, seed=2))
    posterior = without.optimum(ahead)
    error = posterior.mean - planted_optimum(ahead)
    assert error @ np.linalg.solve(posterior.covariance, error) < 16
    assert posterior.trials == 0
    nearer = without.optimum(known[0]).covariance
    assert (posterior.covariance.diagonal() > nearer.diagonal()).all()
    np.testing.assert_allclose(
        posterior.covariance, registered.optimum(ahead).covariance, rtol=0.3, atol=1e-3
    )
    np.testing.assert_allclose(without.law(ahead), posterior.mean, atol=1e-9)


def test_prediction_is_lowest_at_the_optimum_and_draws_agree_with_it(fitted: Surface):
    cell = LADDER[4]
    posterior = fitted.optimum(cell)
    rates = posterior.learning_rate * np.array([[0.7, 1.0, 1.4]])
    batches = posterior.batch_tokens * np.array([[0.7], [1.0], [1.4]])
    loss, sd = fitted.predict(cell, rates, batches)
    assert loss.shape == sd.shape == (3, 3)
    assert loss.argmin() == 4
    assert loss[1, 1] == pytest.approx(posterior.loss, rel=1e-9)
    assert (sd > 0).all()
    point = np.array([[np.log(rates[0, 2]), np.log(batches[1, 0])]])
    draws = fitted.sample_cell(cell, point, 4000, np.random.default_rng(0))
    drawn = np.exp(draws.levels + draws.gaps[:, 0])
    low, middle, high = np.quantile(drawn, [0.16, 0.5, 0.84])
    assert middle == pytest.approx(loss[1, 2], rel=3e-3)
    assert 0.5 * (high - low) == pytest.approx(sd[1, 2], rel=0.4)
    # The posterior of an optimum holds the fine grain of a cell besides.
    spread = np.linalg.eigvalsh(posterior.covariance - np.cov(draws.optima.T))
    assert spread[0] > -2e-4
    # A hundred draws have the posterior's own mean and covariance, by construction.
    few = fitted.sample_cell(cell, point, 128, np.random.default_rng(1)).optima
    np.testing.assert_allclose(few.mean(0), posterior.mean, atol=1e-6)
    between = np.cov(few.T, bias=True)[0, 1]
    assert between == pytest.approx(posterior.covariance[0, 1], rel=1e-3)
    assert spread[1] < 0.05


def test_divergence_moves_the_optimum_away_from_high_learning_rates():
    cell = RunSize(1e8, 2e9, name="a")
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


def test_sparse_cells_are_told_apart():
    sparse = [
        RunSize(
            c.params_active_non_embedding,
            c.tokens,
            experts=8,
            top_k=2,
            params_total_non_embedding=3.5 * c.params_active_non_embedding,
            name=f"moe-{c.name}",
        )
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
    assert surface.laws.exponent("learning_rate", "sparsity").covers(-0.6 / np.log(3.5))


def test_edges_name_the_bounds_that_do_not_bracket(fitted: Surface):
    cell = LADDER[4]
    rate, batch = fitted.optimum(cell).learning_rate, fitted.optimum(cell).batch_tokens
    assert fitted.edges(cell, (rate / 4, rate * 4), (batch / 4, batch * 4)) == ()
    assert fitted.edges(cell, (rate * 2, rate * 8), (batch / 4, batch * 1.1)) == (
        ("learning_rate", "low"),
        ("batch", "high"),
    )


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


def test_derivatives_of_every_parameter_match_finite_differences():
    rng = np.random.default_rng(0)
    cells = [
        RunSize(1e8, 2e9, group="adamw", name="a"),
        RunSize(4e8, 8e9, group="muon", name="b"),
        RunSize(1e8, 9e9, experts=8, top_k=2, group="muon", name="c"),
        RunSize(2e8, 9e9, experts=64, top_k=2, group="adamw", name="d"),
    ]
    design = Design.of(cells)
    layout = Layout(design.offsets)
    x = design.matrix(cells)
    assert x.shape == (4, layout.columns)
    shared = 0.1 * rng.standard_normal(layout.size)
    shared[0], shared[layout.columns] = np.log(2e-3), np.log(4e5)
    shared[layout.valley] = VALLEY
    own = 0.05 * rng.standard_normal((4, 3))
    point = np.log([2e-3, 4e5]) + rng.normal(0, 0.5, (4, 2))
    _, _, by_shared, by_own = predict_rows(shared, own, x, point, layout)
    h = 1e-6

    def value(s: np.ndarray, o: np.ndarray) -> np.ndarray:
        return predict_rows(s, o, x, point, layout)[0]

    for k in range(layout.size):
        step = h * np.eye(layout.size)[k]
        numeric = (value(shared + step, own) - value(shared - step, own)) / (2 * h)
        np.testing.assert_allclose(by_shared[:, k], numeric, rtol=1e-4, atol=1e-7)
    for k in range(3):
        step = h * np.eye(3)[k]
        numeric = (value(shared, own + step) - value(shared, own - step)) / (2 * h)
        np.testing.assert_allclose(by_own[:, k], numeric, rtol=1e-4, atol=1e-7)


def test_the_level_is_chinchillas_law():
    e0, a, exponent_n, b, exponent_d = 1.8, 480.0, 0.35, 2000.0, 0.37
    design = Design.of(LADDER)
    n0, d0 = design.centre
    share_n, share_d = np.log(a / e0) - exponent_n * n0, np.log(b / e0) - exponent_d * d0
    centre = e0 * (1 + np.exp(share_n) + np.exp(share_d))
    q = np.r_[np.log(centre), share_n, share_d, np.log([exponent_n, exponent_d]), 0.4, np.zeros(3)]
    value, _ = level_terms(q, design.matrix(LADDER))
    law = [
        e0 + a / c.params_active_non_embedding**exponent_n + b / c.tokens**exponent_d
        for c in LADDER
    ]
    np.testing.assert_allclose(np.exp(value), law, rtol=1e-12)


def test_without_data_it_says_that_it_guesses_by_published_laws(caplog):
    cells = [RunSize(1e8, 2e9, name="a"), RunSize(4e8, 8e9, name="b")]
    empty = np.array([])
    with caplog.at_level(logging.INFO, logger="raysweep"):
        surface = fit_surface(cells, empty, empty, empty, empty)
    assert "published laws" in caplog.text
    assert surface.status == "prior"
    prior = literature_prior().at(surface.design.centre)
    np.testing.assert_allclose(
        surface.law(cells[0])[0], surface.design.matrix(cells)[0, :LINEAR] @ prior.mean[:LINEAR]
    )
    posterior = surface.optimum("a")
    assert (posterior.covariance.diagonal() > 0.3).all()


def test_a_floor_does_not_pass_for_distance_from_the_optimum():
    """Levels that bend in ln N and ln D, few trials a cell, and a prior four times too high."""
    sizes = [(n, d) for n in (5e7, 2e8, 8e8) for d in (6e9, 2e10, 8e10, 3e11)]
    cells = [RunSize(n, d, name=f"{n:.2g}-{d:.2g}") for n, d in sizes]
    data = trials(cells, 3, seed=5, spread=0.5)
    surface = fit_surface(cells, *data, prior=literature_prior().shifted(np.log(4)))
    assert surface.status == "converged"
    excess = [
        planted_loss(c, surface.optimum(c).mean[None])[0]
        / planted_loss(c, planted_optimum(c)[None])[0]
        - 1
        for c in cells
    ]
    assert np.mean(excess) < 1.5e-3
    assert max(excess) < 6e-3


def test_groups_share_the_valley_and_have_their_own_optimum_and_level():
    groups = {"adamw": (0.0, 0.0, 0.0), "muon": (1.2, 0.3, -0.02), "sgd": (-0.8, -0.2, 0.03)}
    cells, columns = [], []
    for g, (name, (rate, batch, level)) in enumerate(groups.items()):
        index, lr, b, loss = trials(LADDER, 4, seed=10 + g)
        cells += [
            RunSize(c.params_active_non_embedding, c.tokens, group=name, name=f"{c.name}-{name}")
            for c in LADDER
        ]
        columns.append(
            (index + g * len(LADDER), lr * np.exp(rate), b * np.exp(batch), loss * np.exp(level))
        )
    surface = fit_surface(cells, *(np.concatenate(c) for c in zip(*columns, strict=True)))
    for name, (rate, batch, level) in groups.items():
        off = np.array([rate, batch]) - np.mean([g[:2] for g in groups.values()], axis=0)
        lr, b, loss = surface.group_effect(name)
        assert np.log(lr.value) == pytest.approx(off[0], abs=0.15)
        assert np.log(b.value) == pytest.approx(off[1], abs=0.15)
        relative = level - np.mean([g[2] for g in groups.values()])
        assert np.log(loss.value) == pytest.approx(relative, abs=0.006)
        new = RunSize(1e9, 5e10, group=name)
        truth = planted_optimum(new) + np.array([rate, batch])
        ends = surface.optimum(new).interval()
        assert (ends[:, 0] < truth).all()
        assert (truth < ends[:, 1]).all()
    with pytest.raises(UserError, match="known: adamw, muon, sgd"):
        surface.group_effect("lion")


def test_a_sweep_at_one_batch_is_answered_at_that_batch():
    index, rate, batch, _ = trials(LADDER, 6, seed=3)
    batch = np.full_like(batch, 2.5e5)
    point = np.log(np.column_stack([rate, batch]))
    loss = np.concatenate([planted_loss(c, point[index == i]) for i, c in enumerate(LADDER)])
    loss *= np.exp(0.001 * np.random.default_rng(0).standard_normal(len(loss)))
    surface = fit_surface(LADDER, index, rate, batch, loss)
    assert surface.batch_rule is not None
    for cell in LADDER:
        posterior = surface.optimum(cell)
        assert posterior.batch_tokens == pytest.approx(2.5e5, rel=1e-3)
        u = np.linspace(-3, 3, 4001)
        along = np.log(0.002) + u, np.full_like(u, np.log(2.5e5))
        best = along[0][planted_loss(cell, np.column_stack(along)).argmin()]
        low, high = posterior.interval()[0]
        assert low < best < high
        assert np.isnan(posterior.interval()[1]).all()
    searched = fit_surface(LADDER, index, rate, batch, loss, batch_searched=True)
    assert searched.batch_rule is None
    assert searched.optimum(LADDER[0]).covariance[1, 1] > 0.05


def test_a_direction_that_the_cells_do_not_span_follows_the_prior():
    cells = [RunSize(1e8, d, name=f"{d:.2g}") for d in (1e9, 5e9, 2e10)]
    surface = fit_surface(cells, *trials(cells, 8, seed=2))
    prior = surface.problem.law_mean
    exponent = surface.laws.exponent("learning_rate", "params")
    assert exponent.value == pytest.approx(prior[1], abs=0.08)
    assert surface.laws.learned("learning_rate", "params") < 0.6
    assert surface.laws.learned("learning_rate", "tokens") > 0.8
    far = RunSize(1e9, 5e9)
    assert surface.unspanned(far) == ("N",)
    assert surface.unspanned(RunSize(1.2e8, 8e9)) == ()
    wide = np.ptp(surface.optimum(far).interval()[0])
    assert wide > 1.5 * np.ptp(surface.optimum(RunSize(1e8, 5e9)).interval()[0])


def test_cells_at_one_ratio_do_not_tell_n_from_d():
    cells = [RunSize(n, 20 * n, name=f"{n:.2g}") for n in (3e7, 1e8, 4e8, 1e9)]
    surface = fit_surface(cells, *trials(cells, 8, seed=2))
    assert surface.unspanned(RunSize(1e9, 2e10)) == ()
    assert surface.unspanned(RunSize(4e8, 2e11)) == ("N apart from D",)


def test_the_largest_batch_within_a_share_is_where_the_loss_reaches_it(fitted: Surface):
    cell = LADDER[4]
    batch, rate = fitted.largest_batch(cell, 0.005)
    posterior = fitted.optimum(cell)
    assert batch > posterior.batch_tokens
    loss, _ = fitted.predict(cell, np.array([rate]), np.array([batch]))
    assert loss[0] / posterior.loss - 1 == pytest.approx(0.005, abs=3e-4)
    assert fitted.largest_batch(cell, 0.02)[0] > batch


def test_intervals_widen_with_the_distance_from_the_cells(fitted: Surface):
    widths = [
        np.ptp(fitted.optimum(RunSize(4e8 * f, 2e10 * f)).interval(), axis=1)
        for f in (1, 4, 16, 64)
    ]
    wide = np.array(widths)
    assert (wide[1:] > wide[:-1]).all()


def test_joint_draws_of_optima_have_the_posteriors_moments(fitted: Surface):
    runs = [LADDER[2], RunSize(1e9, 4e10)]
    draws = fitted.sample_optima(runs, 6000, np.random.default_rng(0))
    for i, run in enumerate(runs):
        posterior = fitted.optimum(run)
        np.testing.assert_allclose(draws[:, i].mean(0), posterior.mean, atol=0.02)
        np.testing.assert_allclose(
            draws[:, i].std(0), np.sqrt(posterior.covariance.diagonal()), rtol=0.1
        )


def test_a_warm_start_ends_where_a_cold_one_does():
    index, rate, batch, loss = trials(LADDER, 8, seed=1)
    most = np.arange(len(index)) != 40
    first = fit_surface(LADDER, index[most], rate[most], batch[most], loss[most])
    warm = fit_surface(LADDER, index, rate, batch, loss, warm=first)
    cold = fit_surface(LADDER, index, rate, batch, loss)
    for cell in LADDER:
        np.testing.assert_allclose(warm.optimum(cell).mean, cold.optimum(cell).mean, atol=0.02)


def test_names_that_are_not_there_are_user_errors(fitted: Surface):
    with pytest.raises(UserError, match="nowhere"):
        fitted.optimum("nowhere")
    with pytest.raises(UserError, match="depth"):
        fitted.laws.exponent("batch_tokens", "depth")
