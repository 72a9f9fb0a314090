"""The Python API as a user would try it: some forty natural calls, each with what it means."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import raysweep
from raysweep.scaling.fits import Fits

REPO = Path(__file__).resolve().parents[1]
LAPTOP = REPO / "reports/examples/laptop/results"
SMOKE = REPO / "search_spaces/smoke.yaml"


@pytest.fixture(scope="module")
def fits() -> Fits:
    return raysweep.fit(LAPTOP)


def _frame(value: object, rows: int) -> bool:
    return isinstance(value, pd.DataFrame) and len(value) == rows


CALLS: dict[str, tuple[Callable[[Fits], Any], Callable[[Any], bool]]] = {
    "load": (lambda f: raysweep.Study.load(SMOKE), lambda s: s.name == "smoke"),
    "load text": (lambda f: raysweep.Study.load(str(SMOKE)), lambda s: len(s.cells) == 4),
    "load, set": (
        lambda f: raysweep.Study.load(SMOKE, set={"search.trials_per_cell": 5}),
        lambda s: s.space.search.trials_per_cell == 5,
    ),
    "load, set as typed": (
        lambda f: raysweep.Study.load(SMOKE, set=["search.trials_per_cell=5"]),
        lambda s: s.space.search.trials_per_cell == 5,
    ),
    "study": (lambda f: repr(raysweep.Study.load(SMOKE)), lambda s: "smoke: 4 cells of" in s),
    "plan": (lambda f: raysweep.Study.load(SMOKE).plan(), lambda p: p.trials == 8),
    "plan as text": (lambda f: str(raysweep.Study.load(SMOKE).plan()), lambda s: "8 trials" in s),
    "plan, repr": (lambda f: repr(raysweep.Study.load(SMOKE).plan()), lambda s: "GPU-hours" in s),
    "open": (lambda f: raysweep.Results.open(LAPTOP), lambda r: "72 trials of laptop" in repr(r)),
    "open text": (lambda f: len(raysweep.Results.open(str(LAPTOP))), lambda n: n == 72),
    "to_pandas": (lambda f: raysweep.Results.open(LAPTOP).to_pandas(), lambda t: _frame(t, 72)),
    "best": (lambda f: raysweep.Results.open(LAPTOP).best(), lambda t: _frame(t, 12)),
    "curves": (lambda f: raysweep.Results.open(LAPTOP).curves(), lambda t: len(t) > 100),
    "fit path": (lambda f: f, lambda f: "12 cells of dense, moe" in repr(f)),
    "fit results": (
        lambda f: (
            raysweep.fit(raysweep.Results.open(LAPTOP)).cells["loss"].tolist()
            == f.cells["loss"].tolist()
        ),
        bool,
    ),
    "fit table": (
        lambda f: raysweep.fit(raysweep.Results.open(LAPTOP).to_pandas(), without=["kaplan"]),
        lambda f: "kaplan" not in f.prior.laws,
    ),
    "fits as text": (lambda f: str(f), lambda s: "learning rate = " in s and "Held out" in s),
    "cells": (lambda f: f.cells, lambda t: _frame(t, 12)),
    "architectures": (lambda f: f.architectures, lambda n: n == ["dense", "moe"]),
    "recommend": (
        lambda f: f.recommend(params="1M", tokens="20M"),
        lambda r: 0 < r.learning_rate < 1 and r.architecture == "dense",
    ),
    "recommend numbers": (
        lambda f: (
            f.recommend("dense", params=1e6, tokens=2e7).learning_rate
            == f.recommend(params="1M", tokens="20M").learning_rate
        ),
        bool,
    ),
    "recommend in order": (
        lambda f: f.recommend("moe", "1M", "20M"),
        lambda r: (r.experts, r.top_k) == (8, 2),
    ),
    "recommend by kind": (
        lambda f: f.recommend(params="1M", tokens="20M", experts=8),
        lambda r: r.architecture == "moe",
    ),
    "recommend, within": (
        lambda f: (
            f.recommend(params="1M", tokens="20M", within="1%").largest_batch
            > f.recommend(params="1M", tokens="20M", within="0.5%").largest_batch
        ),
        bool,
    ),
    "recommend many": (
        lambda f: f.recommend(params=["1M", "2M"], tokens=["20M", "40M"]),
        lambda t: _frame(t, 2) and {"learning_rate", "loss_low"} <= set(t.columns),
    ),
    "recommend array": (
        lambda f: f.recommend(params=np.array([1e6, 2e6, 4e6]), tokens="20M"),
        lambda t: _frame(t, 3),
    ),
    "recommendation as text": (
        lambda f: str(f.recommend(params="1M", tokens="20M")),
        lambda s: s.startswith("dense: 1M parameters on 20M tokens") and "verdict" in s,
    ),
    "recommendation, repr": (
        lambda f: repr(f.recommend(params="1M", tokens="20M")),
        lambda s: s.startswith("<Recommendation: dense: 1M") and "learning rate" in s,
    ),
    "recommendation as JSON": (
        lambda f: json.dumps(f.recommend(params="1M", tokens="20M").to_dict(), allow_nan=False),
        lambda s: '"learning_rate"' in s,
    ),
    "predict": (
        lambda f: f.predict(learning_rate=0.01, batch_tokens=512, params="1M", tokens="20M"),
        lambda t: _frame(t, 1) and t["low"].iloc[0] < t["loss"].iloc[0] < t["high"].iloc[0],
    ),
    "predict many": (
        lambda f: f.predict(["1e-2", 2e-2, 0.5], "1k", params="1M", tokens="20M"),
        lambda t: _frame(t, 3) and t["cost"].iloc[2] > t["cost"].iloc[0],
    ),
    "split": (lambda f: f.split("1e12"), lambda s: set(s) == {"dense", "moe"}),
    "to_dict": (lambda f: json.dumps(f.to_dict(), allow_nan=False), lambda s: len(s) > 1000),
    "plot": (lambda f: repr(f.plot), lambda s: "surface(cell)" in s),
    "plot optima": (lambda f: f.plot.optima(), lambda x: isinstance(x, Figure)),
    "plot loss": (lambda f: f.plot.loss(), lambda x: isinstance(x, Figure)),
    "plot surface": (
        lambda f: f.plot.surface("dense-s-80ktok"),
        lambda x: isinstance(x, Figure) and len(x.axes) > 0,
    ),
    "plot trials": (lambda f: f.plot.trials(), lambda x: isinstance(x, Figure)),
    "compare": (lambda f: raysweep.compare(LAPTOP), lambda c: len(c.to_pandas()) == 2),
    "compare fits": (lambda f: str(raysweep.compare(f)), lambda s: "moe over dense" in s),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_natural_calls_work(name: str, fits: Fits) -> None:
    call, holds = CALLS[name]
    assert holds(call(fits))


@pytest.mark.slow
def test_report_is_a_verb_and_a_package(fits: Fits, tmp_path: Path) -> None:
    page = raysweep.report(LAPTOP, tmp_path / "one", fits=fits)
    assert page == tmp_path / "one" / "index.html"
    from raysweep.report.compare import write_comparison  # the package is still one

    assert raysweep.write_comparison is write_comparison
    assert callable(raysweep.report)
    assert raysweep.write_report(LAPTOP, tmp_path / "two", fits=fits).exists()
    found = raysweep.compare(fits)
    assert raysweep.write_comparison(found, tmp_path / "three").stat().st_size > 10_000


def test_results_that_exist_are_imported(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    rows = [
        f"{rate}e-3,{batch},1e6,2e7,{3 + abs(rate - 4) / 50}"
        for rate in (1, 3, 10)
        for batch in (4096, 16384)
    ]
    table.write_text("\n".join(["lr,bs,N,tokens,val", *rows]))
    columns = {
        "learning_rate": "lr",
        "batch_tokens": "bs",
        "params_active_non_embedding": "N",
        "loss": "val",
    }
    results = raysweep.import_results(table, tmp_path / "results", columns=columns)
    assert len(results) == 6
    assert results.best()["learning_rate"].tolist() == [3e-3]
    answer = raysweep.fit(results).recommend(params="1M", tokens="20M")
    assert math.isfinite(answer.learning_rate)
    with pytest.raises(raysweep.UserError, match="unknown import format"):
        raysweep.import_results(table, tmp_path / "results", "wandib")


def test_dir_shows_the_api_only() -> None:
    assert dir(raysweep) == sorted(raysweep.__all__)
    for name in raysweep.__all__:
        assert getattr(raysweep, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        raysweep.nope  # noqa: B018


@pytest.mark.slow
def test_a_fresh_session_needs_no_other_import(tmp_path: Path) -> None:
    """`raysweep.report(...)` before and after anything imported the package of that name."""
    code = (
        "import sys, raysweep\n"
        f"fits = raysweep.fit({str(LAPTOP)!r})\n"
        f"print(raysweep.report({str(LAPTOP)!r}, {str(tmp_path / 'page')!r}, fits=fits))\n"
        "import raysweep.report\n"
        f"print(raysweep.report({str(LAPTOP)!r}, {str(tmp_path / 'page')!r}, fits=fits))\n"
        "assert not {'torch', 'ray', 'optuna'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "page" / "index.html")] * 2


def test_mistakes_say_what_was_meant(fits: Fits, tmp_path: Path) -> None:
    for call, said in (
        (lambda: raysweep.fit(SMOKE), "is a search-space file, no results folder"),
        (lambda: raysweep.fit(str(LAPTOP)[:-1]), "did you mean"),
        (lambda: raysweep.fit(LAPTOP.parent), "did you mean"),
        (lambda: raysweep.fit(LAPTOP, without=["stp_law"]), "did you mean step_law"),
        (lambda: fits.recommend(params=7, tokens="1.4T"), "did you mean 7B?"),
        (lambda: fits.recommend(params="7B", tokens="1,4T"), "write 1.4T"),
        (lambda: fits.recommend(params="7B"), "recommend needs tokens"),
        (lambda: fits.recommend("tiny", "7B", "1.4T"), "known: dense, moe"),
        (lambda: fits.recommend("dense", "7B", "1.4T", group="muon"), "no group 'muon'"),
        (lambda: fits.predict(-1, 512, "1M", "20M"), "learning_rate must be above zero"),
        (
            lambda: fits.recommend("dense", params=[1e5, 2e5], tokens=[1e6, 2e6, 3e6]),
            "2 of params and 3 of tokens: give as many of each, or one",
        ),
        (
            lambda: fits.predict([0.01, 0.02], [512, 1024, 2048], "1M", "20M"),
            "2 of learning_rate and 3 of batch_tokens: give as many of each, or one",
        ),
        (lambda: fits.recommend("dense", "1M", "20M", within="abc"), "within abc is no number"),
        (
            lambda: fits.recommend("moe", "1M", "20M", experts=2.5),  # pyright: ignore
            "experts must be a whole number, not 2.5",
        ),
        (lambda: raysweep.Study.from_dict({"study": "x", "foo": 1}), "unknown key 'foo'"),
        (lambda: fits.plot.surface("nope"), "known: dense-xs-40ktok"),
        (lambda: raysweep.Study.load(SMOKE, set={"n_trials": 3}), "--set search.trials_per_cell=3"),
    ):
        with pytest.raises(raysweep.UserError) as caught:
            call()
        assert said in str(caught.value)
