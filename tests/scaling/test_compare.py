"""compare: planted ratios come back, sides are named as users name them, other data is said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import raysweep
from raysweep.errors import UserError
from raysweep.results import Results
from raysweep.scaling.compare import (
    OTHER_DATA,
    compare_arms,
    needed,
    shared_sizes,
    size_shift,
)
from raysweep.scaling.fits import Fits
from raysweep.scaling.quantities import ANSWERS
from raysweep.scaling.sides import arms_of
from tests.scaling.conftest import valley

Make = Callable[..., pd.DataFrame]


def store(frame: pd.DataFrame, uri: Path, **columns: str) -> str:
    """Rows of a planted study in a results folder."""
    rows = frame.assign(
        schema_version=1,
        trial_key=[f"{uri.name}{i}" for i in range(len(frame))],
        source="raysweep",
        started_at=pd.Timestamp("2026-01-01", tz="UTC"),
        **columns,
    )
    Results.open(uri, create=True).write_many(rows)
    return str(uri)


@pytest.fixture(scope="module")
def both(planted_study: Make) -> Fits:
    return raysweep.fit(
        planted_study(kinds=("dense", "moe"), moe_rate=1.3, moe_batch=0.8, noise=0.0005)
    )


def test_planted_ratios_come_back(both: Fits) -> None:
    """L = 1.7 + 480/(N sqrt E)^0.35 + 2000/D^0.37: eight experts are worth sqrt(8) in N."""
    dense, moe = both.arm("dense"), both.arm("moe")
    ratios = compare_arms(dense, moe)
    # A shift of one ln unit off the optimum costs little: single cells scatter by a few percent.
    for quantity, truth, close in (("learning_rate", 1.3, 0.05), ("batch_tokens", 0.8, 0.05)):
        found = needed(ratios, quantity, "N and D")
        assert found.value == pytest.approx(truth, rel=close)
        assert found.low < truth < found.high
        assert found.high / found.low < 1.3
    sizes, paired = shared_sizes(dense, moe)
    logs = []
    for n, d in sizes:
        floor = 1.7 + 2000 / d**0.37
        logs.append(math.log((floor + 480 / (n * 8**0.5) ** 0.35) / (floor + 480 / n**0.35)))
    truth = math.exp(sum(logs) / len(logs))
    loss = needed(ratios, "loss", "N and D")
    assert loss.value == pytest.approx(truth, rel=1e-3)
    assert all(r.paired == r.n == paired for r in ratios if r.quantity in ANSWERS)


def test_equal_loss_is_where_the_law_says(both: Fits) -> None:
    """At D = 10 N and 40 N: how much smaller in N D a MoE reaches the dense loss, by the law."""
    dense, moe = both.arm("dense"), both.arm("moe")
    logs = []
    for n, d in shared_sizes(dense, moe)[0]:
        target = 480 / n**0.35 + 2000 / d**0.37
        low, high, s = -4.0, 0.0, 0.0
        for _ in range(60):
            s = (low + high) / 2
            at, on = n * math.exp(s / 2), d * math.exp(s / 2)
            reached = 480 / (at * 8**0.5) ** 0.35 + 2000 / on**0.37
            low, high = (s, high) if reached > target else (low, s)
        logs.append(s)
    found = needed(compare_arms(dense, moe), "flops", "loss")
    assert found.value == pytest.approx(math.exp(sum(logs) / len(logs)), rel=0.05)


def test_an_arm_against_itself_is_one(both: Fits) -> None:
    for ratio in compare_arms(both.arm("dense"), both.arm("dense")):
        if ratio.quantity != "noise_scale_tokens":
            assert ratio.ratio.value == pytest.approx(1, rel=2e-3), ratio
            assert ratio.ratio.covers(1)


def test_the_optimum_moves_with_size_as_planted(planted_study: Make, both: Fits) -> None:
    """lr* ~ N^-0.6 at equal tokens, the batch as tokens alone; a factor 4^0.6 off costs what the
    planted valley says."""
    frame = planted_study(scales=(1e7, 2e7, 4e7), tokens_per_param=(10, 20, 40), noise=0.0005)
    shift = size_shift(raysweep.fit(frame).arm("dense"))
    assert shift is not None
    assert shift.params == pytest.approx((1e7, 4e7))
    assert shift.tokens == pytest.approx((4e8,))
    assert shift.learning_rate.value == pytest.approx(4**-0.6, rel=0.15)
    assert shift.learning_rate.covers(4**-0.6)
    assert shift.batch_tokens.covers(1)
    cost = math.expm1(float(valley(np.array(0.6 * math.log(4)), np.array(0.0))))
    assert shift.cost.low < cost < shift.cost.high
    assert shift.cost.value == pytest.approx(cost, rel=0.5)
    assert size_shift(both.arm("dense")) is None  # its smallest and largest share no horizon


@pytest.mark.slow
def test_a_batch_that_no_cell_varied_is_not_compared(planted_study: Make) -> None:
    frame = planted_study(
        scales=(1e7, 2e7, 4e7), tokens_per_param=(10, 20, 40), kinds=("dense", "moe")
    )
    fits = raysweep.fit(frame.assign(batch_tokens=1e5))
    ratios = compare_arms(fits.arm("dense"), fits.arm("moe"))
    batches = [r.ratio for r in ratios if r.quantity == "batch_tokens"]
    assert [b.why for b in batches] == ["no cell varied its batch"] * 3
    assert needed(ratios, "learning_rate", "N and D").known
    shift = size_shift(fits.arm("dense"))
    assert shift is not None
    assert shift.learning_rate.known
    assert not shift.batch_tokens.known


@pytest.mark.slow
def test_losses_on_other_data_are_not_compared(planted_study: Make, tmp_path: Path) -> None:
    one = store(planted_study(per_cell=8), tmp_path / "one", data_hash="web")
    two = store(planted_study(per_cell=8, seed=1), tmp_path / "two", data_hash="books")
    found = raysweep.compare(one, two)
    assert [arm.name for arm in found.arms] == ["one", "two"]
    assert list(found.apart) == ["two"]
    first = str(found).splitlines()[0]
    assert first.startswith("warning: two: other data than one")
    assert "losses are not comparable, optima may be" in first
    (ratios,) = found.ratios.values()
    assert needed(ratios, "loss", "N and D").status == OTHER_DATA
    assert needed(ratios, "flops", "loss").status == OTHER_DATA
    assert needed(ratios, "learning_rate", "N and D").value == pytest.approx(1, abs=0.1)
    same = store(planted_study(per_cell=8, seed=2), tmp_path / "same", data_hash="web")
    assert not raysweep.compare(one, same).apart


@pytest.mark.slow
def test_sides_are_architectures_studies_groups_or_folders(
    planted_study: Make, tmp_path: Path
) -> None:
    recipes = {name: json.dumps({"optimizer": name}) for name in ("adamw", "muon")}
    dense = planted_study(per_cell=8)
    adamw = dense.assign(recipe=recipes["adamw"], study="a")
    fast = {"learning_rate": 2 * dense["learning_rate"], "loss": 0.99 * dense["loss"]}
    muon = dense.assign(recipe=recipes["muon"], study="b", **fast)
    folder = store(pd.concat([adamw, muon]), tmp_path / "two", data_hash="web")
    names = [arm.name for arm in arms_of(folder)]
    assert names == ["a", "b"]
    assert [arm.name for arm in arms_of(f"{folder}#a", f"{folder}#b")] == ["a", "b"]
    found = raysweep.compare(folder, group="optimizer", params="90M", tokens="1.8B")
    assert [arm.name for arm in found.arms] == ["adamw", "muon"]
    ratio = needed(found.ratios["muon"], "learning_rate", "N and D")
    assert ratio.value == pytest.approx(2, rel=0.05)
    assert needed(found.ratios["muon"], "loss", "N and D").value == pytest.approx(0.99, rel=1e-3)
    table = found.to_pandas().set_index("side")
    assert list(table.index) == ["adamw", "muon"]
    assert (table["learning_rate_low"] < table["learning_rate"]).all()
    both = store(
        planted_study(kinds=("dense", "moe"), per_cell=8), tmp_path / "both", data_hash="web"
    )
    several = [arm.name for arm in arms_of(both, folder)]
    assert several == ["both dense", "both moe", "two dense"]
    assert [a.name for a in arms_of(both, folder, architectures=["dense"])] == ["both", "two"]
    json.dumps(raysweep.compare(both, folder).to_dict(), allow_nan=False)


@pytest.mark.slow
def test_mistakes_are_named(planted_study: Make, tmp_path: Path) -> None:
    folder = store(planted_study(per_cell=4), tmp_path / "one")
    with pytest.raises(UserError, match="needs two sides, and there is only dense"):
        raysweep.compare(folder)
    with pytest.raises(UserError, match=r"no study 'x' in .*; its studies: planted"):
        raysweep.compare(folder + "#x")
    with pytest.raises(UserError, match="no architecture 'moe' in the results; known: dense"):
        raysweep.compare(folder, folder, architectures=["moe"])
    with pytest.raises(UserError, match="give both params and tokens"):
        raysweep.compare(folder, folder, params="1B")


def test_a_size_that_no_side_reaches_is_still_answered(both: Fits) -> None:
    found = raysweep.compare(both, params="10B", tokens="200B")
    assert all(answer.verdict == "extrapolated" for answer in found.answers.values())
    lines = str(found).splitlines()
    assert lines[0].startswith("At 10B active parameters and 200B tokens")
    assert lines[1].split() == ["side", "learning", "rate", "batch", "loss", "FLOPs"]
