"""Importers: what becomes of every row of a file, and what is said of a file that will not do."""

import json

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.results.importers import import_file, read_source
from raysweep.results.published import read_chinchilla, read_isoflop, read_steplaw
from raysweep.results.schema import COLUMNS
from raysweep.results.store import Results
from raysweep.results.units import doubts
from raysweep.scaling.cells import cell_table


def step_law_rows(**changes):
    rows = {
        "h": [960, 960],
        "ffnh": [9368, 9368],
        "numh": [15, 15],
        "numl": [7, 7],
        "lr": [1e-3, 2e-3],
        "bs": [128, 256],
        "ti": [1000, 500],
        "loss": [2.51, 2.52],
        "smooth loss": [2.5, 2.4],
        "N": [2e8, 2e8],
        "D": [2.7e8, 2.7e8],
    }
    return pd.DataFrame({**rows, **changes})


def write(folder, frame, name="sweep.csv"):
    path = folder / name
    frame.to_csv(path, index=False)
    return path


def test_step_law_rows_become_trials(tmp_path):
    rows = read_steplaw(write(tmp_path, step_law_rows()))
    assert list(rows.columns) == list(COLUMNS)
    assert rows["cell"].nunique() == 1
    first = rows.iloc[0]
    assert first["source"] == "import:steplaw"
    assert first["architecture_kind"] == "dense"
    assert first["loss"] == 2.5  # the smoothed one
    assert first["batch_tokens"] == 128 * 2048
    assert first["tokens_seen"] == 1000 * 128 * 2048
    assert first["tokens"] == 2.7e8
    assert first["params_active_non_embedding"] == first["params_total_non_embedding"] == 2e8
    assert first["layers"] == 7
    assert first["status"] == "finished"
    assert rows["excluded"].isna().all()


def test_step_law_moe_rows_keep_total_and_active_apart(tmp_path):
    frame = step_law_rows(
        nume=[8, 64],
        topk=[2, 4],
        moeh=[512, 128],
        sed=[512, 0],
        Na=[5e7, 4e7],
        seq_len=[1024, 1024],
    )
    rows = read_steplaw(write(tmp_path, frame))
    assert list(rows["architecture"]) == ["steplaw-moe-e8k2", "steplaw-moe-e64k4"]
    assert list(rows["architecture_kind"]) == ["moe", "moe"]
    assert list(rows["params_total_non_embedding"]) == [2e8, 2e8]
    assert list(rows["params_active_non_embedding"]) == [5e7, 4e7]
    assert list(rows["shared_experts"]) == [1, 0]
    assert list(rows["batch_tokens"]) == [128 * 1024, 256 * 1024]
    assert rows["cell"].nunique() == 2


def test_rows_that_cannot_be_used_stay_with_a_reason(tmp_path):
    frame = pd.concat([step_law_rows()] * 4, ignore_index=True)
    frame["bs"] = range(10, 18)
    frame["lr"] = frame["lr"].astype(object)
    frame["smooth loss"] = frame["smooth loss"].astype(object)
    frame.loc[0, "smooth loss"] = np.nan
    frame.loc[1, "smooth loss"] = -1.0
    frame.loc[2, "lr"] = 0.0
    frame.loc[3, "D"] = np.nan
    frame.loc[4, "lr"] = "fast"
    frame.loc[5, "smooth loss"] = -np.inf
    rows = read_steplaw(write(tmp_path, frame))
    assert len(rows) == 8
    assert list(rows["excluded"][:6]) == [
        "loss is missing or not a number",
        "loss is zero or negative",
        "learning_rate is zero or negative",
        "tokens is missing or not a number",
        "learning_rate is missing or not a number",
        "loss is not finite",
    ]
    assert rows["excluded"][6:].isna().all()


