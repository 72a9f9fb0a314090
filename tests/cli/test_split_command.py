"""`raysweep split`: budgets split in words and in JSON, and no number where none is determined."""

import json

import numpy as np
import pandas as pd
import pytest

from raysweep.cli import main
from raysweep.results import Results
from raysweep.results.importers import import_file
from raysweep.scaling.loss.laws import LOSS_LAWS

CHINCHILLA = LOSS_LAWS["chinchilla"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> str:
    """Five held budgets of Chinchilla's law, and an experiment of one size beside it."""
    folder = tmp_path_factory.mktemp("split")
    flops = np.repeat(1e18 * 3.0 ** np.arange(5), 7)
    params = 0.09 * np.sqrt(flops) * np.tile(np.geomspace(0.25, 4, 7), 5)
    table = pd.DataFrame({"params": params, "tokens": flops / (6 * params), "budget": flops})
    table["loss"] = CHINCHILLA.predict(CHINCHILLA.published, dict(table[["params", "tokens"]]))
    table["loss"] *= np.exp(np.random.default_rng(0).normal(0, 0.001, len(table)))
    table["experiment"] = "held"
    one = table.iloc[:4].assign(params=1e8, tokens=[1e9, 2e9, 4e9, 8e9], experiment="one size")
    one["budget"] = 6e8 * one["tokens"]
    pd.concat([table, one]).to_csv(folder / "runs.csv", index=False)
    store = Results.open(str(folder / "results"), create=True)
    store.write_many(import_file("isoflop", folder / "runs.csv", None))
    return str(folder / "results")


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    monkeypatch.setattr("sys.argv", ["raysweep", "split", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr()
    return out.out if not stop.value.code else out.out + out.err + str(stop.value.code)


def test_json_holds_the_planted_split(
    results: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.loads(run(capsys, monkeypatch, results, "--flops", "1e19,1e20", "--json"))
    c = CHINCHILLA.published
    ratio = (c["a"] * c["A"] / (c["b"] * c["B"])) ** (1 / (c["a"] + c["b"]))
    for split, flops in zip(told["held"], (1e19, 1e20), strict=True):
        truth = ratio * (flops / 6) ** (c["b"] / (c["a"] + c["b"]))
        low, high = split["intervals"]["params"]
        assert low < truth < high < 2 * low
        assert split["count"] == "params_total"
    for split in told["one size"]:
        assert split["status"] == "not determined"
        assert split["params"] is None


@pytest.mark.slow
def test_text_says_which_parameters_and_what_is_missing(
    results: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run(capsys, monkeypatch, results, "--flops", "1e19")
    assert "held: N is all parameters" in text
    assert "N ~ C^" in text
    assert "not determined" in text
    assert "nan" not in text
    wrong = run(capsys, monkeypatch, results, "--flops", "1e19;1e20")
    assert "--flops 1e19;1e20: give numbers" in wrong
    assert "positive number of FLOPs" in run(capsys, monkeypatch, results, "--flops", "0")
