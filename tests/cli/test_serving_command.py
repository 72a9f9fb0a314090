"""`raysweep serving`: a table and JSON from results, and one-line errors."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from raysweep.cli import app
from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.results.importers import import_file
from raysweep.scaling.loss.laws import LOSS_LAWS

BUDGET = ["--flops", "1e21", "--gpu", "h100", "--dollars", "2.5"]


def sweep(folder: Path, experts: Sequence[int]) -> str:
    """Results whose losses follow the published joint law, a cell a row."""
    law, rows = LOSS_LAWS["joint_moe"], []
    for e in experts:
        for params in (1e8, 3e8, 1e9, 3e9):
            for per_param in (5, 20, 80):
                rows.append((e, min(e, 2), params, params * per_param))
    frame = pd.DataFrame(rows, columns=["experts", "top_k", "params_active", "tokens"])
    frame["loss"] = law.predict(
        law.published,
        {"params": frame["params_active"], "tokens": frame["tokens"], "experts": frame["experts"]},
    )
    frame["params_active_non_embedding"] = 0.9 * frame["params_active"]
    frame["architecture"] = np.where(frame["experts"] > 1, "moe", "dense") + frame[
        "experts"
    ].astype(str)
    frame.to_csv(folder / "sweep.csv", index=False)
    uri = str(folder / "results")
    Results.open(uri, create=True).write_many(import_file("csv", folder / "sweep.csv"))
    return uri


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sweep(tmp_path_factory.mktemp("serving"), (1, 16))


@pytest.mark.slow
def test_json_holds_assumptions_and_solutions(results: str) -> None:
    limits = ["--gpus", "1,2", "--max-sequences", "64", "--law", "joint_moe"]
    budgets = ["--flops", "1e21,4e21", "--gpu", "h100", "--dollars", "2.5"]
    out = CliRunner().invoke(app, ["serving", results, *budgets, *limits, "--json"])
    assert out.exit_code == 0, out.output
    told = json.loads(out.stdout)
    assert (told["law"], told["count"], told["reference"]) == (
        "joint_moe",
        "params_active",
        "moe16",
    )
    assert told["assume"]["gpu"]["name"] == "h100"
    assert (told["assume"]["gpus"], told["assume"]["max_sequences"]) == ([1, 2], 64)
    for budget in (1e21, 4e21):
        own = [s for s in told["solutions"] if s["budget"] == budget]
        losses = {s["name"]: s["loss"] for s in own if s["kind"] == "loss-optimal"}
        assert losses["dense1"] > losses["moe16"]
        same = next(s for s in own if s["kind"] == "same quality")
        assert same["loss"] == pytest.approx(losses["moe16"], rel=1e-6)
        assert same["training_share"] > 1


@pytest.mark.slow
def test_the_studys_section_is_the_default(results: str) -> None:
    said = "study: sweep\nserving: {gpu: a100-40gb, budgets: [1e21], reference: dense1}\n"
    Results.open(results).save_search_space("sweep", said)
    out = CliRunner().invoke(app, ["serving", results])
    assert out.exit_code == 0, out.output
    assert "reference dense1" in out.output
    assert "a100-40gb at $1 an hour" in out.output
    assert "training FLOPs" in out.output
    more = CliRunner().invoke(app, ["serving", results, "--experts", "16,64", "--reference", "16"])
    assert "not trained" in more.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--gpu", "h900"], "choose from"),
        (["--experts", "2,four"], "give numbers"),
        (["--flops", "-1"], "flops"),
        (["--dollars", "0"], "dollars_per_hour"),
        (["--profile", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_misuse_is_one_line(results: str, change: list[str], words: str) -> None:
    found = CliRunner().invoke(app, ["serving", results, *BUDGET, *change])
    assert isinstance(found.exception, UserError)
    assert words in str(found.exception)


def test_one_number_of_experts_cannot_be_weighed(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["serving", sweep(tmp_path, (1,)), *BUDGET])
    assert isinstance(found.exception, UserError)
    assert "one number of experts" in str(found.exception)
