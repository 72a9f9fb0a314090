"""From rows to cells: what is joined, what is kept apart, and what is said of it."""

import json

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.scaling.cells import cell_table
from raysweep.scaling.datasets import other_data
from raysweep.scaling.fit import fit
from raysweep.scaling.joining import together
from raysweep.scaling.runs import size_of


def sweep(tokens=(2e9,), params=(1e8,), rates=(5e-4, 1e-3, 2e-3), batches=(1e5, 2e5), **columns):
    """An imported sweep without cell names: loss least at rate 1e-3, batch 2e5."""
    size = [
        (n, d, r, b) for n in np.atleast_1d(params) for d in tokens for r in rates for b in batches
    ]
    n, d, rate, batch = (np.array(v, float) for v in zip(*size, strict=True))
    least = 1.7 + 480 / n**0.35 + 2000 / d**0.37
    walls = 0.02 * np.log(rate / 1e-3) ** 2 + 0.01 * np.log(batch / 2e5) ** 2
    walls = np.nan_to_num(walls)  # of runs that do not tell their setting
    frame = pd.DataFrame(
        {
            "study": "mine",
            "source": "import:csv",
            "architecture": "dense",
            "params_active_non_embedding": n,
            "tokens": d,
            "learning_rate": rate,
            "batch_tokens": batch,
            "loss": least * np.exp(walls),
        }
    )
    return frame.assign(**columns)


def joined(*frames):
    return pd.concat(frames, ignore_index=True)


# --- joining ----------------------------------------------------------------------------------


def test_runs_whose_tokens_differ_by_rounding_share_a_cell():
    # Steps are whole, so each batch ends at other tokens: 30 runs a cell, all of other tokens.
    rng = np.random.default_rng(0)
    frame = sweep((2e9, 8e9), (1e8, 3e8), np.geomspace(3e-4, 3e-3, 15))
    frame["tokens"] *= np.exp(rng.uniform(-0.009, 0.009, len(frame)))
    frame["cell"] = [f"dense-{t:.0f}tok" for t in frame["tokens"]]
    assert frame["tokens"].nunique() == 120
    table = cell_table(frame)
    assert list(table.cells["n_trials"]) == [30, 30, 30, 30]
    first = table.cells.iloc[0]
    mine = frame[frame["tokens"] < 3e9]
    mine = mine[mine["params_active_non_embedding"] == 1e8]
    assert first["tokens"] == pytest.approx(np.exp(np.log(mine["tokens"]).mean()), rel=1e-12)
    assert set(table.trials["tokens"]) == set(frame["tokens"])  # a run keeps its own


def test_a_chain_of_near_tokens_is_cut():
    chain = 2e9 * 1.01 ** np.arange(12)
    table = cell_table(sweep(chain))
    spread = table.trials.groupby("cell")["tokens"].agg(lambda t: t.max() / t.min())
    assert spread.max() <= 1.02 + 1e-9
    assert len(table.cells) == 6  # two steps of 1 % are more than 2 %
    assert table.cells.index.is_unique


def test_clusters_are_few_and_cut_at_the_widest_gaps():
    values = np.array([1.0, 1.0195, 1.021, 1.022, 3.0, 3.0])
    labels = together(values, 0.02)
    assert list(labels) == [0, 1, 1, 1, 2, 2]
    rng = np.random.default_rng(1)
    many = np.exp(rng.uniform(0, 1, 3000))
    found = together(many, 0.02)
    widths = [np.ptp(np.log(many[found == k])) for k in range(found.max() + 1)]
    assert max(widths) <= np.log(1.02) * (1 + 1e-5)
    assert found.max() + 1 <= np.ceil(1 / np.log(1.02))