def test_runs_of_infinite_loss_diverged(tmp_path):
    path = write(tmp_path, runs(loss=[3.0, np.inf, 3.1, "inf"], seed=[1, 2, 3, 4]))
    rows = import_file("csv", path)
    assert list(rows["status"]) == ["finished", "diverged"] * 2
    assert list(rows["reason"][[1, 3]]) == ["its loss is infinite"] * 2
    assert rows["loss"][[1, 3]].isna().all()
    assert rows["excluded"].isna().all()
    table = cell_table(rows)
    assert (len(table.trials), len(table.failed)) == (2, 2)
    told = import_file("csv", write(tmp_path, runs(loss=[3.0, np.inf, 3.1, 3.2], status="crashed")))
    assert set(told["status"]) == {"crashed"}


def test_a_repeated_row_is_kept_out_once_and_keys_are_stable(tmp_path):
    frame = pd.concat([step_law_rows(), step_law_rows()[:1]], ignore_index=True)
    rows = read_steplaw(write(tmp_path, frame))
    assert rows["trial_key"].is_unique
    assert list(rows["excluded"].notna()) == [False, False, True]
    assert "same as an earlier row" in rows["excluded"][2]
    reordered = frame[frame.columns[::-1]]
    again = read_steplaw(write(tmp_path, reordered, "again.csv"))
    assert list(again["trial_key"]) == list(rows["trial_key"])


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (["smooth loss"], "lacks the column 'smooth loss' (near: loss)"),
        (["N", "D"], "lacks the columns 'N', 'D'"),
    ],
)
def test_missing_columns_are_named(tmp_path, drop, message):
    path = write(tmp_path, step_law_rows().drop(columns=drop))
    with pytest.raises(UserError) as error:
        read_steplaw(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "not found"),
        ("empty.csv", "", "cannot be read as a table"),
        ("header.csv", "loss,tokens\n", "has no rows"),
        ("image.csv", b"\x89PNG\xff\xfe\x00", "cannot be read as a table"),
        ("broken.parquet", "not parquet", "cannot be read as a table"),
    ],
)
def test_files_that_are_no_table_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_isoflop(path)
    assert "\n" not in str(error.value)


def test_chinchilla_points_have_tokens_but_no_learning_rate(tmp_path):
    frame = pd.DataFrame({"Model Size": [1e9], "Training FLOP": [1.2e20], "loss": [2.4]})
    (row,) = read_chinchilla(write(tmp_path, frame)).to_dict("records")
    assert row["tokens"] == pytest.approx(2e10)
    assert row["flops"] == 1.2e20
    assert np.isnan(row["learning_rate"])
    assert pd.isna(row["excluded"])


def test_flagged_outliers_are_excluded_with_their_reason(tmp_path):
    frame = pd.DataFrame(
        {
            "experiment": ["a", "a", "b"],
            "tokens": [1e9, 2e9, 3e9],
            "params": [1e8, 1e8, 1e8],
            "budget": [6e17, 1.2e18, 1.8e18],
            "loss": [3.0, 2.9, 2.8],
            "outlier": [False, True, False],
            "reason": ["none", "loss_spike", "none"],
        }
    )
    rows = read_isoflop(write(tmp_path, frame))
    assert list(rows["architecture"]) == ["a", "a", "b"]
    assert rows["excluded"][1] == "outlier: loss_spike"
    assert rows["excluded"][[0, 2]].isna().all()
    assert rows["flops_per_token"][0] == pytest.approx(6e8)


@pytest.mark.parametrize(
    "flag", [True, "True", "yes", "1", 1, 1.0, "1.0", "flagged", "spline_outlier"]
)
@pytest.mark.parametrize("reason", [None, "", "none", "loss_spike"])
def test_a_flag_counts_whatever_the_reason_says(tmp_path, flag, reason):
    frame = pd.DataFrame(
        {
            "tokens": [1e9, 2e9, 3e9],
            "params": [1e8, 1e8, 1e8],
            "budget": [6e17, 1.2e18, 1.8e18],
            "loss": [3.0, 2.9, 2.8],
            "outlier": [False if isinstance(flag, bool | str) else 0.0, flag, None],
            "reason": ["none", reason, None],
        }
    )
    expected = "outlier: loss_spike" if reason == "loss_spike" else "outlier"
    rows = read_isoflop(write(tmp_path, frame))
    assert rows["excluded"][1] == expected
    assert rows["excluded"][[0, 2]].isna().all()
    ours = frame.rename(columns={"params": "params_active_non_embedding", "budget": "flops"})
    rows = import_file("csv", write(tmp_path, ours))
    assert rows["excluded"][1] == expected
    assert rows["excluded"][[0, 2]].isna().all()


