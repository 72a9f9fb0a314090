"""fit and recommend, end to end: planted studies, and tables that hold next to nothing."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.results.importers import read_chinchilla, read_isoflop, read_steplaw
from raysweep.scaling.cells import cell_table
from raysweep.scaling.fits import ALL, fit
from raysweep.scaling.loss.fit import LossFit
from raysweep.scaling.loss.selection import batch_table
from raysweep.scaling.recommend import usable_batch
from raysweep.scaling.target import describe_target


def quick(frame, **options):
    return fit(frame, **{"n_boot": 30, **options})


@pytest.fixture(scope="module")
def dense(planted_study):
    return quick(planted_study(per_cell=14, noise=0.0007))


@pytest.fixture(scope="module")
def both(planted_study):
    frame = planted_study(
        kinds=("dense", "moe"), moe_rate=1.3, moe_batch=0.8, per_cell=14, noise=0.0007
    )
    return quick(frame)


def test_a_recommendation_follows_the_planted_laws(dense):
    answer = dense.recommend("dense", 1e9, 2e10)
    assert answer.status == "ok"
    assert answer.learning_rate == pytest.approx(3e-3 * 10**-0.6 * 10**0.25, rel=0.15)
    assert answer.batch_tokens_exact == pytest.approx(2e5 * 10**0.5, rel=0.15)
    assert answer.loss == pytest.approx(1.7 + 480 / 1e9**0.35 + 2000 / 2e10**0.37, rel=0.02)
    for value, (low, high) in (
        (answer.learning_rate, answer.learning_rate_interval),
        (answer.batch_tokens_exact, answer.batch_tokens_interval),
        (answer.loss, answer.loss_interval),
    ):
        assert low < value < high
    assert answer.sequence_length == 1024
    assert answer.batch_sequences in (512, 640, 768)
    assert answer.batch_tokens == answer.batch_sequences * 1024
    assert answer.extrapolation["params"] == pytest.approx(1e9 / 2.7e8)
    assert answer.extrapolation["FLOPs"] == pytest.approx(2e19 / (2.7e8 * 2.7e8 * 40))
    assert set(answer.by_method) >= {"surface", "quadratic"}
    assert {"step_law", "deepseek"} <= {a["law"] for a in answer.published}


def test_inside_the_cells_nothing_is_extrapolated(dense):
    answer = dense.recommend("dense", 5e7, 1e9)
    assert set(answer.extrapolation.values()) == {1.0}
    assert not any("extrapolation" in w for w in answer.warnings)


def test_everything_is_plain_json(both):
    text = json.dumps(both.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert set(back["groups"]) == {"dense", "moe", ALL}
    assert back["cells"][0]["cell"].startswith("dense-")
    assert set(back["optima"]) == {"surface", "quadratic", "interpolate", "mean_within", "argmin"}
    answer = both.recommend("moe", 1e9, 2e10)
    assert json.loads(json.dumps(answer.to_dict(), allow_nan=False))["architecture"] == "moe"
    assert "MoE over dense at equal N and D" in str(both)
    assert "expected loss" in str(answer)


def test_dense_and_moe_are_compared_and_fitted_together(both):
    ratios = both.comparison["at equal N and D"]
    assert ratios["learning_rate"].ratio == pytest.approx(1.3, rel=0.06)
    assert ratios["batch_tokens"].ratio == pytest.approx(0.8, rel=0.06)
    group = both.groups[ALL]
    assert group.kind == "mixed"
    wang = group.loss_laws["wang"]
    assert isinstance(wang, LossFit)
    assert wang.ok
    assert wang.coefficients["g"] == pytest.approx(0.175, abs=0.06)
    assert both.groups["dense"].loss_laws["chinchilla"].ok
    assert both.groups["moe"].held_out is not None


def test_laws_of_the_loss_are_ordered_by_their_error_on_the_highest_compute(dense, both):
    for group in (dense.groups["dense"], both.groups[ALL]):
        order = group.loss_order()
        errors = [group.loss_checks[key].error for key in order]
        known = [e for e in errors if math.isfinite(e)]
        assert known == sorted(known)
        assert errors[: len(known)] == known
        assert all(group.loss_laws[key].ok for key in order)
    check = dense.groups["dense"].loss_checks["chinchilla"]
    assert check.error < 0.01
    assert check.n_test == 2
    assert check.extrapolation == pytest.approx(9)  # in FLOPs: thrice the size and the tokens
    assert dense.recommend("dense", 1e9, 2e10).laws["loss"] == dense.groups["dense"].loss_order()[0]


def test_the_three_term_law_rests_on_the_best_trial_near_each_batch(planted_study):
    frame = planted_study(per_cell=200)  # every trial its own batch, at any learning rate
    table = cell_table(frame)
    chosen = batch_table(table.cells, table.trials)
    assert len(chosen) < 0.06 * len(frame)
    # Within half an octave of batch the best trial has nearly the best rate: its loss is near what
    # the valley allows there, where the median trial lies far above.
    above = {}
    for name, rows in (("chosen", chosen), ("all", table.trials)):
        least = rows["cell"].map(table.trials.groupby("cell")["loss"].min())
        above[name] = float(np.median(np.log(rows["loss"] / least)))
    assert above["chosen"] < 0.5 * above["all"]
    grid = table.trials.assign(
        batch_tokens=2.0 ** np.tile(np.arange(15, 25) / 2 + 8, len(frame) // 10)
    )
    assert len(batch_table(table.cells, grid)) == 10 * len(table.cells)


def test_experts_without_a_cell_are_answered_with_a_warning(both):
    answer = both.recommend(None, 1e9, 2e10, experts=16, top_k=2)
    assert answer.architecture == "moe"
    assert (answer.experts, answer.top_k) == (16, 2)
    assert any("no cell of moe has 16 experts" in w for w in answer.warnings)
    assert "active_ratio" in answer.laws["learning_rate"]


def test_several_numbers_of_experts_under_one_name_are_told_apart(planted_study):
    """Learning rates fall and losses sink with experts: an answer for 64 is not that for 8."""
    few = planted_study(kinds=("moe",), noise=0.0005)
    more = []
    for experts in (8, 16, 64):
        extra = few["params_total_non_embedding"] - few["params_active_non_embedding"]
        total = few["params_active_non_embedding"] + extra * (experts - 2) / 6
        more.append(
            few.assign(
                experts=experts,
                params_total_non_embedding=total,
                params_total=total + few["params_total"] - few["params_total_non_embedding"],
                cell=few["cell"] + f"-e{experts}",
                learning_rate=few["learning_rate"] * (experts / 8) ** -0.5,
                loss=few["loss"] * (experts / 8) ** -0.02,
            )
        )
    fits = quick(pd.concat(more, ignore_index=True))
    asked = {e: fits.recommend("moe", params=2e8, tokens=4e9, experts=e) for e in (8, 64)}
    ratio = asked[64].learning_rate / asked[8].learning_rate
    assert ratio == pytest.approx(8**-0.5, rel=0.1)
    assert asked[64].loss / asked[8].loss == pytest.approx(8**-0.02, rel=0.01)


def test_the_kind_of_an_answer_follows_the_experts(both):
    assert both.recommend(None, 1e9, 2e10).architecture == "dense"
    assert both.recommend(None, 1e9, 2e10, experts=8).top_k == 2
    assert both.recommend("moe", 1e9, 2e10).experts == 8


def test_counts_of_a_run_follow_its_family(both):
    moe = both.groups["moe"].cells
    target = describe_target(moe, 1e9, 2e10, 8, 2)
    assert target.inputs["params_total_non_embedding"] == pytest.approx(3e9)
    assert target.inputs["active_ratio"] == pytest.approx(1 / 3)
    # embeddings grow with N^(1/3)
    assert target.inputs["params_active"] - 1e9 == pytest.approx(3e5 * 100 ** (1 / 3), rel=1e-6)
    assert target.inputs["flops"] == pytest.approx(7e9 * 2e10)
    # of two matrices one is the head; where the width and the tokens are known, so is the head
    assert target.setting().head_params == pytest.approx(1.5e5 * 100 ** (1 / 3))
    tied = describe_target(moe.assign(d_model=100, vocab_size=3000), 1e9, 2e10, 8, 2)
    n0 = moe["params_active_non_embedding"].max()
    assert tied.setting().head_params == pytest.approx(3e5 * (1e9 / n0) ** (1 / 3))
    bare = moe.assign(params_active=moe["params_active_non_embedding"])
    assert describe_target(bare, 1e9, 2e10, 8, 2).setting().head_params is None
    wider = describe_target(moe, 1e9, 2e10, 64, 2)
    assert wider.inputs["params_total_non_embedding"] == pytest.approx(1e9 * (1 / 3 + 64 / 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", 1e9, 1e10), "no architecture 'tiny' in the results; known: dense, moe"),
        (("dense", 0, 1e10), "recommend needs params above zero, not 0"),
        (("dense", 1e9, math.nan), "recommend needs tokens above zero, not nan"),
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
    "one size": lambda f: f[f["params_active_non_embedding"] == 1e7],
}


@pytest.mark.parametrize("case", SPOILED)
def test_tables_that_cannot_tell_get_a_status_and_no_number(planted_study, case):
    fits = quick(SPOILED[case](planted_study(per_cell=6)))
    json.dumps(fits.to_dict(), allow_nan=False)
    assert str(fits)
    if not len(fits.cells):
        with pytest.raises(UserError, match="no cell"):
            fits.recommend(None, 1e9, 2e10)
        return
    answer = fits.recommend(None, 1e10, 2e11)
    json.dumps(answer.to_dict(), allow_nan=False)
    assert any("can answer" in w for w in answer.warnings)
    if case == "one batch":
        assert answer.status == "no law of batch_tokens"
    else:
        assert answer.status == "no law"
        assert math.isnan(answer.learning_rate)
    assert math.isnan(answer.batch_tokens)


def test_collinear_sizes_and_horizons_leave_compute(planted_study):
    fits = quick(planted_study(tokens_per_param=(20,), per_cell=14))
    group = fits.groups["dense"]
    assert group.laws["learning_rate(params, tokens)"].status == "collinear"
    assert group.loss_laws["chinchilla"].status in ("too few cells", "collinear")
    answer = fits.recommend("dense", 1e9, 2e10)
    assert answer.laws["learning_rate"] == "learning_rate(flops)"
    assert not any("know compute only" in w for w in answer.warnings)
    off = fits.recommend("dense", 1e9, 2e12)
    assert any("know compute only" in w for w in off.warnings)


def test_three_cells_are_answered_by_the_surface_and_kaplans_own_form(planted_study):
    fits = quick(planted_study(scales=(1e7, 3e7, 9e7), tokens_per_param=(20,), per_cell=8))
    answer = fits.recommend("dense", 1e9, 2e10)
    assert answer.status == "few cells"
    assert answer.laws == {"learning_rate": "surface", "batch_tokens": "surface", "loss": "kaplan"}
    assert sum("leans on Step Law" in w for w in answer.warnings) == 2
    low, high = answer.learning_rate_interval
    assert low < 3e-3 * 10**-0.6 * 10**0.25 < high
    assert 1.5 < high / low < 100
    kaplan = fits.groups["dense"].loss_laws["kaplan"]
    assert isinstance(kaplan, LossFit)
    assert kaplan.fixed == {"E0": 0.0}


@pytest.mark.parametrize(
    "cells",
    [
        {"scales": (1e8,), "tokens_per_param": (5, 10, 20, 40, 80)},  # one size
        {"scales": (1e7, 3e7, 9e7, 2.7e8), "tokens_per_param": (20,)},  # one path
    ],
)
def test_compute_alone_says_nothing_of_another_split(planted_study, cells):
    fits = quick(planted_study(per_cell=8, **cells))
    assert [k for k, law in fits.groups["dense"].loss_laws.items() if law.ok] == ["kaplan"]
    middle = fits.cells[["params_active_non_embedding", "tokens"]].median()
    params, tokens = (float(v) for v in middle)
    assert math.isfinite(fits.recommend("dense", params, tokens).loss)
    off = fits.recommend("dense", 10 * params, tokens / 10)
    assert math.isnan(off.loss)
    assert any("one in compute alone knows about" in w for w in off.warnings)


def test_untuned_cells_make_the_expected_loss_doubtful(planted_study):
    frame = planted_study(per_cell=14).groupby("cell").head(1)
    answer = quick(frame).recommend("dense", 1e9, 2e10)
    assert any("8 of 8 cells have no interior optimum" in w for w in answer.warnings)


def test_one_horizon_cannot_tell_sizes_from_tokens_within_architectures(planted_study):
    # Total parameters differ between the two kinds, which must not pass for an exponent of N.
    fits = quick(planted_study(kinds=("dense", "moe"), tokens_per_param=(20,), per_cell=14))
    law = fits.groups[ALL].laws["learning_rate(params, tokens)"]
    assert law.status == "collinear"


def test_edges_are_left_out_and_said(planted_study):
    frame = planted_study(per_cell=14)
    name = frame["cell"].iloc[0]
    optimum = 3e-3 * 0.1**-0.6 * 0.05**0.25
    high = frame["learning_rate"] > 0.5 * optimum
    fits = quick(frame[~((frame["cell"] == name) & high)])
    assert fits.cells["status"].to_dict()[name] != "interior"
    assert name in fits.groups["dense"].laws["learning_rate(flops)"].left_out
    assert "7 of 8 optima are interior" in fits.messages[0]
    assert any("leaves out 1 of 8 cells" in w for w in fits.recommend("dense", 1e9, 2e10).warnings)


def test_rows_left_out_are_counted_by_reason(planted_study):
    frame = planted_study(per_cell=10)
    frame["excluded"] = None
    frame.loc[:2, "excluded"] = "outlier"
    frame.loc[3:4, "status"] = "crashed"
    frame.loc[5, "loss"] = np.nan
    fits = quick(frame)
    assert fits.left_out["excluded: outlier"] == 3
    assert fits.left_out["crashed"] == 2
    assert sum(fits.left_out.values()) == 6
    assert fits.n_rows == 80


def test_a_trial_that_two_studies_ran_counts_once(planted_study):
    frame = planted_study(per_cell=10)
    frame["trial_key"] = [f"k{i}" for i in range(len(frame))]
    both = pd.concat([frame, frame.head(7).assign(study="other")], ignore_index=True)
    fits = quick(both)
    assert fits.left_out == {"the same trial in another study": 7}
    assert fits.cells["n_finished"].sum() == 80


def test_cells_of_one_name_and_two_sizes_are_kept_apart(planted_study):
    frame = planted_study(per_cell=6)
    fits = quick(frame.assign(cell="same"))
    assert len(fits.cells) == 8
    assert fits.cells.index.is_unique


def test_unknown_options_and_columns_are_named(planted_study):
    frame = planted_study(per_cell=4)
    with pytest.raises(UserError, match="unknown optimum method 'guess'"):
        fit(frame, optimum_method="guess")
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


def test_results_without_learning_rates_still_predict_losses(shared_data):
    fits = quick(read_chinchilla(shared_data / "chinchilla_points.csv"))
    law = fits.groups["chinchilla"].loss_laws["chinchilla"]
    assert isinstance(law, LossFit)
    # Besiroglu et al. 2404.10102 on all 245 points
    assert law.coefficients["E0"] == pytest.approx(1.891, abs=0.002)
    assert law.coefficients["a"] == pytest.approx(0.3493, abs=0.001)
    answer = fits.recommend(None, 7e10, 1.4e12)
    assert answer.status == "no law"
    expected = 1.891 + 495.6 / 7e10**0.3493 + 12842 / 1.4e12**0.4530
    assert answer.loss == pytest.approx(expected, rel=1e-3)
    assert "only laws of the loss are fitted" in fits.messages[0]


def test_outliers_of_imported_runs_stay_out(shared_data):
    fits = quick(read_isoflop(shared_data / "isoflop_marin_comma.csv"))
    assert fits.left_out == {"excluded: outlier: too_few_points": 5}
    (group,) = fits.groups.values()
    law = group.loss_laws["chinchilla"]
    assert isinstance(law, LossFit)
    assert law.n_points == 80


def test_step_law_grids_end_to_end(shared_data):
    fits = quick(read_steplaw(shared_data / "steplaw_dense.csv"))
    group = fits.groups["steplaw-dense"]
    assert set(fits.cells["status"]) == {"interior"}
    assert group.in_sample is not None
    assert group.held_out is not None
    assert group.in_sample.mean <= 0.0009
    assert group.held_out.mean <= 0.0010
    # Step Law's own intervals: D^0.271..0.345 at its optima; another reading moves the exponents
    batch = group.laws["batch_tokens(tokens)"].exponents["tokens"]
    assert batch.low <= 0.571 <= batch.high
    laws = [method.laws["batch_tokens(tokens)"] for method in group.methods.values()]
    exponents = [law.exponents["tokens"].value for law in laws]
    assert 0.03 < max(exponents) - min(exponents) < 0.2
