"""The forecast of a ladder's largest scale against its outcome, on a planted ladder."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.forecast import outcome, outcome_text
from raysweep.scaling.fits import fit
from tests.scaling.conftest import make_study


@pytest.fixture(scope="module")
def ladder() -> pd.DataFrame:
    frame = make_study(scales=(1e7, 3e7, 9e7), tokens_per_param=(10, 40), noise=0.0005)
    return frame.assign(scale=frame["params_active_non_embedding"].astype(str))


def test_forecast_and_outcome_side_by_side(ladder: pd.DataFrame) -> None:
    """Cells named by their sizes, forecast from the smaller ones, trained, and held together."""
    large = ladder["params_active_non_embedding"] > 5e7
    before, after = fit(ladder[~large]), fit(ladder)
    name = str(after.cells.index[-1])
    n, d = after.cells[["params_active_non_embedding", "tokens"]].to_numpy(float)[-1].tolist()
    told = before.recommend("dense", n, d)
    row = {"architecture": "dense", "verdict": told.verdict, "batch_sequences": 64}
    for quantity in ("learning_rate", "batch_tokens", "loss"):
        low, high = getattr(told, f"{quantity}_interval")
        row[quantity] = {"value": getattr(told, quantity), "low": low, "high": high}
    said = {"scale": "xl", "rows": before.n_rows, "written": "today", "cells": {name: row}}
    own = ladder[ladder["cell"] == name] if "cell" in ladder else ladder[large]
    trials = own.assign(cell=name, status="finished")
    best = trials["loss"].min()
    check = pd.DataFrame(
        {"cell": name, "status": "finished", "loss": best * np.array([1.001, 1.003])}
    )
    found = outcome(said, after, trials, check)
    cell = found["cells"][name]
    assert cell["trials"] == len(trials)
    assert cell["inside"] == dict.fromkeys(("learning_rate", "batch_tokens", "loss"), True)
    assert cell["regret"] == pytest.approx(0.002)
    assert cell["regret_sd"] == pytest.approx(0.001 * 2**0.5 * 1.5**0.5)
    assert abs(cell["loss_error"]) < 0.02
    text = outcome_text(said, found, after)
    assert "0.20%" in text
    assert "**" not in text
    wrong = {**row, "loss": {"value": 1.0, "low": 0.9, "high": 1.1}}
    off = {**said, "cells": {name: wrong}}
    assert "**" in outcome_text(off, outcome(off, after, trials, check), after)
