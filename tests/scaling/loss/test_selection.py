"""Hold-out: levels, honest folds, and the right law chosen."""

import numpy as np
import pandas as pd
import pytest
from raysweep.scaling.holdout import Candidate, aicc, held_out, levels, select

from raysweep.errors import UserError
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.fit import fit_law
from raysweep.scaling.loss.laws import LOSS_LAWS

WANG = {"A": 420.0, "B": 1700.0, "s": 1.8, "a": 0.34, "b": 0.35, "g": 0.3}


def sweep(noise: float = 0.001) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Dense and MoE cells on 6 sizes by 4 horizons; the truth is Wang's law."""
    rng = np.random.default_rng(0)
    n, ratio, e = np.meshgrid(np.geomspace(3e7, 3e9, 6), [5, 20, 80, 320], [1.0, 8.0])
    inputs = {"params": n.ravel(), "tokens": (n * ratio).ravel(), "experts": e.ravel()}
    loss = LOSS_LAWS["wang"].predict(WANG, inputs) * np.exp(rng.normal(0, noise, n.size))
    return inputs, loss


def test_levels_group_what_differs_by_little() -> None:
    scale = np.array([1.0e20, 1.01e20, 3e18, 2.9e18, 9e19, 3.1e18])
    np.testing.assert_array_equal(levels(scale), [1, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(levels(np.array([4.0, 1.0, 2.0])), [2, 0, 1])


def test_held_out_points_are_not_seen() -> None:
    inputs, loss = sweep()
    held = levels(inputs["params"]) == 5
    candidate = Candidate(LOSS_LAWS["wang"])
    one = held_out(candidate, inputs, loss, inputs["params"], held)
    spoiled = np.where(held, 10 * loss, loss)
    two = held_out(candidate, inputs, spoiled, inputs["params"], held)
    np.testing.assert_array_equal(one.predicted, two.predicted)
    assert one.fit.n_points == (~held).sum()
    assert one.extrapolation == pytest.approx(10 ** (2 / 5))
    assert one.mean_log_error < 0.003
    assert abs(one.bias) <= one.mean_absolute_error
    with pytest.raises(UserError, match="both sides"):
        held_out(candidate, inputs, loss, inputs["params"], np.ones(len(loss), dtype=bool))


def test_the_true_law_wins_and_one_blind_to_experts_loses() -> None:
    inputs, loss = sweep()
    inputs["flops"] = 6 * inputs["params"] * inputs["tokens"]
    names = ("kaplan", "chinchilla", "wang")
    found = select([Candidate(LOSS_LAWS[k]) for k in names], inputs, loss, inputs["params"])
    assert found.ranked_by == "held-out error"
    assert found.best.candidate.name == "wang"
    assert found.best.error < 0.003
    assert found.scores[1].error > 3 * found.best.error
    assert found.best.aicc < min(s.aicc for s in found.scores[1:])
    assert len(found.best.folds) == 2
    assert [h.fit.n_points for h in found.best.folds] == [40, 32]


def test_a_law_that_cannot_be_fitted_comes_last_and_says_why() -> None:
    inputs, loss = sweep()
    inputs["granularity"] = np.ones(len(loss))
    candidates = [Candidate(LOSS_LAWS[k]) for k in ("fine_grained", "wang")]
    found = select(candidates, inputs, loss, inputs["params"])
    assert found.best.candidate.name == "wang"
    assert found.scores[1].fit.status == "one value"
    assert np.isnan(found.scores[1].error)


def test_one_level_falls_back_on_aicc() -> None:
    inputs, loss = sweep()
    found = select(
        [Candidate(LOSS_LAWS[k]) for k in ("chinchilla", "wang")], inputs, loss, np.ones(len(loss))
    )
    assert found.ranked_by == "AICc"
    assert found.best.candidate.name == "wang"
    with pytest.raises(UserError, match="no law"):
        select([], inputs, loss, loss)


def test_emphasis_weighs_the_large_scales() -> None:
    """A wrong law fitted with emphasis is closer to the largest cells."""
    inputs, loss = sweep()
    law, scale = LOSS_LAWS["chinchilla"], inputs["params"]
    held = levels(scale) == 5
    assert Candidate(law, emphasis=1.0).name == "chinchilla (weights ~ scale^1)"
    fit = held_out(Candidate(law, emphasis=2.0), inputs, loss, scale, held).fit
    expected = (scale[~held] / scale[~held].max()) ** 2
    np.testing.assert_allclose(fit.weights, expected)


def test_aicc_pays_for_coefficients() -> None:
    inputs, loss = sweep()
    dense = inputs["experts"] == 1
    inputs = {k: v[dense] for k, v in inputs.items()}
    free = fit_law(LOSS_LAWS["chinchilla"], LossData.of(inputs, loss[dense]))
    held = fit_law(
        LOSS_LAWS["chinchilla"], LossData.of(inputs, loss[dense]), fixed={"a": 0.34, "b": 0.35}
    )
    assert free.objective <= held.objective
    assert aicc(held) < aicc(free)


def test_hold_out_beats_plain_chinchilla_on_isoflop_runs(shared_data) -> None:
    """The candidate is chosen on the smaller budgets alone; flagged outliers are left out."""
    table = pd.read_csv(shared_data / "isoflop_marin_comma.csv")
    runs = table[~table["outlier"]]
    inputs = {k: runs[k].to_numpy() for k in ("params", "tokens")}
    loss, budget = runs["loss"].to_numpy(), runs["budget"].to_numpy()
    held = budget == budget.max()
    law = LOSS_LAWS["chinchilla"]
    candidates = [Candidate(law, emphasis) for emphasis in (0.0, 1.0, 2.0)]
    seen = {k: v[~held] for k, v in inputs.items()}
    chosen = select(candidates, seen, loss[~held], budget[~held]).best.candidate
    ours = held_out(chosen, inputs, loss, budget, held)
    plain = held_out(Candidate(law), inputs, loss, budget, held)
    assert ours.mean_absolute_error < plain.mean_absolute_error
