"""Resampling: whole cells, trial noise, and intervals that cover."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.huber_fit import cell_multiplicities, fit_law, resample
from raysweep.errors import UserError
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.laws import LOSS_LAWS

CHINCHILLA = LOSS_LAWS["chinchilla"]


def ladder(repeats: int = 1) -> dict[str, np.ndarray]:
    """A grid of 8 scales by 6 horizons, each cell `repeats` times."""
    params, tokens = np.meshgrid(np.geomspace(5e7, 5e9, 8), np.geomspace(1e9, 1e11, 6))
    return {
        "params": np.repeat(params.ravel(), repeats),
        "tokens": np.repeat(tokens.ravel(), repeats),
    }


def test_multiplicities_draw_whole_cells() -> None:
    cells = np.repeat(np.arange(10), 3)
    counts = cell_multiplicities(cells, 200, np.random.default_rng(0))
    assert counts.shape == (200, 30)
    by_cell = counts.reshape(200, 10, 3)
    assert (by_cell == by_cell[..., :1]).all()
    assert (by_cell[..., 0].sum(axis=1) == 10).all()
    assert counts.mean() == pytest.approx(1.0)


def test_rows_of_one_plateau_do_not_narrow_the_interval() -> None:
    """Five copies of every cell carry no more information than one."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.004, 48)
    once = ladder()
    fit = fit_law(
        CHINCHILLA,
        LossData.of(once, CHINCHILLA.predict(CHINCHILLA.published, once) * np.exp(noise)),
    )
    five = ladder(5)
    loss = CHINCHILLA.predict(CHINCHILLA.published, five) * np.exp(np.repeat(noise, 5))
    plateau = fit_law(CHINCHILLA, LossData.of(five, loss, cell=np.repeat(np.arange(48), 5)))
    assert plateau.n_cells == 48
    assert plateau.coefficients == pytest.approx(fit.coefficients, rel=1e-5)
    sd, sd_plateau = (resample(f, 400).draws("a").std() for f in (fit, plateau))
    assert sd_plateau == pytest.approx(sd, rel=1e-5)


def test_trial_noise_widens() -> None:
    rng = np.random.default_rng(0)
    inputs = ladder()
    loss = CHINCHILLA.predict(CHINCHILLA.published, inputs) * np.exp(rng.normal(0, 0.002, 48))
    fit = fit_law(CHINCHILLA, LossData.of(inputs, loss))
    quiet = resample(fit, 300).draws("a").std()
    noisy = resample(replace(fit, log_se=np.full(48, 0.004)), 300).draws("a").std()
    assert noisy > 1.5 * quiet


def test_seed_decides_the_resamples() -> None:
    inputs = ladder()
    rng = np.random.default_rng(0)
    loss = CHINCHILLA.predict(CHINCHILLA.published, inputs) * np.exp(rng.normal(0, 0.002, 48))
    one, two, other = (
        fit_law(CHINCHILLA, LossData.of(inputs, loss), bootstrap=20, seed=s) for s in (1, 1, 2)
    )
    assert one.samples is not None
    assert two.samples is not None
    assert other.samples is not None
    np.testing.assert_array_equal(one.samples, two.samples)
    assert not np.array_equal(one.samples, other.samples)
    with pytest.raises(UserError, match="at least 2"):
        resample(one, 1)
    with pytest.raises(UserError, match="no quantity 'zeta'"):
        one.coefficient_interval("zeta")


def test_prediction_interval_is_wider_for_a_new_observation_and_far_away() -> None:
    inputs = ladder()
    rng = np.random.default_rng(0)
    loss = CHINCHILLA.predict(CHINCHILLA.published, inputs) * np.exp(rng.normal(0, 0.004, 48))
    fit = fit_law(CHINCHILLA, LossData.of(inputs, loss), bootstrap=500)
    places = {"params": np.array([5e8, 5e11]), "tokens": np.array([1e10, 1e13])}
    low, high = fit.interval(places)
    new_low, new_high = fit.interval(places, new_observation=True)
    centre = fit.predict(places)
    assert (low < centre).all()
    assert (centre < high).all()
    width = np.log(high / low)
    assert width[1] > 2 * width[0]
    assert (new_low < low).all()
    assert (new_high > high).all()


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    """Thirty simulated studies; `benchmarks.fits` does the same with hundreds, for more laws."""
    inputs, place = ladder(), {"params": 5e10, "tokens": 1e12}
    truth = {**CHINCHILLA.published, "loss": CHINCHILLA.predict(CHINCHILLA.published, place)[0]}
    clean = CHINCHILLA.predict(CHINCHILLA.published, inputs)
    inside = dict.fromkeys(("a", "b", "loss"), 0)
    for study in range(30):
        rng = np.random.default_rng(study)
        fit = fit_law(
            CHINCHILLA, LossData.of(inputs, clean * np.exp(rng.normal(0, 0.004, 48))), bootstrap=150
        )
        for name in inside:
            ends = fit.interval(place) if name == "loss" else fit.coefficient_interval(name)
            inside[name] += bool(ends[0] <= truth[name] <= ends[1])
    assert all(hits >= 25 for hits in inside.values()), inside
    assert sum(inside.values()) < 90  # intervals that never miss say nothing


def test_resamples_of_too_few_cells_are_counted_not_used() -> None:
    """Of seven cells a draw often holds fewer than the five that five coefficients need."""
    inputs = {k: v[[0, 3, 7, 20, 24, 40, 47]] for k, v in ladder().items()}
    noise = np.exp(np.random.default_rng(0).normal(0, 0.001, 7))
    loss = CHINCHILLA.predict(CHINCHILLA.published, inputs) * noise
    fit = fit_law(CHINCHILLA, LossData.of(inputs, loss), bootstrap=200)
    assert fit.ok, fit.message
    counts = cell_multiplicities(fit.cells, 200, np.random.default_rng(0))
    too_few = int(((counts > 0).sum(axis=1) < 5).sum())
    assert too_few > 20
    assert fit.samples is not None
    assert len(fit.samples) + fit.n_failed == 200
    assert fit.n_failed >= too_few