def test_a_column_excluded_may_hold_flags_or_reasons(tmp_path):
    frame = runs(6).assign(excluded=["False", "0", "", "true", "1", "hardware fault"])
    rows = import_file("csv", write(tmp_path, frame))
    assert rows["excluded"][:3].isna().all()
    assert list(rows["excluded"][3:]) == ["flagged in the file"] * 2 + ["hardware fault"]


def runs(n=4, **columns):
    """A table in our own columns, units as they should be."""
    frame = pd.DataFrame(
        {
            "loss": np.linspace(3.0, 3.1, n),
            "tokens": 2e9,
            "params_active_non_embedding": 1e8,
            "learning_rate": np.geomspace(1e-3, 2e-3, n),
            "batch_tokens": 262144.0,
        }
    )
    return frame.assign(**columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"params_active_non_embedding": 0.1}, "params_active_non_embedding is below 1000 in 4 of"),
        ({"params_active_non_embedding": 100.0}, "seems to be in millions"),
        ({"params_active_non_embedding": 0.1}, r"params_active_non_embedding=COLUMN\*1e9"),
        ({"tokens": 2.0, "batch_tokens": None}, "tokens is below 10000 in 4 of 4 rows .* billions"),
        ({"tokens": 2e-3, "params_active_non_embedding": 0.1}, "params_active_non_embedding is b"),
        ({"flops": 1.2e9}, "flops is 1e-09 times 6 N D in 4 of 4 rows"),
        ({"batch_tokens": 256, "sequence_length": 1024}, "batch_tokens is below the sequence len"),
        ({"batch_tokens": 256, "sequence_length": 1024}, "map it to batch_sequences"),
        ({"batch_tokens": 128, "steps": 7629}, "is 2048, a sequence length: batch_tokens is in"),
        ({"batch_tokens": 4e9}, "batch_tokens is above the tokens of the run in 4 of 4 rows"),
        ({"learning_rate": -3.0}, "learning_rate is negative in 4 of 4 rows"),
    ],
)
def test_units_that_cannot_be_right_are_refused(tmp_path, columns, message):
    with pytest.raises(UserError, match=message) as error:
        import_file("csv", write(tmp_path, runs(**columns)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"flops": 6e18}, "flops is 5 times 6 N D in 4 of 4 rows"),
        (
            {"batch_tokens": 512},
            "batch_tokens (median 512) would mean 3.9e+06 steps in 4 of",
        ),
        ({"steps": 15258}, "tokens / (batch_tokens * steps) is 0.5 and should be 1 in 4 of 4 rows"),
        ({"tokens": 5e5, "batch_tokens": 1e4}, "fewer than one token for 100 parameters in 4 of 4"),
        ({"learning_rate": 30.0}, "learning_rate is above 10 in 4 of 4 rows"),
        (
            {"batch_sequences": 64, "sequence_length": 2048},
            "batch_tokens is not batch_sequences x sequence_length in 4 of 4 rows",
        ),
        ({"loss": [20.0, 21.0, 22.0, 23.0]}, "loss is above 13 in 4 of 4 rows"),
    ],
)
def test_units_that_may_be_right_are_told_of(tmp_path, columns, message):
    rows = import_file("csv", write(tmp_path, runs(**columns)))
    said = [str(d) for d in doubts(rows)]
    assert len(said) == 1
    assert message in said[0]


