"""Critical batch, noise scale, and dense against MoE, on planted studies."""

import numpy as np
import pandas as pd
import pytest

from raysweep.scaling.cells import cell_table
from raysweep.scaling.noise import (
    cell_noise_scale,
    compare_kinds,
    fit_critical_batch,
    fit_noise_scale,
)
from raysweep.scaling.optimum import Optimum, find_optima


def exact_optima(batch_of_loss, losses, se=0.02):
    """Cells with a loss each, and optima on a given curve."""
    names = [f"c{i}" for i in range(len(losses))]
    cells = pd.DataFrame(
        {
            "architecture": "dense",
            "architecture_kind": "dense",
            "params_active_non_embedding": np.geomspace(1e7, 1e9, len(losses)),
            "tokens": np.geomspace(2e8, 2e10, len(losses)),
            "flops": np.geomspace(1e16, 1e20, len(losses)),
            "experts": 1.0,
            "top_k": 1.0,
            "active_ratio": 1.0,
            "loss": losses,
        },
        index=names,
    )
    covariance = np.eye(2) * se**2
    optima = {
        name: Optimum(
            cell=name,
            learning_rate=1e-3,
            batch_tokens=batch_of_loss(loss),
            loss=loss,
            covariance=covariance,
            loss_se=0.001,
            status="interior",
            method="surface",
            n_trials=20,
            own=np.log([1e-3, batch_of_loss(loss)]),
            own_covariance=covariance,
        )
        for name, loss in zip(names, losses, strict=True)
    }
    return cells, optima


def test_kaplans_critical_batch_comes_back():
    # B_crit = 2e8 / L^(1/0.21), Kaplan et al. 2020
    cells, optima = exact_optima(lambda loss: 2e8 / loss ** (1 / 0.21), np.linspace(2.2, 4, 9))
    critical = fit_critical_batch(cells, optima)
    assert critical.law.status == "converged"
    assert critical.b0.value == pytest.approx(2e8, rel=1e-6)
    assert critical.a.value == pytest.approx(0.21, rel=1e-6)
    assert critical.a.low <= 0.21 <= critical.a.high


def test_a_batch_that_grows_with_the_loss_has_no_critical_exponent():
    cells, optima = exact_optima(lambda loss: 1e5 * loss**2, np.linspace(2.2, 4, 9))
    critical = fit_critical_batch(cells, optima)
    assert critical.law.exponents["loss"].value == pytest.approx(2)
    assert np.isnan(critical.a.value)


def test_the_noise_scale_averages_numerator_and_denominator_apart():
    trials = pd.DataFrame(
        {
            "cell": ["a", "a", "a", "b"],
            "loss": [2.0, 2.001, 3.0, 2.0],
            "noise_trace": [10.0, 30.0, 1e6, np.nan],
            "noise_grad_sq": [1.0, 9.0, 1.0, np.nan],
            "noise_scale_tokens": [np.nan, np.nan, 5.0, np.nan],
            "sequence_length": [100.0, 100.0, 100.0, 100.0],
        }
    )
    cells = pd.DataFrame(index=pd.Index(["a", "b", "c"], name="cell"))
    found = cell_noise_scale(cells, trials)
    # (10 + 30) / (1 + 9) sequences of 100 tokens; the trial far above the best does not count
    assert found.loc["a", "noise_scale_tokens"] == pytest.approx(400)
    assert found.loc[["b", "c"], ["noise_scale_tokens", "log_sd"]].isna().all(axis=None)
    assert set(found.loc[["b", "c"], "left_out"]) == {"noise scale not measured"}


def test_estimates_below_zero_count_too():
    """Chosen for being positive, one of four would tell a noise scale where there is none."""
    trials = pd.DataFrame(
        {
            "cell": ["a"] * 4 + ["b"] * 4,
            "loss": 2.0,
            "noise_trace": [10.0, 30.0, 20.0, 20.0] * 2,
            "noise_grad_sq": [-1.0, 9.0, 8.0, 4.0, -3.0, -2.0, 1.0, -1.0],
            "noise_scale_tokens": [np.nan, 333.0, 250.0, 500.0, np.nan, np.nan, 2000.0, np.nan],
            "sequence_length": 100.0,
        }
    )
    cells = pd.DataFrame(index=pd.Index(["a", "b"], name="cell"))
    found = cell_noise_scale(cells, trials)
    assert found.loc["a", "noise_scale_tokens"] == pytest.approx(100 * 20 / 5)
    parts = np.array([10, 30, 20, 20]) / 20 - np.array([-1, 9, 8, 4]) / 5
    assert found.loc["a", "log_sd"] == pytest.approx(parts.std(ddof=1) / 2)
    assert found["noise_scale_tokens"].isna().tolist() == [False, True]
    assert found.loc["b", "left_out"] == "|G|^2 not distinguishable from 0"


