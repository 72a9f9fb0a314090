"""Columns by common names, counts from shapes, malformed columns, and rows off the trend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.results.columns import rows_where
from raysweep.results.importers import read_rows, read_source
from raysweep.results.store import Results
from raysweep.study.shape import ModelShape, count


def table(n: int = 6, **columns: Any) -> pd.DataFrame:
    """A spreadsheet in other people's words."""
    frame = pd.DataFrame(
        {
            "val_loss": np.linspace(3.0, 3.1, n),
            "train_tokens": 2e9,
            "n_params": 1e8,
            "lr": np.geomspace(1e-3, 2e-3, n),
            "bs": 128,
            "seq_len": 2048,
        }
    )
    return frame.assign(**columns)


def read(frame: pd.DataFrame, **mapping: str):
    return read_rows(frame, mapping, "sweep.csv", "mine", first_line=2)


def test_common_names_need_no_map_and_are_told() -> None:
    found = read(table(wd=0.1, optimizer_name="muon", comment="x"))
    assert found.rows["excluded"].isna().all()
    assert set(found.rows["batch_tokens"]) == {128 * 2048}
    assert found.guessed == {
        "loss": "val_loss",
        "learning_rate": "lr",
        "batch_sequences": "bs",
        "sequence_length": "seq_len",
        "tokens": "train_tokens",
        "params_active_non_embedding": "n_params",
        "recipe.optimizer": "optimizer_name",
        "recipe.weight_decay": "wd",
    }
    assert found.ignored == ("comment",)
    assert json.loads(found.rows["recipe"][0]) == {"optimizer": "muon", "weight_decay": 0.1}


def test_what_is_told_goes_before_what_is_guessed() -> None:
    found = read(table(smooth=2.5, D=1e9), loss="smooth", tokens="D")
    assert set(found.rows["loss"]) == {2.5}
    assert set(found.rows["tokens"]) == {1e9}
    assert not {"loss", "tokens"} & set(found.guessed)
    own = read(table(loss=2.7))  # a column that bears our name
    assert set(own.rows["loss"]) == {2.7}
    assert "val_loss" in own.ignored


def test_a_batch_size_in_tokens_is_seen_to_be() -> None:
    found = read(table(bs=262144))
    assert found.guessed["batch_tokens"] == "bs"
    assert set(found.rows["batch_tokens"]) == {262144}


def test_tokens_follow_from_steps_and_batch() -> None:
    found = read(table(max_steps=1000).drop(columns="train_tokens"))
    assert set(found.rows["tokens"]) == {1000 * 128 * 2048}
    assert "tokens are steps x batch" in found.notes


def test_batches_in_sequences_of_no_known_length_are_told_of() -> None:
    found = read(table().drop(columns="seq_len"))
    assert found.rows["batch_tokens"].isna().all()
    assert any("their length is not told" in note for note in found.notes)
    found = read(table().drop(columns="seq_len"), sequence_length="=2048")
    assert set(found.rows["batch_tokens"]) == {128 * 2048}


def test_numbers_are_read_as_people_write_them() -> None:
    found = read(table(n_params="100M", train_tokens="2B"))
    assert set(found.rows["params_active_non_embedding"]) == {1e8}
    assert set(found.rows["tokens"]) == {2e9}


def test_a_malformed_column_is_refused_with_its_line() -> None:
    rates: list[object] = ["fast", "slow", 1e-3, "slow", "slow", "slow"]
    with pytest.raises(UserError) as error:
        read(table(lr=rates), learning_rate="lr")
    assert str(error.value) == (
        "line 2 of sweep.csv: lr 'fast' is no number, as learning_rate must be (in 5 rows it is "
        "none)"
    )
    rates = [1e-3, 2e-3, "fast", 1e-3, 3e-3, 1e-3]
    found = read(table(lr=rates))
    assert found.rows["excluded"].notna().tolist() == [k == 2 for k in range(6)]
    assert "line 4 of sweep.csv: lr 'fast' is no number" in found.notes


