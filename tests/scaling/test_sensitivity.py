"""Laws refitted in other ways, what laws said of unseen cells, and the load of experts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from raysweep.scaling.fits import Fits, fit


@pytest.fixture(scope="module")
def planted(planted_study: Callable[..., pd.DataFrame]) -> Fits:
    frame = planted_study(kinds=("dense", "moe"), per_cell=24, noise=2e-4)
    moe = (frame["architecture_kind"] == "moe").to_numpy()
    near = frame["loss"] <= 1.005 * frame.groupby("cell")["loss"].transform("min")
    return fit(
        frame.assign(
            expert_load_entropy=np.where(moe, np.where(near, 0.9, 0.1), np.nan),
            expert_load_max_over_mean=np.where(moe, 1.5, np.nan),
            router_confidence=np.where(moe, 0.4, np.nan),
        ),
        n_boot=40,
    )


def test_planted_laws_hardly_depend_on_the_choice_of_cells(planted: Fits) -> None:
    found = planted.sensitivity["dense"]["learning_rate"]
    names = [v.name for v in found.variants]
    assert names[0] == "as reported"
    assert "optima by quadratic" in names
    assert "smallest size left out" in names
    assert "largest horizon left out" in names
    reported = found.variants[0]
    truth = 3e-3 * (found.params / 1e8) ** -0.6 * (found.tokens / 2e9) ** 0.25
    assert reported.at.low < truth < reported.at.high
    for other in found.variants:
        if other.name.endswith("left out"):
            assert other.n_cells < reported.n_cells
            assert other.at.value == pytest.approx(truth, rel=0.15)


def test_cells_at_an_edge_may_be_counted(planted_study: Callable[..., pd.DataFrame]) -> None:
    frame = planted_study(per_cell=24, noise=2e-4, tokens_per_param=(10, 20, 40))
    one = (frame["cell"] == "dense-3e+07-20tpp") & (frame["learning_rate"] < 8e-3)
    found = fit(frame[~one], n_boot=20).sensitivity["dense"]["learning_rate"].variants
    counted = {v.name: v.n_cells for v in found}
    assert counted["cells at an edge counted"] > counted["as reported"]


def test_unseen_cells_lie_within_their_intervals(planted: Fits) -> None:
    group = planted.groups["dense"]
    unseen = group.loss_checks["chinchilla"].unseen
    assert {u.cell for u in unseen} == {"dense-2.7e+08-10tpp", "dense-2.7e+08-40tpp"}
    for u in unseen:
        assert u.observed == planted.cells.loc[u.cell, "loss"]
        assert u.predicted == pytest.approx(u.observed, rel=0.05)
        assert u.low < u.predicted * 1.001
        assert u.predicted < u.high * 1.001
    assert group.held_out is not None
    for by_target in group.held_out.predicted.values():
        for value, low, high in by_target.values():
            assert low < value < high


def test_load_of_experts_is_that_of_the_best_trials(planted: Fits) -> None:
    load = planted.expert_load
    assert list(load.index) == list(planted.groups["moe"].cells.index)
    assert load["expert_load_entropy"].max() <= 0.9
    assert (load["n_trials"] >= 1).all()
    row = json.loads(json.dumps(planted.to_dict()))["expert_load"][0]
    assert row["router_confidence"] == pytest.approx(0.4)
    assert row["cell"] == load.index[0]


def test_nothing_to_tell_is_empty(planted_study: Callable[..., pd.DataFrame]) -> None:
    found = fit(planted_study(scales=(1e7,), tokens_per_param=(10,)), n_boot=20)
    assert found.sensitivity == {"dense": {}}
    assert found.expert_load.empty
    assert all(math.isnan(c.error) for c in found.groups["dense"].loss_checks.values())