def test_log_sd_tells_how_far_the_ratio_strays():
    """Of 400 cells with noisy parts: the ratio's own spread, and its interval's coverage."""
    rng = np.random.default_rng(0)
    cell = np.repeat([f"c{i}" for i in range(400)], 8)
    trials = pd.DataFrame(
        {
            "cell": cell,
            "loss": 2.0,
            "noise_trace": 20 * (1 + 0.3 * rng.standard_normal(len(cell))),
            "noise_grad_sq": 5 * (1 + 0.5 * rng.standard_normal(len(cell))),
            "noise_scale_tokens": np.nan,
            "sequence_length": 1.0,
        }
    )
    assert (trials["noise_grad_sq"] < 0).any()
    found = cell_noise_scale(pd.DataFrame(index=pd.unique(cell)), trials)
    error = np.log(found["noise_scale_tokens"].to_numpy(float) / 4)
    assert abs(error.mean()) < 0.03
    assert found["log_sd"].mean() == pytest.approx(error.std(), rel=0.1)
    covered = np.abs(error) < 1.96 * found["log_sd"].to_numpy(float)
    assert 0.88 < covered.mean() < 0.97


def test_the_recorded_ratio_serves_where_its_parts_are_unknown(planted_study):
    table = cell_table(planted_study(per_cell=8))
    found = cell_noise_scale(table.cells, table.trials)
    expected = 1.5 * 2e5 * (table.cells["tokens"] / 2e9) ** 0.5
    np.testing.assert_allclose(found["noise_scale_tokens"], expected, rtol=0.5)
    cells = table.cells.assign(loss=table.cells["best_loss"])
    law = fit_noise_scale(cells, found).law
    assert law.status == "converged"
    assert law.exponents["loss"].value < 0


def test_the_planted_ratio_of_moe_over_dense_is_found(planted_study):
    frame = planted_study(
        kinds=("dense", "moe"), moe_rate=1.4, moe_batch=0.7, per_cell=20, noise=0.0005
    )
    table = cell_table(frame)
    optima = {o.cell: o for o in find_optima(table.searched())}
    cells = table.cells.assign(loss=[optima[n].loss for n in table.cells.index])
    noise = cell_noise_scale(cells, table.trials)
    ratios = compare_kinds(cells, optima, noise, at_equal=("params", "tokens"))
    assert ratios["learning_rate"].ratio == pytest.approx(1.4, rel=0.04)
    assert ratios["batch_tokens"].ratio == pytest.approx(0.7, rel=0.04)
    assert ratios["noise_scale_tokens"].ratio == pytest.approx(0.7, rel=0.15)
    for ratio in ratios.values():
        assert ratio.ok
        assert ratio.low < ratio.ratio < ratio.high
        assert (ratio.n_dense, ratio.n_moe) == (8, 8)
    assert ratios["batch_tokens"].high < 1 < ratios["learning_rate"].low
    at_loss = compare_kinds(cells, optima, noise, at_equal=("loss",))
    low, high = at_loss["batch_tokens"].overlap
    dense = cells.loc[cells["architecture_kind"] == "dense", "loss"]
    assert dense.min() <= low < high <= dense.max()


def test_one_kind_alone_is_no_comparison(planted_study):
    table = cell_table(planted_study())
    optima = {o.cell: o for o in find_optima(table.searched())}
    cells = table.cells.assign(loss=table.cells["best_loss"])
    noise = cell_noise_scale(cells, table.trials)
    for ratio in compare_kinds(cells, optima, noise).values():
        assert not ratio.ok
        assert np.isnan(ratio.ratio)
        assert "0 MoE" in ratio.message