def test_json_lines_and_frames(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    rows = table().rename(columns={"lr": "optimizer"}).to_dict("records")
    lines = [json.dumps({**row, "optimizer": {"lr": row["optimizer"]}}) for row in rows]
    path.write_text("\n".join(lines))
    found = read_source("jsonl", path)
    assert found.guessed["learning_rate"] == "optimizer.lr"
    assert list(found.rows["learning_rate"]) == pytest.approx(list(table()["lr"]))
    path.write_text('{"val_loss": 3}\n{"val_loss": ')
    with pytest.raises(UserError, match="cannot be read as a table: line 2: "):
        read_source("jsonl", path)
    import raysweep

    store = raysweep.import_results(table(), tmp_path / "results", study="mine")
    assert isinstance(store, Results)
    assert set(store.to_pandas()["study"]) == {"mine"}


DENSE = {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_ff": 2048, "vocab_size": 50257}
MOE = {**DENSE, "num_experts": 8, "top_k": 2, "moe_intermediate_size": 1024}


@pytest.mark.parametrize("shape", [DENSE, MOE])
def test_a_missing_count_comes_from_the_shape(shape: dict[str, int]) -> None:
    found = read(table(**shape).drop(columns="n_params"))
    moe = "num_experts" in shape
    true = count(
        ModelShape(
            d_model=768, layers=12, heads=12, kv_heads=12, d_ff=2048, vocab_size=50257,
            sequence_length=2048, qk_norm=False, experts=8 if moe else 1, top_k=2 if moe else 1,
            expert_ff=1024 if moe else 0, moe_layers=tuple(range(12)) if moe else (),
        )
    )  # fmt: skip
    row = found.rows.iloc[0]
    for name in ("params_active_non_embedding", "params_total", "params_active", "flops_per_token"):
        assert row[name] == getattr(true, name), name
    assert found.rows["excluded"].isna().all()
    said = "N of 6 rows is counted from the shape (feed-forwards with a gate, as in SwiGLU)"
    assert said in found.notes


def test_a_count_that_holds_embeddings_is_told_of() -> None:
    found = read(table(**DENSE, n_params=162e6))
    assert set(found.rows["params_active_non_embedding"]) == {162e6}  # as given
    assert any("1.91 times what the shape counts without embeddings" in n for n in found.notes)


def spread(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    size = rng.choice([3e7, 1e8, 3e8, 1e9], n)
    tokens = size * rng.choice([20, 40], n)
    loss = 1.7 + 420 / size**0.34 + 1700 / tokens**0.36
    return table(n, n_params=size, train_tokens=tokens, val_loss=loss * rng.uniform(1, 1.05, n))


def test_rows_off_the_trend_are_named_and_those_far_below_kept_out() -> None:
    frame = spread()
    frame["val_loss"] *= frame.index.map({7: 0.7, 9: 1.6}).fillna(1.0)
    frame.loc[9, "lr"] = frame["lr"].min() / 2  # no case of a learning rate too high
    found = read(frame)
    assert list(found.rows.index[found.rows["excluded"].notna()]) == [7]
    below, above = (n for n in found.notes if n.startswith("suspects"))
    assert "1 row far below" in below
    assert "line 9 (loss" in below
    assert "1 row far above" in above
    assert "line 11 (loss" in above
    assert not [n for n in read(spread()).notes if n.startswith("suspects")]


def test_a_run_below_what_hyperparameters_can_reach_is_a_suspect() -> None:
    """A halved loss of a bad setting lies near the others, but below the best of them."""
    frame = spread()
    frame["val_loss"] = frame["val_loss"].where(frame.index != 7, 0.8 * frame["val_loss"])
    found = read(frame)
    assert list(found.rows.index[found.rows["excluded"].notna()]) == [7]


def test_runs_cut_short_by_their_steps_and_batch_are_kept_out() -> None:
    steps = np.full(60, 2e9 / (128 * 2048))
    steps[:3] *= 0.5
    found = read(spread().assign(train_tokens=2e9, n_params=1e8, max_steps=steps))
    assert list(found.rows.index[found.rows["excluded"].notna()]) == [0, 1, 2]
    assert found.rows["excluded"][0] == "cut short: steps x batch is below 98% of tokens"


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("optimzer == 'muon'", r"name 'optimzer' is not defined \(near: optimizer"),
        ("optimizer = 'muon'", "no condition"),
        ("loss", "no condition"),
        ("loss >", "compare columns"),
        ("loss > 99", "it holds for none of the 6 rows"),
        ("@table", "compare columns"),
        ("loss.__class__", "compare columns"),
    ],
)
def test_a_bad_condition_is_one_line(condition: str, message: str) -> None:
    rows = read(table(optimizer=["muon", "adamw"] * 3)).rows
    with pytest.raises(UserError, match=message) as error:
        rows_where(rows, condition)
    assert "\n" not in str(error.value)


def test_conditions_read_columns_and_recipes() -> None:
    rows = read(table(optimizer=["muon", "adamw"] * 3, wd=[0.1, None] * 3)).rows
    assert len(rows_where(rows, "optimizer == 'muon' and loss < 3.05")) == 2
    assert len(rows_where(rows, "weight_decay > 0")) == 3
    assert list(rows_where(rows, "optimizer == 'adamw'").columns) == list(rows.columns)


def test_a_column_that_is_there_twice_is_refused() -> None:
    frame = pd.concat([table(), table()[["lr"]]], axis=1)
    with pytest.raises(UserError, match="has the column 'lr' twice: rename or drop one"):
        read(frame)


NANOGPT = {
    "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024, "batch_size": 12,
    "gradient_accumulation_steps": 40, "max_iters": 2000,
    "learning_rate": np.geomspace(1e-3, 2e-3, 6), "val/loss": np.linspace(3.0, 3.1, 6),
}  # fmt: skip


def test_accumulated_batches_are_whole() -> None:
    found = read(pd.DataFrame(NANOGPT))
    assert set(found.rows["batch_tokens"]) == {12 * 40 * 1024}
    assert set(found.rows["tokens"]) == {2000 * 12 * 40 * 1024}
    assert set(found.rows["accumulation"]) == {40}
    (note,) = (n for n in found.notes if "gradient_accumulation_steps" in n)
    assert note == (
        "the batch is batch_size x gradient_accumulation_steps (12 x 40 sequences, say): "
        "where batch_size is the global batch, --map batch_sequences=batch_size"
    )
    told = read(pd.DataFrame(NANOGPT), batch_sequences="batch_size")
    assert set(told.rows["batch_tokens"]) == {12 * 1024}
    assert not [n for n in told.notes if "gradient_accumulation_steps" in n]
    some = pd.DataFrame({**NANOGPT, "gradient_accumulation_steps": [40, 1, np.nan, 40, np.inf, 20]})
    assert list(read(some).rows["batch_sequences"]) == [480, 12, 12, 480, 12, 240]
    zeros = pd.DataFrame({**NANOGPT, "batch_size": [0, -1, 12, 12, 12, 12], "num_tokens": 0})
    assert read(zeros).rows["excluded"].notna().all()
    tokens = pd.DataFrame({**NANOGPT, "batch_size": 12288})
    assert set(read(tokens).rows["batch_tokens"]) == {12288 * 40}


@pytest.mark.parametrize(
    "columns",
    [
        {"global_batch_size": 480},
        {"batch_size": 480, "num_tokens": 480 * 1024 * 2000},
        {"batch_size": 480, "micro_batch_size": 6},
        {"batch_size": 480, "train_micro_batch_size_per_gpu": 12},
        {"batch_size": 480, "batch_tokens": 480 * 1024},
        {"batch_size": 480, "gradient_accumulation_steps": 1},
    ],
)
def test_global_batches_are_not_multiplied(columns: dict[str, Any]) -> None:
    found = read(pd.DataFrame({**NANOGPT, **columns}))
    assert set(found.rows["batch_tokens"]) == {480 * 1024}
    assert set(found.rows["tokens"]) == {2000 * 480 * 1024}
    assert not [n for n in found.notes if "the batch is" in n]


def test_steps_and_tokens_tell_a_batch_of_one_pass() -> None:
    found = read(pd.DataFrame({**NANOGPT, "num_tokens": 480 * 1024 * 2000}))
    assert set(found.rows["batch_tokens"]) == {480 * 1024}
    assert found.rows["excluded"].isna().all()


@pytest.mark.parametrize(
    ("name", "value", "ours", "kept"),
    [
        ("dataset", 1, "data_hash", "1"),
        ("dataset", [1, 2, 1, 2, 1, None], "data_hash", "1"),
        ("scale", [1, 2, 1, 2, 1, 2], "scale", "1"),
        ("cell", range(6), "cell", "0"),
        ("study", 7, "study", "7"),
        ("architecture", 3, "architecture", "3"),
        ("metrics", 3, "metrics", "3"),
        ("metrics", [{"a": 1}] * 6, "metrics", '{"a": 1}'),
        ("reason", 1.5, "reason", "1.5"),
        ("device", True, "device", "True"),
        ("seed", np.uint64(17446744073709551615), "seed", None),
        ("seed", [1.74e19, 1, 2, 3, 4, 5], "seed", None),
        ("seed", 1234, "seed", 1234),
        ("seed", "a", "seed", None),
        ("mfu", "45%", "mfu", None),
        ("seconds_wall", "1:20:00", "seconds_wall", None),
        ("gpu_hours", "3h", "gpu_hours", None),
    ],
)
def test_columns_that_no_fit_needs_do_no_harm(
    name: str, value: Any, ours: str, kept: object, tmp_path: Path
) -> None:
    import raysweep

    frame = table().assign(**{name: value})
    found = read(frame)
    assert found.rows["excluded"].isna().all()
    first = found.rows[ours].iloc[0]
    assert pd.isna(first) if kept is None else first == kept
    unread = [n for n in found.notes if n.startswith(f"line 2 of sweep.csv: {name} ")]
    assert bool(unread) == isinstance(value, str)
    store = raysweep.import_results(frame, tmp_path / "results")
    assert len(store.to_pandas()) == len(frame)


def test_a_column_that_is_told_must_hold_numbers() -> None:
    with pytest.raises(UserError, match=r"sweep.csv: used '45%' is no number, as mfu must be"):
        read(table(used="45%"), mfu="used")


def test_a_told_total_counts_the_experts() -> None:
    """Less the embeddings, where they are told, and before what the shape counts."""
    frame = table(n_experts=8, top_k=2, active_params=1e8, total_params=1.75e8)
    frame = frame.drop(columns="n_params")
    assert set(read(frame).rows["params_total_non_embedding"]) == {1.75e8}
    found = read(frame.assign(params_active=1.2e8))
    assert set(found.rows["params_total_non_embedding"]) == {1.55e8}
    found = read(frame.assign(total_params_non_embedding=1.5e8))
    assert set(found.rows["params_total_non_embedding"]) == {1.5e8}
    found = read(frame.assign(**MOE, total_params=600e6).drop(columns="active_params"))
    assert set(found.rows["params_total_non_embedding"]) == {600e6 - 2 * 768 * 50257}
    for other in (frame.assign(total_params=0.5e8), frame.assign(n_experts=1, top_k=1)):
        assert read(other).rows["params_total_non_embedding"].isna().all()


def test_flops_that_are_told_cost_each_token() -> None:
    found = read(table(flops=10 * 1e8 * 2e9))
    assert set(found.rows["flops_per_token"]) == {10 * 1e8}
    found = read(table(flops=10 * 1e8 * 1.99e9, tokens_seen=1.99e9))
    assert set(found.rows["flops_per_token"]) == {10 * 1e8}
    shaped = table(**DENSE).drop(columns="n_params")
    counted = float(read(shaped).rows["flops_per_token"].iloc[0])
    found = read(shaped.assign(flops=1.2 * counted * 2e9))
    assert found.rows["flops_per_token"].to_numpy() == pytest.approx(1.2 * counted)
    found = read(table(flops=50 * 1e8 * 2e9))  # 8 times 6 N D: in doubt
    assert found.rows["flops_per_token"].isna().all()


def test_what_rows_with_experts_leave_open_is_told() -> None:
    frame = table(n_experts=[1, 1, 8, 8, 8, 8], top_k=[None, None, 2, 2, 2, 2])
    active = (
        "n_params is read as active parameters in 4 rows with experts: where it counts all "
        "experts, --map params_total=n_params,params_active_non_embedding=COLUMN of active ones"
    )
    assert read(frame).notes == (active,)
    assert read(frame.drop(columns="top_k")).notes == (
        "top_k is not told in 4 rows with experts: one expert a token is assumed "
        "(--map top_k==2, say)",
        active,
    )
    for told in (
        frame.assign(n_experts=1),
        frame.assign(total_params=3e8),
        frame.rename(columns={"n_params": "active_params"}),
    ):
        assert not read(told).notes
    assert not read(frame, params_active_non_embedding="n_params").notes
    (note,) = read(frame.assign(d_model=768, n_layers=12), experts="n_experts").notes
    assert note.endswith("--map params_total=n_params and N is counted from the shape")


@pytest.mark.parametrize("matrices", [2, 3])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_n_tells_whether_feed_forwards_have_a_gate(activation: str | None, matrices: int) -> None:
    d, layers = 768, 12
    shape = {"n_layers": layers, "d_model": d, "d_ff": 4 * d, "vocab_size": 50257}
    n = layers * (4 + 4 * matrices) * d**2
    found = read(table(**shape, activation=activation, n_params=n))
    assert set(found.rows["params_active_non_embedding"]) == {n}
    total = found.rows["params_total"].iloc[0]
    assert total == pytest.approx(n + 2 * d * 50257, rel=1e-3)
    assert not [n for n in found.notes if "the shape" in n]


def test_a_shape_that_n_contradicts_counts_nothing_else() -> None:
    found = read(table(**DENSE, n_params=30e6))
    (note,) = (n for n in found.notes if "the shape" in n)
    assert note == (
        "params_active_non_embedding is 0.35 times what the shape counts without embeddings (in 6 "
        "rows), so nothing else is counted from it; leave it out to count the shape"
    )
    for name in ("params_total", "params_active", "flops_per_token", "params_dense"):
        assert found.rows[name].isna().all(), name


def test_an_n_of_all_experts_is_seen_from_the_shape() -> None:
    counted = read(table(**MOE).drop(columns="n_params")).rows.iloc[0]
    assert not read(table(**MOE, n_params=counted["params_active_non_embedding"])).notes
    for total in ("params_total", "params_total_non_embedding"):
        (note,) = read(table(**MOE, n_params=counted[total])).notes
        assert note.endswith("map it to params_total; leave it out to count the shape")
    found = read(table(**MOE, n_params=counted["params_total"]), params_total="n_params")
    assert set(found.rows["params_active_non_embedding"]) == {
        counted["params_active_non_embedding"]
    }
    assert found.rows["excluded"].isna().all()


def test_the_few_tuned_runs_among_untuned_ones_count() -> None:
    """All others, at a thirtieth of their learning rate, make a trend that is too high."""
    rng = np.random.default_rng(0)
    size = np.repeat([2e7, 6e7, 2e8], 25)
    tuned = np.arange(75) % 25 == 24
    loss = (1.8 + 482 / size**0.348 + 2085 / 2e9**0.366) * np.where(tuned, 1, 1.15)
    loss *= np.exp(0.001 * rng.standard_normal(75))
    rate = 1e-3 * (size / 2e8) ** -0.3 * np.where(tuned, 1, rng.uniform(1 / 40, 1 / 30, 75))
    frame = table(75, n_params=size, val_loss=loss, lr=rate)
    found = read(frame)
    assert found.rows["excluded"].isna().all()
    (note,) = (n for n in found.notes if n.startswith("suspects"))
    assert "3 rows far below" in note
    assert "at learning rates far from the others', still counted" in note
    assert "line 26 (loss" in note
    frame["lr"] = rate * np.where(tuned, 1 / 30, 1)
    assert read(frame).rows["excluded"].notna().tolist() == tuned.tolist()
