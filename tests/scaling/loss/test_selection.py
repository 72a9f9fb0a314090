"""The answer about the loss: which law is chosen, and intervals that hold levels ahead."""

import json

import numpy as np
import pytest

from benchmarks.ahead import read_runs
from benchmarks.huber_fit import fit_law
from raysweep.errors import UserError
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.laws import LOSS_LAWS
from raysweep.scaling.loss.model import LossModel
from raysweep.scaling.loss.selection import choose_loss
from raysweep.scaling.plain import to_json
from raysweep.study.shape import RunSize

CHINCHILLA = LOSS_LAWS["chinchilla"]
WANG = {"A": 420.0, "B": 1700.0, "s": 1.8, "a": 0.34, "b": 0.35, "g": 0.3}


def misfit(params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """A smooth departure of ln loss that no law of the registry knows: exponents that drift."""
    n, d = np.log(params / 1e8), np.log(tokens / 1e10)
    return -0.0015 * n**2 - 0.001 * n * d + 0.0008 * d**2


def budgets(
    seed: int = 0, *, count: int = 7, noise: float = 0.003, departs: bool = True, scale: float = 1.0
) -> LossData:
    """IsoFLOP runs: `count` budgets from 1e18 FLOPs, each twice the last, of nine sizes."""
    rng = np.random.default_rng(seed)
    flops = 1e18 * 2.0 ** np.arange(count)
    best = 0.09 * np.sqrt(flops)
    params = (best[:, None] * np.geomspace(0.25, 4, 9)).ravel()
    every = np.repeat(flops, 9)
    tokens = every / (6 * params)
    log_loss = np.log(
        CHINCHILLA.predict(CHINCHILLA.published, {"params": params, "tokens": tokens})
    )
    log_loss += departs * misfit(params, tokens) + rng.normal(0, noise, len(params))
    return LossData.of(
        {"params": params, "tokens": tokens, "flops": every}, scale * np.exp(log_loss)
    )


def ladder(noise: float = 0.001, seed: int = 0) -> LossData:
    """Dense and MoE cells on 6 sizes by 4 horizons; the truth is Wang's law."""
    rng = np.random.default_rng(seed)
    n, ratio, e = np.meshgrid(np.geomspace(3e7, 3e9, 6), [5, 20, 80, 320], [1.0, 8.0])
    n, e = n.ravel(), e.ravel()
    tokens = n * ratio.ravel()
    inputs = {"params": n, "tokens": tokens, "experts": e}
    loss = LOSS_LAWS["wang"].predict(WANG, inputs) * np.exp(rng.normal(0, noise, n.size))
    columns = {**inputs, "top_k": np.minimum(e, 2), "flops": 6 * n * tokens}
    return LossData.of(columns, loss)


@pytest.mark.slow
def test_intervals_of_new_runs_cover_one_two_and_three_levels_ahead() -> None:
    """Twelve planted studies with a misfit, of which the top three budgets are held out."""
    inside = np.zeros(3)
    widths = np.zeros(3)
    for seed in range(12):
        data = budgets(seed)
        level = data.levels()
        assert level.max() == 6
        model = choose_loss(data.select(level < 4))
        for k in range(3):
            held = data.select(level == 4 + k)
            value, low, high = model.predict(held.columns)
            inside[k] += ((low <= held.loss) & (held.loss <= high)).mean() / 12
            widths[k] += np.mean((high - low) / value) / 12
    assert (inside >= 0.9).all(), inside
    assert widths[0] < widths[1] < widths[2]
    assert widths[0] < 0.05


def test_budgets_ahead_are_predicted_better_than_by_the_law_alone(shared_data) -> None:
    (data,) = read_runs(shared_data / "isoflop_marin_comma.csv").values()
    level = data.levels()
    for split in (level.max(), level.max() - 2):
        seen, held = data.select(level < split), data.select(level >= split)
        model = choose_loss(seen)
        value, low, high = model.predict(held.columns)
        alone = fit_law(CHINCHILLA, seen).predict(held.inputs(CHINCHILLA)[0])
        assert np.abs(value - held.loss).mean() < 0.8 * np.abs(alone - held.loss).mean()
        assert ((low <= held.loss) & (held.loss <= high)).mean() > 0.9


@pytest.mark.slow
def test_expected_losses_cover_the_truth_where_the_law_is_true() -> None:
    inside = []
    for seed in range(6):
        model = choose_loss(budgets(seed, departs=False))
        run = {"params": np.array([3e8, 3e9]), "tokens": np.array([2e10, 6e10])}
        value, low, high = model.predict_mean(run)
        truth = CHINCHILLA.predict(CHINCHILLA.published, run)
        inside += list((low <= truth) & (truth <= high))
        assert (model.predict(run)[1] < low).all()
        assert value == pytest.approx(truth, rel=0.02)
    assert np.mean(inside) >= 0.9


def test_the_answer_does_not_depend_on_the_unit_of_the_loss() -> None:
    """Losses of bytes are a quarter of those of tokens: the prior follows."""
    one, four = (choose_loss(budgets(0, scale=s)) for s in (1.0, 0.25))
    run = {"params": np.array([1e9]), "tokens": np.array([5e10])}
    np.testing.assert_allclose(np.array(one.predict(run)) * 0.25, four.predict(run), rtol=1e-4)


@pytest.fixture(scope="module")
def model() -> LossModel:
    """Of dense and MoE cells."""
    return choose_loss(ladder())


def test_the_true_law_of_several_routings_is_chosen_and_experts_told_apart(
    model: LossModel,
) -> None:
    assert model.ok
    assert model.law is LOSS_LAWS["wang"]
    errors = {s.law: s.error for s in model.scores}
    assert errors["wang"] < 0.003
    assert errors["clark"] > 3 * errors["wang"]
    fine = next(s for s in model.scores if s.law == "fine_grained")
    assert not fine.ok
    assert "granularity" in fine.why
    runs = [RunSize(1e9, 2e10), RunSize(1e9, 2e10, experts=8, top_k=2)]
    value, low, high = model.predict(runs)
    truth = LOSS_LAWS["wang"].predict(
        WANG, {"params": 1e9, "tokens": 2e10, "experts": np.array([1.0, 8.0])}
    )
    assert value == pytest.approx(truth, rel=0.003)
    assert ((low < truth) & (truth < high)).all()
    assert model.coefficients["g"].covers(0.3)
    assert json.dumps(to_json(model.to_dict()), allow_nan=False)


def test_draws_are_those_of_the_interval_and_move_together(model: LossModel) -> None:
    runs = [RunSize(1e10, 1e12), RunSize(1e10, 1e12, experts=8, top_k=2)]
    draws = model.sample(runs, 4000)
    _, low, high = model.predict_mean(runs)
    np.testing.assert_allclose(
        np.quantile(np.exp(draws), [0.025, 0.975], axis=0), [low, high], rtol=0.01
    )
    assert np.corrcoef(draws.T)[0, 1] > 0.5
    np.testing.assert_array_equal(draws, model.sample(runs, 4000))


def test_few_cells_still_answer_with_wide_intervals() -> None:
    """Two sizes by two horizons: Chinchilla's law alone has no fit, with its prior it has."""
    n, d = np.array([1e8, 1e8, 3e8, 3e8]), np.array([2e9, 8e9, 6e9, 2.4e10])
    truth = CHINCHILLA.predict(CHINCHILLA.published, {"params": n, "tokens": d})
    data = LossData.of({"params": n, "tokens": d}, truth)
    assert not fit_law(CHINCHILLA, data).ok
    model = choose_loss(data)
    assert model.ok, model.why
    assert model.law is CHINCHILLA
    far = {"params": np.array([3e9]), "tokens": np.array([6e10])}
    value, low, high = model.predict(far)
    assert low < CHINCHILLA.predict(CHINCHILLA.published, far) < high
    assert 0.05 < (high - low) / value < 1.0


@pytest.mark.parametrize("same", ["params", "tokens"])
def test_one_size_or_one_horizon_follows_the_prior_along_the_other(same: str) -> None:
    """A law of FLOPs alone would take the effect of N for that of D."""
    spread = np.geomspace(1, 30, 6)
    runs = {"params": np.full(6, 1e8), "tokens": np.full(6, 4e9)}
    other = "tokens" if same == "params" else "params"
    runs[other] = runs[other] * spread
    data = LossData.of(runs, CHINCHILLA.predict(CHINCHILLA.published, runs))
    model = choose_loss(data)
    assert model.law is CHINCHILLA
    assert data.unspanned == [same]
    near, far = ({**{k: v[-1:] for k, v in runs.items()}, same: runs[same][:1] * f} for f in (2, 8))
    (a, low, high), (b, lower, higher) = model.predict(near), model.predict(far)
    assert low < CHINCHILLA.predict(CHINCHILLA.published, near) < high
    assert lower < CHINCHILLA.predict(CHINCHILLA.published, far) < higher
    assert 0.02 < (high - low) / a < (higher - lower) / b


def test_levels_above_one_size_alone_do_not_count_against_a_law_that_tells_sizes_apart() -> None:
    """Three horizons of the smallest size come first."""
    n = np.array([3e7, 3e7, 3e7, 3e8, 3e8, 1e9, 1e9])
    d = np.array([5e8, 2e9, 8e9, 6e9, 2.4e10, 2e10, 8e10])
    loss = CHINCHILLA.predict(CHINCHILLA.published, {"params": n, "tokens": d})
    model = choose_loss(LossData.of({"params": n, "tokens": d, "flops": 6 * n * d}, loss))
    told = next(score for score in model.scores if score.law == "chinchilla")
    assert min(ahead.seen for ahead in told.ahead) > 3
    assert model.law is CHINCHILLA


@pytest.mark.parametrize("what", ["one budget", "two cells"])
def test_what_says_nothing_of_scale_is_not_determined(what: str) -> None:
    data = budgets()
    if what == "one budget":
        data = data.select(data.levels() == 3)
    else:
        data = data.select(np.array([0, 40]))
    model = choose_loss(data, ["chinchilla"])
    assert model.status == "not determined"
    assert {"one budget": "below it", "two cells": "at least 3"}[what] in model.why
    runs = [RunSize(1e9, 2e10)]
    assert np.isnan(model.predict(runs)).all()
    assert np.isnan(model.sample(runs, 5)).all()
    with pytest.raises(UserError, match="not determined"):
        model.require()


def test_unknown_laws_are_refused() -> None:
    with pytest.raises(UserError, match="unknown law"):
        choose_loss(budgets(), ["chinchila"])