def test_a_few_rows_in_another_unit_are_kept_out(tmp_path):
    frame = runs(params_active_non_embedding=[1e8, 1e8, 1e8, 0.1])
    rows = import_file("csv", write(tmp_path, frame))
    assert list(rows["excluded"].notna()) == [False, False, False, True]
    assert rows["excluded"][3] == "params_active_non_embedding is in another unit than elsewhere"
    assert not cell_table(rows).messages


def test_right_units_raise_no_doubt(tmp_path, shared_data):
    plain = runs(flops=1.3e18, steps=7629, sequence_length=2048)
    assert not doubts(import_file("csv", write(tmp_path, plain)))
    for name in ("isoflop_llama3", "isoflop_marin_comma", "isoflop_misfitting"):
        assert not doubts(import_file("isoflop", shared_data / f"{name}.csv")), name
    assert not doubts(import_file("chinchilla", shared_data / "chinchilla_points.csv"))
    assert not doubts(import_file("steplaw", shared_data / "steplaw_dense.csv"))


def test_a_mapping_can_convert_units(tmp_path):
    frame = runs().assign(size=0.1).drop(columns="params_active_non_embedding")
    rows = import_file("csv", write(tmp_path, frame), "params_active_non_embedding=size*1e9")
    assert list(rows["params_active_non_embedding"]) == pytest.approx([1e8] * 4)
    with pytest.raises(UserError, match=r"no column 'sise' \(near: size"):
        import_file("csv", write(tmp_path, frame), "params_active_non_embedding=sise*1e9")


def test_a_perplexity_becomes_a_loss(tmp_path):
    frame = runs()
    losses = list(frame["loss"])
    frame = frame.assign(perplexity=np.exp(frame["loss"])).drop(columns="loss")
    path = write(tmp_path, frame)
    rows = import_file("csv", path, "loss=log(perplexity)")
    assert list(rows["loss"]) == pytest.approx(losses)
    (note,) = doubts(import_file("csv", path, "loss=perplexity"))
    assert "loss=log(NAME)" in str(note)


def test_one_value_for_all_rows_is_told_where_a_column_is_meant(tmp_path):
    with pytest.raises(UserError, match="one value for all rows is batch_tokens==524288"):
        import_file("csv", write(tmp_path, runs()), "batch_tokens=524288")


def test_hyperparameters_are_kept_in_the_recipe(tmp_path):
    frame = runs(optimizer=["adamw", "muon", None, "muon"], z=[1, 2, 3, 4], note="x")
    path = write(tmp_path, frame)
    found = read_source("csv", path, "recipe.z_loss_weight=z")
    recipes = [json.loads(text) for text in found.rows["recipe"]]
    assert recipes[0] == {"optimizer": "adamw", "z_loss_weight": 1}
    assert recipes[2] == {"z_loss_weight": 3}
    assert found.ignored == ("note",)
    assert set(found.used) >= {"loss", "optimizer", "z"}
    cells = cell_table(found.rows, group=("optimizer",)).cells
    assert sorted(cells["group"]) == ["adamw", "muon", "unknown"]


def test_runs_cut_short_are_kept_out(tmp_path):
    frame = runs(steps=7629, step=[7629, 7500, 7400, 100], tokens_seen=2e9)
    rows = import_file("csv", write(tmp_path, frame))
    assert list(rows["excluded"].notna()) == [False, False, True, True]
    assert rows["excluded"][2] == "cut short: step is below 98% of steps"
    rows = import_file("csv", write(tmp_path, runs(tokens_seen=[2e9, 1.97e9, 1.9e9, 1e9])))
    assert list(rows["excluded"].notna()) == [False, False, True, True]


def test_studies_and_data_are_named(tmp_path):
    one, two = write(tmp_path, runs(), "one.csv"), write(tmp_path, runs(loss=3.3), "two.csv")
    rows = [import_file("csv", path) for path in (one, two)]
    assert [set(r["study"]) for r in rows] == [{"one"}, {"two"}]
    assert cell_table(pd.concat(rows)).cells["dataset"].nunique() == 2
    rows = [import_file("csv", path, data="web") for path in (one, two)]
    assert cell_table(pd.concat(rows)).cells["dataset"].nunique() == 1
    assert set(import_file("csv", one, study="mine")["study"]) == {"mine"}