def test_tokens_are_joined_by_steps_and_batch_where_the_table_rounds_them():
    exact = sweep([10.3e9], rates=(1e-3, 2e-3))
    rounded = exact.assign(tokens=10e9, learning_rate=4e-3)  # 3 % off, of the same runs
    frame = joined(exact, rounded)
    assert len(cell_table(frame).cells) == 2
    frame["steps"] = 10.3e9 / frame["batch_tokens"]
    assert len(cell_table(frame).cells) == 1
    frame.loc[frame["tokens"] == 10e9, "tokens"] = 2e9  # then steps are of something else
    assert len(cell_table(frame).cells) == 2


def test_sizes_that_differ_by_what_was_counted_are_one():
    frame = sweep(params=(1e8, 1.006e8, 1.02e8, 1.0205e8))
    table = cell_table(frame)
    assert sorted(table.cells["n_trials"]) == [12, 12]
    sizes = table.cells["params_active_non_embedding"]
    assert sorted(sizes) == pytest.approx([1e8 * 1.006**0.5, 1e8 * (1.02 * 1.0205) ** 0.5])


def test_sizes_of_two_shapes_are_two_unless_they_agree():
    frame = sweep(params=(1e8, 1.006e8), d_model=768)
    assert len(cell_table(frame).cells) == 1
    wide = frame["params_active_non_embedding"] > 1e8
    frame.loc[wide, "d_model"] = 1024
    assert len(cell_table(frame).cells) == 2
    frame.loc[wide, "params_active_non_embedding"] = 1.0005e8
    assert len(cell_table(frame).cells) == 1


def test_names_that_a_study_gave_stand():
    frame = sweep((2e9, 2.01e9), source="raysweep")
    frame["cell"] = np.where(frame["tokens"] == 2e9, "short", "long")
    table = cell_table(frame)
    assert sorted(table.cells.index) == ["long", "short"]
    # Imported names that tell more than the tokens stand too.
    frame = sweep((2e9,), source="import:csv")
    frame["cell"] = np.where(frame["batch_tokens"] > 1e5, "cosine", "wsd")
    assert sorted(cell_table(frame).cells.index) == ["cosine", "wsd"]


def test_rows_without_a_name_join_the_cell_of_a_study():
    own = sweep(source="raysweep", cell="dense-a-20tpp", data_hash="d")
    other = sweep((2.005e9,), rates=(4e-3,), data_hash="d")
    table = cell_table(joined(own, other))
    assert list(table.cells.index) == ["dense-a-20tpp"]
    assert len(table.trials) == 8


def test_where_no_run_tells_its_setting_only_repeats_share_a_cell():
    frame = sweep((2e9, 2.0001e9, 2.02e9), rates=(np.nan,), batches=(np.nan,))
    table = cell_table(frame)
    assert sorted(table.cells["n_trials"]) == [1, 2]


# --- groups -----------------------------------------------------------------------------------


def test_groups_split_cells_by_columns_and_by_the_recipe():
    frame = joined(
        sweep(optimizer="adamw", recipe=json.dumps({"schedule": "cosine"}), weight_decay=0.1),
        sweep(optimizer="muon", recipe=json.dumps({"schedule": "wsd"}), weight_decay=0.1),
        sweep(rates=(1e-3,), recipe=json.dumps({"schedule": "wsd"}), weight_decay=1),
    )
    assert len(cell_table(frame).cells) == 1
    assert set(cell_table(frame).cells["group"]) == {""}
    table = cell_table(frame, group=("optimizer", "schedule"))
    assert sorted(table.cells["group"]) == ["adamw, cosine", "muon, wsd", "unknown, wsd"]
    assert dict(table.trials["group"].value_counts()) == {
        "adamw, cosine": 6,
        "muon, wsd": 6,
        "unknown, wsd": 2,
    }
    for name, row in table.cells.iterrows():
        assert row["group"] in str(name)
    by_number = cell_table(frame, group=("weight_decay",)).cells
    assert sorted(by_number["group"]) == ["weight_decay 0.1", "weight_decay 1"]


