"""Where trials do not enclose the optimum, and where nothing repeats, intervals hold the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from raysweep.scaling.compare import compare_arms, needed
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits

Make = Callable[..., pd.DataFrame]
N, D = "params_active_non_embedding", "tokens"


def truth(params: float, tokens: float) -> tuple[float, float, float]:
    """Learning rate, batch and loss of the planted laws of conftest."""
    rate = 3e-3 * (params / 1e8) ** -0.6 * (tokens / 2e9) ** 0.25
    loss = 1.7 + 480 / params**0.35 + 2000 / tokens**0.37
    return rate, 2e5 * (tokens / 2e9) ** 0.5, loss


def moved(frame: pd.DataFrame, rate: Callable[[np.ndarray], np.ndarray]) -> pd.DataFrame:
    """The runs of a study at other learning rates, given how far (ln) they lie from the optimum."""
    best, batch, loss = truth(frame[N].to_numpy(float), frame[D].to_numpy(float))  # type: ignore[arg-type]
    old = np.log(frame["learning_rate"].to_numpy(float) / best)
    v = np.log(frame["batch_tokens"].to_numpy(float) / batch)
    u = rate(old)

    def valley(u: np.ndarray) -> np.ndarray:
        steep = 0.02 * (np.expm1(u) - u) + 0.01 * (np.expm1(-u) + u)
        return steep + 0.015 * v**2 - 0.006 * u * v

    noise = np.log(frame["loss"].to_numpy(float) / loss) - valley(old)
    return frame.assign(learning_rate=best * np.exp(u), loss=loss * np.exp(valley(u) + noise))


def low(u: np.ndarray) -> np.ndarray:
    """Rates 1/12 to .6 of the best in place of .22 to 4.5."""
    return 0.65 * u - 1.5


def inside(fits: Fits, params: float, tokens: float) -> bool:
    answer = fits.recommend("dense", params, tokens)
    return answer.loss_interval[0] < truth(params, tokens)[2] < answer.loss_interval[1]


@pytest.mark.slow
def test_where_trials_stop_short_the_interval_reaches_the_optimum(planted_study: Make) -> None:
    cells, covered, off, widths = [], [], [], []
    for seed in range(4):
        rows = moved(planted_study(per_cell=10, scales=(1e7, 3e7, 9e7), seed=seed), low)
        held = rows.index % 3 == 0
        fits = fit(rows[~held])
        assert set(fits.cells["loss_from"]) == {"edge"}
        score = fits.score(rows[held])
        covered.append(score.overall.coverage)
        off.append(score.overall.bias)
        sizes = fits.cells[[N, D]].to_numpy(float)
        cells += [inside(fits, *size) for size in sizes]
        assert inside(fits, 1e9, 2e10)
        answer = fits.recommend("dense", *sizes[-1])
        widths.append(math.log(answer.loss_interval[1] / answer.loss_interval[0]))
        assert any("the trials do not reach the optimum" in w for w in answer.warnings)
        assert "beyond the trials of this cell" in str(answer)
        # One answer: a run at the recommended settings has the recommended loss.
        at = answer.learning_rate, answer.batch_tokens_exact
        found = fits.predict(*at, *sizes[-1]).iloc[0]
        assert found["cost"] == pytest.approx(0, abs=1e-4)
        assert found["loss"] == pytest.approx(answer.loss, rel=1e-4)
        assert found["high"] == pytest.approx(answer.loss_interval[1], rel=1e-3)
    assert np.mean(covered) > 0.9
    assert np.abs(off).max() < 0.02
    assert np.mean(cells) > 0.9
    assert np.mean(widths) < 0.25


def test_a_cell_that_is_enclosed_answers_by_its_surface(planted_study: Make) -> None:
    fits = fit(planted_study(per_cell=12))
    evidence = fits.evidence[""]
    assert evidence.surface is not None
    assert set(fits.cells["loss_from"]) == {"optimum"}
    assert not fits.cells["loss_unseen"].any()
    assert fits.loss_model("dense").unseen == 0
    for name, row in fits.cells.iterrows():
        posterior = evidence.surface.optimum(str(name))
        assert row["loss"] == posterior.loss
        assert row["loss_se"] == posterior.loss * posterior.log_loss_sd


@pytest.mark.slow
def test_runs_of_ragged_tokens_enclose_the_optimum_together(planted_study: Make) -> None:
    cells, covered = [], []
    for seed in range(2):
        ratios = np.geomspace(10, 60, 16)
        rows = planted_study(scales=(1e7, 3e7, 9e7), tokens_per_param=ratios, per_cell=1, seed=seed)
        fits = fit(rows)
        assert set(fits.cells["loss_from"]) <= {"optimum", "surface"}
        cells += [inside(fits, *size) for size in fits.cells[[N, D]].to_numpy(float)]
        score = fits.score(rows)
        covered.append(score.overall.coverage)
        assert score.overall.mae < 0.02
    assert np.mean(covered) > 0.9
    assert np.mean(cells) > 0.85


def test_a_rate_that_was_never_varied_is_said_to_be_published(planted_study: Make) -> None:
    rows = moved(planted_study(per_cell=8), lambda u: u).drop(columns="cell")
    best = truth(rows[N].to_numpy(float), rows[D].to_numpy(float))[0]  # type: ignore[arg-type]
    fits = fit(moved(rows, lambda u: np.log(1e-3 / best)))
    assert set(fits.cells["status"]) <= {"one learning rate", "flat"} | {
        s for s in fits.cells["status"] if s.startswith("edge")
    }
    for size in fits.cells[[N, D]].to_numpy(float):
        answer = fits.recommend("dense", *size)
        assert any("no cell varied its learning rate" in w for w in answer.warnings)
        assert inside(fits, *size)
    assert "no cell varied its learning rate" in fits.summary()
    varied = fit(planted_study(per_cell=4, scales=(1e7, 3e7)))
    assert "no cell varied its learning rate" not in varied.summary()


@pytest.mark.slow
def test_an_arm_whose_rates_are_too_low_is_not_called_worse(planted_study: Make) -> None:
    one = moved(planted_study(per_cell=8, seed=1), low).assign(optimizer="adamw")
    two = planted_study(per_cell=8, seed=2).assign(optimizer="lion")
    fits = fit(pd.concat([one, two], ignore_index=True).drop(columns="cell"), group="optimizer")
    ratios = compare_arms(fits.arm("dense", "adamw"), fits.arm("dense", "lion"))
    assert needed(ratios, "loss", "N and D").covers(1)
    assert needed(ratios, "tokens", "loss").covers(1)


@pytest.mark.slow
def test_runs_that_nothing_repeats_have_an_interval(planted_study: Make) -> None:
    covered = []
    for seed in range(3):
        frame = planted_study(
            tokens_per_param=(5, 10, 20, 40, 80), per_cell=1, noise=0.0, seed=seed
        )
        rng = np.random.default_rng(seed)
        least = truth(frame[N].to_numpy(float), frame[D].to_numpy(float))[2]  # type: ignore[arg-type]
        one, again = least * np.exp(0.01 * rng.standard_normal((2, len(frame))))
        fits = fit(frame.assign(learning_rate=np.nan, batch_tokens=np.nan, loss=one))
        for size, new in zip(frame[[N, D]].to_numpy(float), again, strict=True):
            answer = fits.recommend("dense", *size)
            assert answer.told_by == "cell"
            low, high = answer.loss_interval
            covered.append(low < new < high)
            assert high / low < 1.15
    assert np.mean(covered) > 0.8
    two = planted_study(per_cell=1)[:2].assign(learning_rate=np.nan, batch_tokens=np.nan)
    answer = fit(two).recommend("dense", *two[[N, D]].iloc[0])
    assert math.isnan(answer.loss_interval[0]) or answer.loss_interval[0] < answer.loss


def test_another_batch_is_not_told_where_none_was_varied(planted_study: Make) -> None:
    rows = planted_study(per_cell=8).drop(columns="cell").assign(batch_tokens=2e5)
    fits = fit(rows)
    asked = rows[:3].assign(batch_tokens=[1e4, 2.2e5, 4e6])
    found = fits.predict_runs(asked.assign(trial_key=["a", "b", "c"]))
    said = "no cell varied its batch: only runs at about 200k tokens can be predicted"
    assert list(found["why"]) == [said, "", said]
    assert list(found["loss"].isna()) == [True, False, True]
    table = fits.predict(1e-3, [1e4, 2e5], 3e7, 6e8)
    assert list(table["loss"].isna()) == [True, False]
