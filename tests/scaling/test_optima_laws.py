"""Power laws of optima: planted ones come back, intervals cover, and refusals say why."""

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.results.importers import read_steplaw
from raysweep.scaling.cells import cell_table
from raysweep.scaling.optima_laws import (
    KNOWN_AHEAD,
    best_law,
    compare_counts,
    fit_law,
    fit_laws,
    held_out_gap,
    loss_gap,
)
from raysweep.scaling.optimum import find_optima
from raysweep.scaling.power_law import fit_power_law

PARAMS = np.repeat([1e8, 2e8, 4e8, 8e8], 3)
TOKENS = np.tile([2e9, 1e10, 5e10], 4)


def planted(noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    rate = 1.79 * PARAMS**-0.713 * TOKENS**0.307
    return rate * np.exp(noise * rng.standard_normal(len(rate)))


def fit(values, sd=0.05, **inputs):
    inputs = inputs or {"params": PARAMS, "tokens": TOKENS}
    return fit_power_law("learning_rate", inputs, values, np.full(len(values), sd), n_boot=100)


def table_of(frame):
    table = cell_table(frame)
    trials = table.searched()
    optima = {o.cell: o for o in find_optima(trials)}
    cells = table.cells.assign(loss=[optima[n].loss for n in table.cells.index])
    return cells, trials, optima


def test_planted_coefficients_come_back_without_noise():
    law = fit(planted())
    assert law.status == "converged"
    assert law.coefficient.value == pytest.approx(1.79, rel=1e-6)
    assert law.exponents["params"].value == pytest.approx(-0.713, rel=1e-6)
    assert law.exponents["tokens"].value == pytest.approx(0.307, rel=1e-6)
    assert law.formula == "learning_rate = 1.79 N^-0.713 D^0.307"
    assert law.held_out < 1e-9
    point = {"params": 7e9, "tokens": 1.4e12}
    assert float(law.predict(point)) == pytest.approx(1.79 * 7e9**-0.713 * 1.4e12**0.307)


@pytest.mark.parametrize(("scatter", "trial_sd"), [(0.0, 0.1), (0.08, 0.05)])
def test_intervals_cover_the_planted_exponents(scatter, trial_sd):
    noise = float(np.hypot(scatter, trial_sd))
    hits = []
    for seed in range(200):
        law = fit(planted(noise, seed), trial_sd)
        for name, truth in (("params", -0.713), ("tokens", 0.307)):
            hits.append(law.exponents[name].low <= truth <= law.exponents[name].high)
    assert 0.92 <= np.mean(hits) <= 0.985


def test_an_interval_of_a_new_cell_covers_it():
    point = {"params": 3e9, "tokens": 2e11}
    truth = 1.79 * 3e9**-0.713 * 2e11**0.307
    rng, inside = np.random.default_rng(0), []
    for seed in range(150):
        law = fit(planted(0.15, seed), 0.02)
        low, high = law.interval(point)
        narrow = law.interval(point, new_cell=False)
        assert low < narrow[0] < narrow[1] < high
        inside.append(low <= truth * np.exp(0.15 * rng.standard_normal()) <= high)
    assert 0.9 <= np.mean(inside) <= 1.0


def test_cells_that_know_less_count_less():
    values, sd = planted(), np.full(12, 0.02)
    values[[0, 11]] *= 2
    sd[[0, 11]] = 1.0
    law = fit_power_law("learning_rate", {"params": PARAMS, "tokens": TOKENS}, values, sd)
    assert law.exponents["tokens"].value == pytest.approx(0.307, abs=0.02)


def test_one_stray_cell_does_not_move_the_law():
    values = planted(0.02)
    values[5] *= 3
    assert fit(values, 0.02).exponents["params"].value == pytest.approx(-0.713, abs=0.08)


@pytest.mark.parametrize(
    ("inputs", "status", "message"),
    [
        ({"params": PARAMS[:3], "tokens": TOKENS[:3]}, "too few cells", "3 cells with a known"),
        ({"params": np.full(12, 1e8), "tokens": TOKENS}, "one value", "one value of params"),
        ({"params": PARAMS, "tokens": 20 * PARAMS}, "collinear", "move together"),
    ],
)
def test_what_cannot_be_told_is_a_status(inputs, status, message):
    n = len(inputs["params"])
    law = fit_power_law("learning_rate", inputs, planted()[:n], np.full(n, 0.05))
    assert law.status == status
    assert message in law.message
    assert np.isnan(law.exponents["params"].value)
    assert "?" in law.formula
    assert np.isnan(law.predict({"params": 1e9, "tokens": 1e10}))


def test_unknown_values_are_left_out_by_name():
    values, sd = planted(), np.full(12, 0.05)
    values[3], sd[7] = np.nan, np.nan
    law = fit_power_law(
        "learning_rate",
        {"params": PARAMS, "tokens": TOKENS},
        values,
        sd,
        cells=[f"c{i}" for i in range(12)],
    )
    assert law.n_cells == 10
    assert set(law.left_out) == {"c3", "c7"}
    assert law.exponents["params"].value == pytest.approx(-0.713, rel=1e-6)


def test_predicting_without_an_input_names_it():
    with pytest.raises(UserError, match="needs 'tokens'"):
        fit(planted()).predict({"params": 1e9})
    with pytest.raises(UserError, match="above zero"):
        fit(planted()).predict({"params": 1e9, "tokens": 0})


def test_laws_from_trials_recover_the_planted_ones(planted_study):
    cells, _, optima = table_of(planted_study(per_cell=20, noise=0.0005))
    laws = fit_laws(cells, optima)
    rate = laws["learning_rate(params, tokens)"]
    assert rate.exponents["params"].value == pytest.approx(-0.6, abs=0.03)
    assert rate.exponents["tokens"].value == pytest.approx(0.25, abs=0.03)
    assert laws["batch_tokens(tokens)"].exponents["tokens"].value == pytest.approx(0.5, abs=0.03)
    best = best_law(laws, "learning_rate", KNOWN_AHEAD)
    assert best is rate  # compute alone cannot tell N from D here
    assert best_law(laws, "learning_rate", ("flops",)) is laws["learning_rate(flops)"]
    assert best_law({}, "learning_rate", KNOWN_AHEAD) is None


def test_intervals_from_trials_cover(planted_study):
    hits = []
    for seed in range(25):
        cells, _, optima = table_of(planted_study(noise=0.002, scatter=0.05, seed=seed))
        rate = fit_law("learning_rate", ("params", "tokens"), cells, optima)
        batch = fit_law("batch_tokens", ("tokens",), cells, optima)
        for law, name, truth in (
            (rate, "params", -0.6),
            (rate, "tokens", 0.25),
            (batch, "tokens", 0.5),
        ):
            hits.append(law.exponents[name].low <= truth <= law.exponents[name].high)
    assert np.mean(hits) >= 0.9


def test_the_count_that_makes_one_family_is_chosen(planted_study):
    # Learning rates follow total parameters: MoE has 3x them, and 3^-0.6 of the dense rate.
    frame = planted_study(kinds=("dense", "moe"), moe_rate=3**-0.6, per_cell=16)
    cells, _, optima = table_of(frame)
    counts = compare_counts(cells, optima)
    errors = counts.errors["learning_rate"]
    assert counts.chosen in ("params_total_non_embedding", "params_total")
    assert errors["params_total_non_embedding"] < 0.3 * errors["params_active_non_embedding"]
    assert counts.chosen in counts.message
    laws = fit_laws(cells, optima, count=counts.chosen)
    assert laws["learning_rate(params, tokens, active_ratio)"].exponents[
        "active_ratio"
    ].value == pytest.approx(0, abs=0.05)


def test_a_count_that_is_not_known_is_not_chosen(planted_study):
    frame = planted_study().drop(columns=["params_total", "params_dense"])
    cells, _, optima = table_of(frame)
    counts = compare_counts(cells, optima)
    assert np.isnan(counts.errors["learning_rate"]["params_total"])
    assert counts.chosen not in ("params_total", "params_dense")


def test_a_loss_gap_reads_the_nearest_recorded_trial(planted_study):
    cells, trials, optima = table_of(planted_study(per_cell=40))
    laws = fit_laws(cells, optima)
    rate, batch = laws["learning_rate(params, tokens)"], laws["batch_tokens(tokens)"]
    gap = loss_gap(rate, batch, cells, trials, optima, "params_active_non_embedding")
    assert set(gap.gaps) == set(cells.index)
    first = trials[0]
    point = {"params": first.features.params, "tokens": first.features.tokens}
    distance = np.hypot(
        np.log(first.learning_rate / rate.predict(point)),
        np.log(first.batch_tokens / batch.predict(point)),
    )
    expected = first.loss[distance.argmin()] / first.loss.min() - 1
    assert gap.gaps[first.name] == pytest.approx(expected)
    assert gap.max < 0.02


def test_a_held_out_check_never_sees_the_large_cells(planted_study):
    frame = planted_study(per_cell=20)
    cells, trials, optima = table_of(frame)
    before = held_out_gap(
        cells, trials, optima, count="params_active_non_embedding", method="quadratic", n_train=5
    )
    assert before is not None
    assert before.n_train == 5
    assert len(before.gaps) + len(before.unmeasured) == 3
    # Spoil the large cells' rates: the laws stay, so every prediction misses by the same factor.
    large = frame["cell"].isin(cells.index[5:])
    spoiled = frame.assign(
        learning_rate=frame["learning_rate"].where(~large, frame["learning_rate"] * 3)
    )
    cells, trials, optima = table_of(spoiled)
    after = held_out_gap(
        cells, trials, optima, count="params_active_non_embedding", method="quadratic", n_train=5
    )
    assert after is not None
    assert after.log_error_learning_rate == pytest.approx(np.log(3), abs=0.3)


def test_step_law_grids_held_out_and_in_sample(shared_data):
    table = cell_table(read_steplaw(shared_data / "steplaw_dense.csv"))
    trials = table.searched()
    optima = {o.cell: o for o in find_optima(trials)}
    assert all(o.interior for o in optima.values())
    count = "params_active_non_embedding"
    laws = fit_laws(table.cells, optima, count=count)
    rate = best_law(laws, "learning_rate", KNOWN_AHEAD)
    batch = best_law(laws, "batch_tokens", KNOWN_AHEAD)
    assert rate is not None
    assert batch is not None
    inside = loss_gap(rate, batch, table.cells, trials, optima, count)
    assert len(inside.gaps) == 15
    assert inside.mean <= 0.0009
    held_out = held_out_gap(table.cells, trials, optima, count=count, method="surface", n_train=9)
    assert held_out is not None
    assert len(held_out.gaps) == 6
    assert held_out.mean <= 0.0010
    assert held_out.max <= 0.0025