def test_keys_that_rows_of_ours_leave_out_have_their_default():
    """Rows that were written before a key existed, and rows that say it."""
    mup = json.dumps({"optimizer": "adamw", "parametrization": "mup"})
    frame = joined(
        sweep(recipe=json.dumps({"optimizer": "adamw"})).assign(source="raysweep"),
        sweep(recipe=mup).assign(source="raysweep"),
        sweep(recipe=json.dumps({"optimizer": "adamw"})).assign(source="import:csv"),
    )
    found = cell_table(frame, group=("parametrization",)).cells["group"]
    assert set(found) == {"standard", "mup", "unknown"}


def test_a_group_column_that_is_not_there_is_named():
    frame = sweep(optimizer="adamw", recipe=json.dumps({"schedule": "cosine"}))
    with pytest.raises(UserError, match=r"'optimiser' \(near: optimizer\)"):
        cell_table(frame, group=("optimiser",))
    with pytest.raises(UserError, match=r"'scedule' \(near: schedule"):
        cell_table(frame, group=("scedule",))


# --- data sets --------------------------------------------------------------------------------


def test_studies_of_other_data_are_kept_apart():
    one = sweep(study="a", data_hash="0123456789abcdef", cell="c", source="raysweep")
    two = sweep(study="b", data_hash="fedcba9876543210", cell="c", source="raysweep")
    table = cell_table(joined(one, two))
    assert sorted(table.cells["dataset"]) == ["a", "b"]
    assert sorted(table.cells.index) == ["c (a)", "c (b)"]
    assert sorted(table.cells["architecture"]) == ["dense (a)", "dense (b)"]
    assert set(table.trials["architecture"]) == {"dense (a)", "dense (b)"}
    assert "2 sets of data (a, b)" in table.messages[0]
    shared = cell_table(joined(one, two.assign(data_hash="0123456789abcdef", seed=1)))
    assert list(shared.cells.index) == ["c"]
    assert set(shared.cells["dataset"]) == {""}
    assert not shared.messages


def test_studies_measured_on_other_slices_are_kept_apart():
    one = sweep(study="a", data_hash="d" * 16, validation_sequences=256, sequence_length=128)
    two = one.assign(study="b", validation_sequences=64)
    assert cell_table(joined(one, two)).cells["dataset"].nunique() == 2
    two = one.assign(study="b", sequence_length=256)
    assert cell_table(joined(one, two)).cells["dataset"].nunique() == 2
    two = one.assign(study="b", validation_sequences=np.nan)  # older rows do not say
    assert cell_table(joined(one, two)).cells["dataset"].nunique() == 1


def test_architectures_keep_their_names_where_they_are_distinct():
    one = sweep(study="a", data_hash="web")
    two = sweep(study="b", data_hash="code", architecture="wide")
    table = cell_table(joined(one, two))
    assert set(table.cells["architecture"]) == {"dense", "wide"}
    assert set(table.cells["dataset"]) == {"web", "code"}


def test_rows_that_do_not_tell_their_data_are_of_their_study():
    one, two = sweep(study="a"), sweep(study="b")
    assert set(cell_table(joined(one, two)).cells["dataset"]) == {"a", "b"}
    assert set(cell_table(joined(one, one.assign(seed=1))).cells["dataset"]) == {""}
    # Where other rows of the study tell it, the rest are of the same.
    told = cell_table(joined(one.assign(data_hash="web"), one, two.assign(data_hash="web")))
    assert set(told.cells["dataset"]) == {""}


def test_a_run_is_told_of_rows_of_other_data():
    rows = sweep(study="a", data_hash="0" * 16, validation_sequences=64, sequence_length=128)
    said = other_data(rows, "1" * 16, 64, 128)
    assert "6 rows that are here already (a) are of other data" in said
    assert "\n" not in said
    assert other_data(rows, "0" * 16, 64, 128) == ""
    assert "(a)" in other_data(rows, "0" * 16, 16, 128)
    assert other_data(rows.iloc[:0], "1" * 16, 64, 128) == ""


# --- repeats ----------------------------------------------------------------------------------


