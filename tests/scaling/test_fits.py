"""Fits on planted and public tables: one object answers everything, or says that it cannot."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.results.published import read_chinchilla, read_isoflop, read_steplaw
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits
from raysweep.scaling.recommend import EXTRAPOLATED, INSIDE, NOT_DETERMINED, usable_batch
from raysweep.scaling.runs import describe_run


@pytest.fixture(scope="module")
def dense(planted_study) -> Fits:
    return fit(planted_study(per_cell=14))


@pytest.fixture(scope="module")
def both(planted_study) -> Fits:
    return fit(planted_study(kinds=("dense", "moe"), per_cell=14, moe_rate=1.5, moe_batch=0.6))


def planted(params: float, tokens: float, experts: int = 1) -> tuple[float, float, float]:
    """Learning rate, batch and loss of the planted laws of conftest, of a dense shape."""
    rate = 3e-3 * (params / 1e8) ** -0.6 * (tokens / 2e9) ** 0.25
    batch = 2e5 * (tokens / 2e9) ** 0.5
    loss = 1.7 + 480 / (params * experts**0.5) ** 0.35 + 2000 / tokens**0.37
    return rate, batch, loss


def inside(interval: tuple[float, float], value: float) -> bool:
    return interval[0] < value < interval[1]


def test_planted_laws_answer_for_a_larger_run(dense):
    answer = dense.recommend("dense", 1e9, 2e10)
    rate, batch, loss = planted(1e9, 2e10)
    assert answer.learning_rate == pytest.approx(rate, rel=0.3)
    assert answer.batch_tokens_exact == pytest.approx(batch, rel=0.35)
    assert answer.loss == pytest.approx(loss, rel=0.01)
    assert inside(answer.learning_rate_interval, rate)
    assert inside(answer.batch_tokens_interval, batch)
    assert inside(answer.loss_interval, loss)
    assert answer.verdict == EXTRAPOLATED
    assert answer.status == "ok"
    assert answer.directions == ()
    assert answer.extrapolation["N"] == pytest.approx(1e9 / 2.7e8)


def test_a_measured_cell_answers_for_itself(dense):
    name = "dense-9e+07-40tpp"
    row = dense.cells.loc[name]
    answer = dense.recommend("dense", row["params_active_non_embedding"], row["tokens"])
    assert answer.run.name == name
    assert answer.verdict == INSIDE
    assert answer.told_by == "cell"
    assert answer.loss == pytest.approx(row["loss"])
    assert answer.learning_rate == pytest.approx(row["learning_rate"], rel=5e-3)
    assert answer.batch_tokens_exact == pytest.approx(row["batch_tokens"], rel=5e-3)
    rate, batch, loss = planted(9e7, 3.6e9)
    assert answer.learning_rate == pytest.approx(rate, rel=0.25)
    assert answer.batch_tokens_exact == pytest.approx(batch, rel=0.25)
    assert answer.loss == pytest.approx(loss, rel=3e-3)


def test_text_numbers_and_sequences_ask_the_same(dense):
    one = dense.recommend("dense", "1B", "20B")
    table = dense.recommend("dense", ["1B", 2e9], "20B")
    assert isinstance(table, pd.DataFrame)
    assert list(table["params"]) == [1e9, 2e9]
    assert table["learning_rate"][0] == one.learning_rate
    assert table["loss_low"][0] == one.loss_interval[0]
    with pytest.raises(UserError, match="did you mean 7B"):
        dense.recommend("dense", "7", "20B")
    with pytest.raises(UserError, match="needs params"):
        dense.recommend("dense", tokens="20B")


def test_the_loss_of_other_settings_costs_what_the_valley_says(dense):
    best = dense.recommend("dense", 9e7, 3.6e9)
    rates = best.learning_rate * np.array([0.4, 1.0, 2.5])
    table = dense.predict(rates, best.batch_tokens_exact, 9e7, 3.6e9, "dense")
    assert table["loss"].idxmin() == 1
    assert table["loss"][1] == pytest.approx(best.loss, rel=1e-3)
    assert (table["low"] < table["loss"]).all()
    assert (table["loss"] < table["high"]).all()
    u = np.log(rates / planted(9e7, 3.6e9)[0])
    steep = 0.02 * (np.expm1(u) - u) + 0.01 * (np.expm1(-u) + u)
    np.testing.assert_allclose(table["cost"], np.expm1(steep), atol=4e-3)


def test_the_largest_batch_grows_with_what_it_may_cost(dense):
    small, large = (dense.recommend("dense", 9e7, 3.6e9, within=share) for share in ("0.5%", 0.02))
    assert small.batch_tokens_exact < small.largest_batch < large.largest_batch
    cost = dense.predict(
        small.largest_batch_learning_rate, small.largest_batch, 9e7, 3.6e9, "dense"
    )["cost"][0]
    assert cost == pytest.approx(0.005, abs=2e-3)
    with pytest.raises(UserError, match="within must be a share"):
        dense.recommend("dense", 9e7, 3.6e9, within=5)


def test_moe_and_dense_share_one_law_of_the_loss(both):
    assert both.loss_model("dense") is both.loss_model("moe")
    model = both.loss_model("moe")
    assert model.ok
    assert model.law is not None
    assert {"experts", "sparsity"} & set(model.law.inputs)
    dense, moe = (both.recommend(name, 1e9, 2e10) for name in ("dense", "moe"))
    assert moe.loss < dense.loss
    assert inside(moe.loss_interval, planted(1e9, 2e10, 8)[2])
    assert inside(dense.loss_interval, planted(1e9, 2e10)[2])
    assert moe.learning_rate / dense.learning_rate == pytest.approx(1.5, rel=0.15)
    assert moe.batch_tokens_exact / dense.batch_tokens_exact == pytest.approx(0.6, rel=0.2)


def test_the_comparison_finds_the_planted_ratios(both):
    ratios = {(r.quantity, r.at_equal): r.ratio for r in both.comparison["moe"]}
    assert ratios["learning_rate", "N and D"].covers(1.5)
    assert ratios["batch_tokens", "N and D"].covers(0.6)
    assert ratios["learning_rate", "N and D"].high / ratios["learning_rate", "N and D"].low < 1.5
    assert ratios["loss", "N and D"].value < 1
    assert ratios["flops", "loss"].value < 0.9
    # Tokens that MoE needs for the dense loss at equal N, by the planted law.
    cells = both.cells_of("dense")[["params_active_non_embedding", "tokens"]].to_numpy(float)
    saved = [480 / n**0.35 * (1 - 8**-0.175) for n, _ in cells]
    needed = [
        (d**-0.37 + gain / 2000) ** (-1 / 0.37) / d
        for (_, d), gain in zip(cells, saved, strict=True)
    ]
    planted_mean = float(np.exp(np.mean(np.log(needed))))
    assert ratios["tokens", "loss"].value == pytest.approx(planted_mean, rel=0.15)
    # In the cells themselves, exactly.
    pairs = both.evidence[""].pairs("dense", "moe")
    assert len(pairs) == 8
    loss = both.cells["loss"]
    mean = np.mean([math.log(loss[b] / loss[a]) for a, b in pairs])
    assert math.log(ratios["loss", "N and D"].value) == pytest.approx(mean, abs=3e-3)


def test_optima_against_the_loss_are_wangs_relations(both):
    """B = B0 / L^a, and lr alike, along the cells: as a plain regression on the planted optima."""
    cells = both.cells_of("dense")
    sizes = cells[["params_active_non_embedding", "tokens"]].to_numpy()
    for k, quantity in enumerate(("learning_rate", "batch_tokens")):
        relation = both.relations["dense"][quantity]
        optima = np.log([planted(n, d)[k] for n, d in sizes])
        slope = np.polyfit(np.log(cells["loss"]), optima, 1)[0]
        assert relation.exponent.covers(slope)
        assert relation.exponent.value == pytest.approx(slope, rel=0.15)
        level = optima.mean() - slope * np.mean(np.log(cells["loss"]))
        assert relation.coefficient.covers(float(np.exp(level)))
        assert relation.n_cells == 8


def test_held_out_cells_are_predicted_by_the_smaller_ones(both):
    held = both.held_out
    assert held is not None
    assert held.n_train == 10
    for quantity in ("learning_rate", "batch_tokens", "loss"):
        covered, n = held.covered(quantity)
        assert n == 6
        assert covered >= 5
    assert held.mean_regret < 0.02


def test_the_prior_stands_beside_what_the_data_made_of_it(dense):
    table = dense.prior_table.set_index(["target", "coefficient"])
    row = table.loc["learning_rate", "params"]
    assert row["low"] < -0.6 < row["high"]
    assert row["moved"] == pytest.approx((row["value"] - row["prior"]) / row["prior_sd"])
    without = fit(dense.table.trials, without=["step_law"])
    assert "step_law" not in without.prior.laws
    with pytest.raises(UserError, match="no published law 'chinchila'"):
        fit(dense.table.trials, without=["chinchila"])


def test_losses_of_a_named_validation_set_are_fitted(planted_study, dense):
    frame = planted_study(per_cell=14)
    fits = fit(
        frame.assign(**{"loss.code": 0.5 * frame["loss"], "loss_se.code": 1e-4}), loss="code"
    )
    np.testing.assert_allclose(fits.cells["loss"], 0.5 * dense.cells["loss"], rtol=2e-3)
    assert "losses are those of code" in fits.choices
    assert fits.options == ["--loss", "code"]
    with pytest.raises(UserError, match="--loss cod: no row has that loss; known: code"):
        fit(frame.assign(**{"loss.code": 1.0}), loss="cod")


def test_groups_share_the_valley_and_answer_apart(planted_study):
    one = planted_study(per_cell=6, seed=1).assign(optimizer="adamw")
    two = planted_study(per_cell=6, seed=2).assign(optimizer="muon")
    two["learning_rate"] *= 3.0
    two["loss"] *= 0.98
    fits = fit(pd.concat([one, two], ignore_index=True), group="optimizer")
    assert fits.groups("dense") == ["adamw", "muon"]
    a, b = (fits.recommend("dense", 1e9, 2e10, group=g) for g in ("adamw", "muon"))
    assert b.learning_rate / a.learning_rate == pytest.approx(3.0, rel=0.25)
    assert b.loss / a.loss == pytest.approx(0.98, abs=0.004)
    assert inside(b.learning_rate_interval, 3 * planted(1e9, 2e10)[0])
    # Without a word, that of the lowest loss.
    assert fits.recommend("dense", 1e9, 2e10).run.group == "muon"
    with pytest.raises(UserError, match="no group 'sgd' in the results; known: adamw, muon"):
        fits.recommend("dense", 1e9, 2e10, group="sgd")
    with pytest.raises(UserError, match="optimiser"):
        fit(one, group="optimiser")


def test_two_sets_of_data_are_fitted_apart(planted_study):
    one = planted_study(per_cell=8, seed=1).assign(study="one", data_hash="a")
    two = planted_study(per_cell=8, seed=2).assign(study="two", data_hash="b")
    two["loss"] *= 1.3
    fits = fit(pd.concat([one, two], ignore_index=True))
    assert len(fits.evidence) == 2
    assert fits.architectures == ["dense (a)", "dense (b)"]
    assert any("fitted apart" in m for m in fits.messages)
    losses = [fits.recommend(name, 1e9, 2e10).loss for name in fits.architectures]
    assert losses[1] / losses[0] == pytest.approx(1.3, rel=0.01)


def test_counts_of_a_run_follow_its_family(both):
    moe = both.cells_of("moe")
    run = describe_run(moe, 1e9, 2e10, experts=8, top_k=2)
    assert run.params_total_non_embedding == pytest.approx(3e9)
    # embeddings grow with N^(1/3)
    assert run.params_active - 1e9 == pytest.approx(3e5 * 100 ** (1 / 3), rel=1e-6)
    assert run.flops == pytest.approx(7e9 * 2e10)
    # of two matrices one is the head; where the width and the tokens are known, so is the head
    assert run.head_params == pytest.approx(1.5e5 * 100 ** (1 / 3))
    tied = describe_run(moe.assign(d_model=100, vocab_size=3000), 1e9, 2e10, experts=8, top_k=2)
    n0 = moe["params_active_non_embedding"].max()
    assert tied.head_params == pytest.approx(3e5 * (1e9 / n0) ** (1 / 3))
    bare = moe.assign(params_active=moe["params_active_non_embedding"])
    assert math.isnan(describe_run(bare, 1e9, 2e10, experts=8, top_k=2).head_params)
    wider = describe_run(moe, 1e9, 2e10, experts=64, top_k=2)
    assert wider.params_total_non_embedding == pytest.approx(1e9 * (1 / 3 + 64 / 3))


def test_other_numbers_of_experts_are_said(both):
    answer = both.recommend("moe", 1e9, 2e10, experts=64)
    assert answer.experts == 64
    assert answer.top_k == 2
    assert any("no cell of moe has 64 experts" in w for w in answer.warnings)
    assert both.recommend(None, 1e9, 2e10).architecture == "dense"
    assert both.recommend(None, 1e9, 2e10, experts=8).architecture == "moe"


@pytest.mark.slow
def test_of_architectures_with_as_many_experts_the_one_of_that_top_k_answers(planted_study):
    rows = planted_study(kinds=("dense", "moe"), per_cell=6)
    moe = rows[rows["architecture"] == "moe"]
    other = moe.assign(architecture="first", top_k=1)
    fits = fit(pd.concat([other, rows], ignore_index=True))
    assert fits.recommend(None, 1e9, 2e10, experts=8, top_k=2).architecture == "moe"
    assert fits.recommend(None, 1e9, 2e10, experts=8, top_k=1).architecture == "first"
    assert fits.asked(8, 2) == ["moe"]
    assert fits.asked(8) == ["first", "moe"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", 1e9, 1e10), "no architecture 'tiny' in the results; known: dense, moe"),
        (("dense", 0, 1e10), "params must be above zero, not 0"),
        (("dense", 1e9, math.nan), "tokens must be above zero, not nan"),
        (("moe", 1e9, 1e10, 8, 9), "top_k 9 must lie between 1 and experts 8"),
        (("dense", 1e9, 1e10, 8), "architecture 'dense' is dense"),
    ],
)
def test_impossible_questions_are_refused_in_one_line(both, arguments, message):
    with pytest.raises(UserError) as error:
        both.recommend(*arguments)
    assert message in str(error.value)


def test_experts_cannot_be_asked_of_dense_results(dense):
    with pytest.raises(UserError, match="no MoE cell in the results"):
        dense.recommend(None, 1e9, 1e10, experts=8)


SPOILED = {
    "one cell": lambda f: f[f["cell"] == f["cell"].iloc[0]],
    "one row": lambda f: f.iloc[:1],
    "no row": lambda f: f.iloc[:0],
    "all diverged": lambda f: f.assign(status="diverged", loss=np.nan),
    "all crashed": lambda f: f.assign(status="crashed", loss=None),
    "no rates": lambda f: f.drop(columns=["learning_rate", "batch_tokens"]),
    "equal losses": lambda f: f.assign(loss=2.0),
    "one trial a cell": lambda f: f.groupby("cell").head(1),
    "no loss is a number": lambda f: f.assign(loss=np.nan),
    "negative losses": lambda f: f.assign(loss=-f["loss"]),
    "infinite losses": lambda f: f.assign(loss=np.inf),
    "no tokens": lambda f: f.assign(tokens=0),
    "no size": lambda f: f.assign(params_active_non_embedding=np.nan),
    "one batch": lambda f: f.assign(batch_tokens=1e5),
    "one rate": lambda f: f.assign(learning_rate=1e-3),
    "one size": lambda f: f[f["params_active_non_embedding"] == 1e7],
}


@pytest.mark.parametrize("case", SPOILED)
def test_tables_that_tell_little_answer_widely_or_say_why_not(planted_study, case):
    fits = fit(SPOILED[case](planted_study(per_cell=6)))
    json.dumps(fits.to_dict(), allow_nan=False)
    assert str(fits)
    if not len(fits.cells):
        with pytest.raises(UserError, match="no cell"):
            fits.recommend(None, 1e9, 2e10)
        return
    answer = fits.recommend(None, 1e10, 2e11)
    assert isinstance(answer.verdict, str)
    searched = bool(fits.table.searched())
    assert math.isfinite(answer.learning_rate) == searched
    if not searched:
        assert answer.verdict == NOT_DETERMINED
    if case in ("one cell", "one row", "one trial a cell", "equal losses"):
        low, high = answer.learning_rate_interval
        assert high / low > 4  # little more than the published laws
    if case == "one batch":
        assert answer.batch_tokens_exact == pytest.approx(1e5, rel=0.02)
        assert answer.batch_as_run
        assert np.isnan(answer.batch_tokens_interval).all()
        assert "tokens (as run)" in str(answer)
        assert "  batch " not in str(fits)
        assert any("no cell varied its batch" in w for w in answer.warnings)
    if case == "one size":
        assert answer.directions == ("N",)


def test_one_size_asked_at_another_follows_the_prior(planted_study):
    frame = planted_study(scales=(1e8,), tokens_per_param=(5, 10, 20, 40, 80), per_cell=8)
    fits = fit(frame)
    far = fits.recommend("dense", 1e9, 2e9)
    assert far.directions == ("N",)
    assert any("do not tell the effect of N" in w for w in far.warnings)
    assert inside(far.learning_rate_interval, planted(1e9, 2e9)[0])
    assert inside(far.loss_interval, planted(1e9, 2e9)[2]) or math.isnan(far.loss)


def test_cells_along_one_path_do_not_tell_another_split(planted_study):
    fits = fit(planted_study(tokens_per_param=(20,), per_cell=14))
    assert fits.recommend("dense", 1e9, 2e10).directions == ()
    off = fits.recommend("dense", 1e8, 2e11)
    assert off.directions == ("N apart from D",)
    on = fits.recommend("dense", 1e9, 2e10)
    assert np.ptp(np.log(off.learning_rate_interval)) > np.ptp(np.log(on.learning_rate_interval))


def test_edges_are_said_and_their_loss_is_told_by_all_cells(planted_study):
    frame = planted_study(per_cell=14)
    name = frame["cell"].iloc[0]
    optimum = 3e-3 * 0.1**-0.6 * 0.05**0.25
    high = frame["learning_rate"] > 0.5 * optimum
    fits = fit(frame[~((frame["cell"] == name) & high)])
    row = fits.cells.loc[name]
    assert row["status"].startswith("edge: learning_rate high")
    assert row["loss_from"] == "surface"
    assert row["loss"] == pytest.approx(planted(1e7, 1e8)[2], rel=0.01)
    assert any("7 of 8 optima lie inside their trials" in m for m in fits.messages)


def test_rows_left_out_are_counted_by_reason(planted_study):
    frame = planted_study(per_cell=10)
    frame["excluded"] = None
    frame.loc[:2, "excluded"] = "outlier"
    frame.loc[3:4, "status"] = "crashed"
    frame.loc[5, "loss"] = np.nan
    fits = fit(frame)
    assert fits.left_out["excluded: outlier"] == 3
    assert fits.left_out["crashed"] == 2
    assert sum(fits.left_out.values()) == 6
    assert fits.n_rows == 80


def test_a_trial_that_two_studies_ran_counts_once(planted_study):
    frame = planted_study(per_cell=10).assign(data_hash="one")
    frame["trial_key"] = [f"k{i}" for i in range(len(frame))]
    both = pd.concat([frame, frame.head(7).assign(study="other")], ignore_index=True)
    fits = fit(both)
    assert fits.left_out == {"the same trial in another study": 7}
    assert fits.cells["n_finished"].sum() == 80


def test_unknown_options_and_columns_are_named(planted_study):
    frame = planted_study(per_cell=4)
    with pytest.raises(UserError, match="unknown law of the loss 'newton'"):
        fit(frame, loss_law="newton")
    with pytest.raises(UserError, match="lacks the column 'loss'"):
        fit(frame.drop(columns="loss"))


@pytest.mark.parametrize(
    ("tokens", "length", "expected"),
    [
        (1000.0, 1024, (1024.0, 1)),
        (70_000.0, 1024, (65536.0, 64)),
        (95_000.0, 1024, (98304.0, 96)),
        (80_000.0, 1024, (81920.0, 80)),
        (3_100_000.0, 2048, (3145728.0, 1536)),
        (123_456.0, None, (120_000.0, None)),
    ],
)
def test_batches_are_rounded_to_what_can_be_run(tokens, length, expected):
    assert usable_batch(tokens, length) == expected


def test_the_batch_that_was_run_stays_what_it_was():
    assert usable_batch(524_287.6, None, as_run=True) == (524_288.0, None)
    assert usable_batch(100.001 * 1024, 1024, as_run=True) == (102_400.0, 100)


def test_a_batch_lies_inside_its_interval_however_it_is_rounded(planted_study):
    frame = planted_study(per_cell=12)
    small, large = 2.0**4, 2.0 ** math.ceil(math.log2(frame["batch_tokens"].max()))
    for length in (small, large):
        fits = fit(frame.assign(sequence_length=length, batch_sequences=None))
        for n in np.geomspace(1e7, 1e9, 5):
            answer = fits.recommend("dense", n, 20 * n)
            low, high = answer.batch_tokens_interval
            assert low <= answer.batch_tokens <= high
            below = answer.batch_tokens_exact < length
            assert below == (length == large)
            assert below == any("smaller than one sequence" in w for w in answer.warnings)
            assert not below or answer.batch_sequences == 1


def test_results_without_learning_rates_still_predict_losses(shared_data):
    fits = fit(read_chinchilla(shared_data / "chinchilla_points.csv"))
    answer = fits.recommend(None, 7e10, 1.4e12)
    assert answer.status == NOT_DETERMINED
    assert math.isnan(answer.learning_rate)
    # Besiroglu et al. 2404.10102 on all 245 points
    expected = 1.891 + 495.6 / 7e10**0.3493 + 12842 / 1.4e12**0.4530
    assert inside(answer.loss_interval, expected)
    assert any("only laws of the loss are fitted" in m for m in fits.messages)


def test_outliers_of_imported_runs_stay_out(shared_data):
    fits = fit(read_isoflop(shared_data / "isoflop_marin_comma.csv"))
    assert sum(fits.left_out.values()) == 5
    assert len(fits.loss_model(fits.architectures[0]).data) == 80


def test_step_law_grids_end_to_end(shared_data):
    frame = read_steplaw(shared_data / "steplaw_dense.csv")
    fits = fit(frame, without=["step_law"])
    assert set(fits.cells["status"]) == {"interior"}
    surface = next(iter(fits.evidence.values())).surface
    assert surface is not None
    assert surface.status == "converged"
    assert fits.held_out is not None
    assert fits.held_out.mean_regret <= 0.0012
    for quantity in ("learning_rate", "batch_tokens", "loss"):
        covered, n = fits.held_out.covered(quantity)
        assert covered >= n - 1
    laws = surface.laws
    # Step Law's own law of these data: N^-0.713 D^0.307 and D^0.571
    assert laws.exponent("batch_tokens", "tokens").covers(0.571)
    assert laws.exponent("learning_rate", "params").covers(-0.713)


def test_losses_of_larger_runs_are_told_to_a_hundredth_of_a_nat(shared_data):
    """Every run of the cells above 430M within 5 % of their best, from the smaller cells."""
    frame = read_steplaw(shared_data / "steplaw_dense.csv")
    size = frame["params_active_non_embedding"]
    fits = fit(frame[size < 4.35e8], without=["step_law"])
    off, covered = [], []
    for _, cell in frame[size > 4.35e8].groupby("cell"):
        rows = cell[cell["loss"] <= cell["loss"].min() * 1.05]
        n, d = rows[["params_active_non_embedding", "tokens"]].to_numpy(float)[0]
        rate, batch = rows["learning_rate"].to_numpy(), rows["batch_tokens"].to_numpy()
        told = fits.predict(rate, batch, n, d)
        loss = rows["loss"].to_numpy()
        off.append(np.abs(told["loss"].to_numpy() - loss))
        covered.append((told["low"].to_numpy() <= loss) & (loss <= told["high"].to_numpy()))
    assert len(np.concatenate(off)) == 260
    assert np.concatenate(off).mean() <= 0.010
    assert np.concatenate(covered).mean() >= 0.85
