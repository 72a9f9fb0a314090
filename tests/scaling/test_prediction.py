"""Losses predicted for given configurations, and further columns, on a planted log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks.imports import DECAY, PlantedLog, plant_log
from raysweep.cli import app
from raysweep.errors import UserError
from raysweep.results.importers import read_rows
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits

SMALLER = "params_active_non_embedding < 4e8"


@pytest.fixture(scope="module")
def log() -> PlantedLog:
    return plant_log(2, groups=2, sizes=4, horizons=2, trials=12)


@pytest.fixture(scope="module")
def rows(log: PlantedLog) -> pd.DataFrame:
    return read_rows(log.table, {}, "log", "log").rows


@pytest.fixture(scope="module")
def fits(rows: pd.DataFrame) -> Fits:
    return fit(rows, group="optimizer", where=SMALLER, also=["weight_decay"])


def test_runs_held_out_are_predicted(fits: Fits, rows: pd.DataFrame) -> None:
    score = fits.score(rows[rows["params_active_non_embedding"] > 4e8])
    assert score.fitted == 0
    assert score.overall.median < 0.01
    assert score.overall.rank_correlation > 0.97
    assert score.overall.coverage > 0.8
    assert {g.group for g in score.groups} == {"dense, adamw", "dense, muon"}
    assert sum(g.n for g in score.groups) == score.overall.n == len(score.runs)
    assert sum(g.covered for g in score.groups) == score.overall.covered
    off = (score.runs["loss"] - score.runs["known"]).abs()
    assert score.overall.mae == pytest.approx(off.mean())
    assert json.loads(json.dumps(score.to_dict()))["overall"]["n"] == score.overall.n


def test_each_column_of_a_score_stands_under_its_name(fits: Fits, rows: pd.DataFrame) -> None:
    score = fits.score(rows[rows["params_active_non_embedding"] > 4e8])
    head, *lines = str(score).splitlines()[-4:]
    of = max(len(g.group) for g in score.groups)
    for line, one in zip(lines, (*score.groups, score.overall), strict=True):
        told = {
            "runs": f"{one.n}",
            "MAE": f"{one.mae:.4f}",
            "median": f"{one.median:.4f}",
            "bias": f"{one.bias:+.4f}",
            "rank corr.": f"{one.rank_correlation:.3f}",
        }
        for name, value in told.items():  # to the right, under the name
            end = head.index(name, of) + len(name)
            assert line[:end].split("  ")[-1].strip() == value


def test_a_score_on_fitted_rows_says_so(fits: Fits, rows: pd.DataFrame) -> None:
    score = fits.score(rows)
    assert score.fitted > score.overall.n / 2
    assert "are among the rows that were fitted" in str(score)


def test_configurations_keep_their_order_and_say_why_not(fits: Fits, log: PlantedLog) -> None:
    table = pd.DataFrame(
        {
            "n_params": [1e9, 1e9, 1e9, 1e9, None],
            "train_tokens": 2e10,
            "lr": [1e-3, None, 1e-3, 1e-3, 1e-3],
            "batch_tokens": [5e5, None, None, 5e5, 5e5],
            "optimizer": ["adamw", "muon", "muon", "sgd", "adamw"],
        }
    )
    found = fits.predict_runs(table)
    assert list(found["why"]) == [
        "",
        "",
        "only one of learning rate and batch is told",
        "no group 'sgd' in the results; known: muon, adamw",
        "its size is not told: N and D",
    ]
    pairs = {"lr": [-1, 0, 1e-3, -1], "batch_tokens": [5e5, None, 0, -1]}
    told = fits.predict_runs(table.iloc[[0] * 4].assign(**pairs))
    assert list(told["why"]) == [
        "its learning_rate is not a number above zero",
        "its learning_rate is not a number above zero",
        "its batch_tokens is not a number above zero",
        "its batch_tokens is not a number above zero",
    ]
    assert told["loss"].isna().all()
    one = fits.predict(1e-3, 5e5, 1e9, 2e10, group="adamw")
    assert found["loss"][0] == pytest.approx(one["loss"][0], rel=1e-3)
    best = fits.recommend(params=1e9, tokens=2e10, group="muon")
    assert found["loss"][1] == pytest.approx(best.loss)
    assert found["loss"][2:].isna().all()


def test_a_further_column_is_found_and_taken_off(fits: Fits, log: PlantedLog) -> None:
    assert fits.adjusted is not None
    (effect,) = fits.adjusted.effects
    assert effect.at == pytest.approx(0.1)
    above = effect.offset(pd.Series([0.0333, 0.1, 0.3]))
    true = DECAY * np.log([0.333, 1, 3]) ** 2
    assert above == pytest.approx(true, abs=0.25 * true.max())
    assert 0.1 < fits.adjusted.share < 0.9
    said = next(c for c in fits.choices if "weight_decay" in c)
    assert "adjusted for weight_decay, and told at 0.1, the best value tried; it explains" in said
    assert said in fits.summary()
    table = log.table[:1].assign(weight_decay=[0.3])
    worse = (
        fits.predict_runs(table)["loss"][0]
        / fits.predict_runs(table.assign(weight_decay=0.1))["loss"][0]
    )
    assert np.log(worse) == pytest.approx(true[2], rel=0.25)


@pytest.mark.slow
def test_a_column_without_effect_explains_nothing(rows: pd.DataFrame) -> None:
    rng = np.random.default_rng(1)
    frame = rows.assign(dice=rng.integers(1, 7, len(rows)), one=3.0)
    found = fit(frame, group="optimizer", also="dice")
    assert found.adjusted is not None
    assert found.adjusted.share < 0.05
    with pytest.raises(UserError, match="--also one: it has one value in each cell"):
        fit(frame, group="optimizer", also="one")
    with pytest.raises(UserError, match=r"--also: the results table lacks the column 'dise'"):
        fit(frame, also="dise")


def test_published_laws_are_said_to_be_of_adam(fits: Fits) -> None:
    assert any("are of Adam and its kin: no guide to muon (but for " in m for m in fits.messages)


@pytest.mark.slow
def test_from_files_at_the_command_line(log: PlantedLog, tmp_path: Path) -> None:
    small, large = tmp_path / "small.csv", tmp_path / "large.csv"
    log.table[log.table["n_params"] < 4e8].to_csv(small, index=False)
    log.table[log.table["n_params"] > 4e8].to_csv(large, index=False)
    folder = str(tmp_path / "results")

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, list(words), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    said = run("import", "csv", str(small), "--results", folder)
    assert "columns ignored: gpu, node, comment" in said
    assert "cut short" in said
    assert "guessed by their names (--map changes it): loss=val_loss" in said
    assert f"next: raysweep fit {folder} --group optimizer" in said
    found = json.loads(run("score", folder, str(large), "--group", "optimizer", "--json"))
    assert found["overall"]["rank_correlation"] > 0.9
    said = run("score", folder, str(large), "--of", "optimizer == 'muon'", "--group", "optimizer")
    assert int(said.split()[0]) == found["groups"][-1]["n"]
    assert "inside 95 %" in said
    rows = json.loads(run("predict", folder, str(large), "--group", "optimizer", "--json"))
    assert len(rows) == (log.table["n_params"] > 4e8).sum()
    assert all(r["low"] < r["loss"] < r["high"] for r in rows if not r["why"])
    muon = ("--where", "optimizer == 'muon'")
    said = run("recommend", folder, "--params", "1B", "--tokens", "20B", *muon)
    assert said.startswith("only rows where optimizer == 'muon': ")


def _several(make: Callable[..., pd.DataFrame], column: str, **factors: float) -> pd.DataFrame:
    """Runs of one planted law under several names in a column, the loss times a factor of each."""
    parts = []
    for k, (name, factor) in enumerate(factors.items()):
        rows = make(scales=(1e7, 3e7), tokens_per_param=(20, 60), per_cell=8, seed=k)
        parts.append(rows.assign(**{column: name}, loss=factor * rows["loss"], cell=None))
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(trial_key=[f"{i}" for i in range(len(rows))], data_hash=None)


@pytest.mark.slow
def test_each_set_of_data_is_predicted_from_its_own(
    planted_study: Callable[..., pd.DataFrame],
) -> None:
    rows = _several(planted_study, "study", a=1.0, b=0.75)
    held = rows.index % 4 == 0
    fits = fit(rows[~held])
    assert fits.architectures == ["dense (a)", "dense (b)"]
    score = fits.score(rows[held])
    assert set(score.runs["architecture"]) == {"dense (a)", "dense (b)"}
    assert score.overall.n == held.sum()
    assert score.overall.mae < 0.03
    alone = fits.score(rows[held & (rows["study"] == "b")])
    assert set(alone.runs["architecture"]) == {"dense (b)"}
    assert alone.overall.mae < 0.03
    found = fits.predict_runs(rows[held].assign(study="c"))
    assert set(found["why"]) == {
        "architecture 'dense' is not among those fitted: dense (a), dense (b)"
    }
    assert found["loss"].isna().all()
    with pytest.raises(UserError, match="no run can be scored: architecture 'dense' is not among"):
        fits.score(rows[held].assign(study="c"))


def test_an_unknown_architecture_is_not_answered_for_by_another(
    planted_study: Callable[..., pd.DataFrame],
) -> None:
    rows = _several(planted_study, "architecture", llama=1.0, mamba=1.1)
    fits = fit(rows)
    new = rows[rows["architecture"] == "mamba"][:3].assign(architecture=["Mamba", "mamba", "rwkv"])
    found = fits.predict_runs(new)
    assert list(found["architecture"]) == ["mamba", "mamba", "rwkv"]
    for k in range(2):
        asked = new[["learning_rate", "batch_tokens", "params_active_non_embedding", "tokens"]]
        one = fits.predict(*asked.iloc[k], architecture="mamba")
        assert found["loss"][k] == pytest.approx(one["loss"][0])
    assert list(found["why"]) == [
        "",
        "",
        "architecture 'rwkv' is not among those fitted: llama, mamba",
    ]
    alone = fit(rows[rows["architecture"] == "llama"]).predict_runs(new)
    assert set(alone["architecture"]) == {"llama"}  # the only dense one