def test_repeats_count_by_their_mean():
    rng = np.random.default_rng(2)
    plain = sweep((2e9, 4e9, 8e9), rates=(np.nan,), batches=(np.nan,))
    frame = joined(*(plain.assign(seed=k) for k in range(40)))
    truth = plain["loss"].to_numpy()
    frame["loss"] *= np.exp(0.01 * rng.standard_normal(len(frame)))
    cells = cell_table(frame).cells
    assert cells["loss_mean"].to_numpy() == pytest.approx(truth, rel=0.01 * 4 / 40**0.5)
    expected = 0.01 * truth / 40**0.5
    assert cells["loss_se"].to_numpy() == pytest.approx(expected, rel=0.2)
    assert (cells["best_loss"] < truth * 0.99).all()
    fits = fit(frame)
    assert list(fits.cells["loss"]) == list(cells["loss_mean"])
    assert set(fits.cells["loss_from"]) == {"trials"}


def test_the_noise_of_repeats_is_that_of_cells_without():
    plain = sweep((2e9, 4e9), rates=(np.nan,), batches=(np.nan,))
    again = plain[:1].assign(loss=plain["loss"][0] * 1.02)
    cells = cell_table(joined(plain, again)).cells
    relative = (cells["loss_se"] / cells["loss_mean"]).to_numpy()
    assert relative[1] == pytest.approx(np.log(1.02) / 2**0.5, rel=1e-6)
    assert relative[0] == pytest.approx(relative[1] / 2**0.5, rel=1e-6)
    assert cell_table(plain).cells["loss_se"].isna().all()


def test_the_best_setting_is_that_of_least_mean():
    frame = sweep(rates=(1e-3, 2e-3), batches=(2e5,))
    lucky = frame[1:].assign(loss=frame["loss"][0] * 0.99, seed=1)
    table = cell_table(joined(frame, lucky))
    (cell,) = table.searched()
    mean = (frame["loss"][1] + lucky["loss"].iloc[0]) / 2
    averaged, n = cell.averaged()
    assert list(n) == [1, 2]
    assert averaged.loss == pytest.approx([frame["loss"][0], mean])
    assert table.cells["loss_mean"].iloc[0] == pytest.approx(min(frame["loss"][0], mean))
    assert len(cell.loss) == 3


def test_another_recipe_is_no_repeat():
    frame = sweep(rates=(1e-3,), batches=(2e5,), recipe=json.dumps({"weight_decay": 0.1}))
    worse = frame.assign(recipe=json.dumps({"weight_decay": 0.0}), loss=frame["loss"] * 1.05)
    cells = cell_table(joined(frame, worse)).cells
    assert cells["loss_mean"].iloc[0] == pytest.approx(frame["loss"][0])
    assert cells["loss_se"].isna().all()


# --- runs far off -----------------------------------------------------------------------------


def test_imported_runs_that_broke_are_diverged_and_walls_stay():
    frame = sweep((2e9, 4e9), rates=np.geomspace(1e-4, 1e-2, 9), source="import:csv")
    best = frame["loss"].groupby(frame["tokens"]).transform("min")
    hot = frame["learning_rate"] > 9e-3
    frame.loc[hot, "loss"] = best[hot] * np.exp(0.8)
    cold = frame["learning_rate"] < 1.1e-4
    frame.loc[cold, "loss"] = best[cold] * np.exp(0.4)  # hardly trained, not broken
    table = cell_table(frame)
    assert len(table.failed) == hot.sum() == 4
    assert set(table.failed["status"]) == {"diverged"}
    assert list(table.cells["n_diverged"]) == [2, 2]
    far = table.trials[table.trials["label"] == "far"]
    assert set(far["learning_rate"]) >= set(frame["learning_rate"][cold])
    assert table.left_out["why"].str.startswith("diverged").sum() == 4
    (said,) = (m for m in table.messages if "diverged" in m)
    assert said.startswith("4 of 36 runs")
    # What our own trainer calls finished is finished.
    own = cell_table(frame.assign(source="raysweep"))
    assert len(own.failed) == 0
    assert (own.trials["label"] == "far").sum() >= 8


