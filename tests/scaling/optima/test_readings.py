"""Optima as read off planted cells: where, how sure, and what is said when they cannot be told."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from raysweep.scaling.evidence import surface_of
from raysweep.scaling.optima.literature import literature_prior
from raysweep.scaling.optima.readings import (
    READINGS,
    Optimum,
    all_readings,
    by_model,
    readings_table,
)

WAYS = ("model", *READINGS)


def read(trials, way) -> Optimum:
    if way == "model":
        return by_model(surface_of([trials], literature_prior()), trials)
    return READINGS[way].find(trials)


def miss(optimum, truth=(3e-3, 2e5)):
    return np.log([optimum.learning_rate, optimum.batch_tokens]) - np.log(truth)


@pytest.mark.parametrize(
    ("way", "within"),
    [("model", 0.08), ("quadratic", 0.08), ("mean_within", 0.26), ("argmin", 0.26)],
)
def test_a_noiseless_grid_gives_the_planted_optimum(cell_trials, way, within):
    # The grid's step is 0.5; its points lie 0.1 and -0.15 off the optimum.
    optimum = read(cell_trials(grid=True, off=(0.1, -0.15)), way)
    assert optimum.status == "interior"
    assert np.abs(miss(optimum)).max() < within
    assert optimum.loss == pytest.approx(2.5, rel=2e-3)
    assert optimum.n_trials == 49


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("off", "status"),
    [
        ((2.2, 0.0), "learning_rate low"),
        ((-2.2, 0.0), "learning_rate high"),
        ((0.0, 2.5), "batch low"),
        ((0.0, -2.5), "batch high"),
    ],
)
def test_an_optimum_outside_the_searched_range_is_an_edge(cell_trials, way, off, status):
    optimum = read(cell_trials(grid=True, off=off), way)
    assert optimum.status.startswith("edge: ")
    assert status in optimum.status
    axis = 0 if "learning_rate" in status else 1
    assert np.isnan(optimum.covariance[axis, axis])
    assert not optimum.interior


@pytest.mark.parametrize("way", WAYS)
def test_equal_losses_are_flat(cell_trials, way):
    optimum = read(replace(cell_trials(grid=True), loss=np.full(49, 2.0)), way)
    assert optimum.status == "flat"
    assert np.isnan(optimum.covariance).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 2])
def test_a_trial_or_two_are_too_few(cell_trials, way, n):
    optimum = read(cell_trials(n=n), way)
    assert optimum.status == "too few trials"
    assert optimum.n_trials == n
    assert optimum.learning_rate > 0


def test_one_batch_leaves_the_batch_unidentified(cell_trials):
    trials = replace(cell_trials(grid=True), batch_tokens=np.full(49, 2e5))
    trials = replace(trials, loss=2.5 * np.exp(0.02 * np.log(trials.learning_rate / 3e-3) ** 2))
    for way in WAYS:
        optimum = read(trials, way)
        assert optimum.status == "interior", way
        assert np.isfinite(optimum.covariance[0, 0])
        assert np.isnan(optimum.covariance[1]).all()


def test_a_diverged_trial_bounds_the_searched_range(cell_trials):
    trials = cell_trials(grid=True, off=(-1.5, 0.0))  # the highest rate is the best
    assert read(trials, "argmin").status == "edge: learning_rate high"
    trials = replace(
        trials, failed_learning_rate=np.array([3e-2]), failed_batch_tokens=np.array([2e5])
    )
    assert read(trials, "argmin").status == "interior"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["quadratic", "model"])
def test_the_covariance_matches_the_scatter_of_repeated_studies(cell_trials, way):
    optima = [read(cell_trials(n=30, noise=0.002, seed=s, reach=1.0), way) for s in range(30)]
    inside = [o for o in optima if o.interior]
    assert len(inside) > 25
    scatter = np.std([miss(o) for o in inside], axis=0)
    stated = np.sqrt(np.mean([np.diag(o.covariance) for o in inside], axis=0))
    assert (stated / scatter > 0.6).all()
    # The model's holds the fine grain of real grids besides the noise of a run.
    assert (stated / scatter < (5 if way == "model" else 3.5)).all()


def test_the_table_sets_every_reading_beside_the_model(cell_trials):
    """Cells of two sizes and two horizons, whose optima follow power laws."""
    cells, sizes = [], []
    for n in (1e8, 4e8):
        for d in (2e9, 2e10):
            size = replace(cell_trials().size, name=f"{n:g}-{d:g}")
            size = replace(size, params_active_non_embedding=n, tokens=d)
            rate, batch = 3e-3 * (n / 1e8) ** -0.5 * (d / 2e9) ** 0.2, 2e5 * (d / 2e9) ** 0.4
            level = 1.7 + 400 / n**0.34 + 1000 / d**0.36
            trials = cell_trials(grid=True, optimum=(rate, batch), least=level)
            cells.append(replace(trials, size=size))
            sizes.append((size.name, n, d))
    columns = ["cell", "params_active_non_embedding", "tokens"]
    frame = pd.DataFrame(sizes, columns=columns).set_index("cell")
    optima = all_readings(surface_of(cells, literature_prior()), cells)
    table = readings_table(optima, frame)
    assert list(table.index) == list(WAYS)
    assert (table["interior"] == 4).all()
    for way in ("model", "quadratic"):
        row = table.T.to_dict()[way]
        assert row["learning_rate_params"] == pytest.approx(-0.5, abs=0.08)
        assert row["learning_rate_tokens"] == pytest.approx(0.2, abs=0.06)
        assert row["batch_tokens_tokens"] == pytest.approx(0.4, abs=0.06)
    off = table["learning_rate"].to_dict()
    assert off["model"] == 0
    assert 0 < off["argmin"] < 0.5