def test_experiments_share_no_data(tmp_path):
    frame = pd.DataFrame(
        {
            "experiment": ["a", "a", "b", "b"],
            "tokens": [1e9, 2e9, 1e9, 2e9],
            "params": 1e8,
            "budget": [6e17, 1.2e18, 6e17, 1.2e18],
            "loss": [3.0, 2.9, 2.0, 1.9],
        }
    )
    cells = cell_table(read_isoflop(write(tmp_path, frame))).cells
    assert sorted(cells["dataset"]) == ["a", "a", "b", "b"]


def test_any_csv_by_mapping(tmp_path):
    frame = pd.DataFrame(
        {
            "val": [3.0, 2.9],
            "D": [1e9, 1e9],
            "size": [1e8, 1e8],
            "lr": [1e-3, 2e-3],
            "batch_sequences": [64, 128],
            "ctx": [1024, 1024],
        }
    )
    texts = [
        "loss=val, tokens=D,params_active_non_embedding=size,learning_rate=lr",
        "sequence_length=ctx,architecture==mine",
    ]
    rows = import_file("csv", write(tmp_path, frame), ",".join(texts))
    assert list(rows["batch_tokens"]) == [65536, 131072]
    assert set(rows["architecture"]) == {"mine"}
    assert set(rows["architecture_kind"]) == {"dense"}
    assert rows["cell"].nunique() == 1
    assert rows["excluded"].isna().all()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("los=loss", "no column 'los' of results (near: loss"),
        ("loss=lss", "has no column 'lss' (near: loss)"),
        ("loss", "'loss' is not column=name"),
        ("", "map one with --map params_active_non_embedding=NAME"),
    ],
)
def test_bad_mappings_are_named(tmp_path, mapping, message):
    path = write(tmp_path, pd.DataFrame({"loss": [1.0], "tokens": [1e9]}))
    with pytest.raises(UserError) as error:
        import_file("csv", path, mapping)
    assert message in str(error.value)


def test_an_unknown_status_is_kept_out(tmp_path):
    frame = pd.DataFrame(
        {
            "loss": [3.0, np.nan, 3.1],
            "tokens": [1e9] * 3,
            "params_active_non_embedding": [1e8] * 3,
            "status": ["finished", "diverged", "fine"],
        }
    )
    rows = import_file("csv", write(tmp_path, frame))
    assert rows["excluded"][:2].isna().all()  # a diverged trial needs no loss
    assert "its status is none of finished" in rows["excluded"][2]


def test_unknown_formats_and_a_stray_map_are_refused(tmp_path):
    path = write(tmp_path, step_law_rows())
    with pytest.raises(UserError, match=r"unknown import format 'wandib' \(near: wandb\)"):
        import_file("wandib", path)
    with pytest.raises(UserError, match="--map goes with tables and trackers"):
        import_file("steplaw", path, "loss=loss")


def test_imported_rows_go_through_the_store(tmp_path):
    rows = read_steplaw(write(tmp_path, step_law_rows()))
    store = Results.open(tmp_path / "results", create=True)
    assert store.write_many(rows) == 2
    assert store.write_many(rows) == 0  # a second import adds nothing
    back = store.to_pandas()
    assert sorted(back["loss"]) == [2.4, 2.5]
    assert set(back["batch_sequences"]) == {128, 256}


@pytest.mark.parametrize(
    ("format_", "name", "rows", "kept_out"),
    [
        ("steplaw", "steplaw_dense.csv", 1746, 0),
        ("chinchilla", "chinchilla_points.csv", 245, 0),
        ("isoflop", "isoflop_marin_comma.csv", 85, 5),
    ],
)
def test_the_public_sweeps(shared_data, format_, name, rows, kept_out):
    frame = import_file(format_, shared_data / name)
    assert len(frame) == rows
    assert frame["excluded"].notna().sum() == kept_out
    assert frame["trial_key"].is_unique