def test_a_cell_in_which_all_runs_broke_is_judged_by_smaller_ones():
    frame = sweep((2e9, 4e9), rates=(2e-3, 4e-3))
    larger = frame["tokens"] == 4e9
    frame.loc[larger, "loss"] *= np.exp(0.9)
    table = cell_table(frame)
    assert set(table.failed["tokens"]) == {4e9}
    assert set(table.trials["tokens"]) == {2e9}


# --- what was varied, and sizes ---------------------------------------------------------------


def test_a_sweep_at_one_batch_says_so():
    table = cell_table(sweep((2e9, 4e9), batches=(131072.0,)))
    assert table.varied == {"learning_rate": True, "batch_tokens": False}
    assert table.fixed == {"batch_tokens": pytest.approx((131072.0,))}
    assert list(table.cells["n_batches"]) == [1, 1]
    assert list(table.cells["n_learning_rates"]) == [3, 3]
    both = cell_table(sweep())
    assert both.varied == {"learning_rate": True, "batch_tokens": True}
    assert both.fixed == {}


def test_run_sizes_hold_every_count():
    frame = sweep(
        params_total_non_embedding=3e8,
        params_active=1.2e8,
        params_total=3.2e8,
        params_dense=1e8,
        experts=8,
        top_k=2,
        d_model=512,
        vocab_size=32000,
        flops_per_token=7e8,
    )
    table = cell_table(frame)
    size = size_of(table.cells.index[0], table.cells.iloc[0])
    assert size.params_active_non_embedding == 1e8
    assert size.params_total_non_embedding == 3e8
    assert (size.params_active, size.params_total, size.params_dense) == (1.2e8, 3.2e8, 1e8)
    assert size.head_params == 512 * 32000
    assert size.routing == (8, 2)
    assert size.flops == 7e8 * 2e9
    bare = cell_table(sweep())
    size = size_of(bare.cells.index[0], bare.cells.iloc[0])
    assert np.isnan(size.head_params)
    assert size.compute == pytest.approx(6 * 1e8 * 2e9)
    assert size.log_sparsity == 0


# --- units and outliers -----------------------------------------------------------------------


def test_units_that_do_not_fit_are_told_of():
    table = cell_table(sweep(flops=1.2e9))
    (said,) = table.messages
    assert said.startswith("flops is 1e-09 times 6 N D in 6 of 6 rows")
    assert not cell_table(sweep(flops=1.2e18)).messages
    assert not cell_table(sweep(flops=1.2e9, source="raysweep")).messages


def test_a_flagged_row_stays_out_of_any_table():
    frame = sweep()
    frame["outlier"] = [1.0, 0.0, np.nan, "True", "no", ""]
    table = cell_table(frame)
    assert len(table.trials) == 4
    assert set(table.left_out["why"]) == {"excluded: outlier"}


def test_public_grids_make_the_cells_that_they_were_made_as(shared_data):
    from raysweep.results.importers import import_file

    frame = import_file("steplaw", shared_data / "steplaw_dense.csv")
    table = cell_table(frame)
    assert len(table.cells) == 15
    # Without names, and at the tokens that each run saw, which its batch rounds.
    frame = frame.assign(cell=None, tokens=frame["tokens_seen"])
    assert frame.groupby(["params_active_non_embedding", "tokens"]).ngroups == 88
    assert list(cell_table(frame).cells["n_trials"]) == list(table.cells["n_trials"])


def test_cells_that_repeat_their_corpus_are_told_of():
    frame = joined(sweep(epochs=1.0), sweep((8e9,), epochs=3.5))
    (said,) = (m for m in cell_table(frame).messages if "corpus" in m)
    assert "1 of 2 cells repeat their corpus, up to 3.5 passes" in said
    assert not [m for m in cell_table(sweep(epochs=1.0)).messages if "corpus" in m]
