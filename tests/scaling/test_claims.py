"""The claims of Wang et al. on planted studies: seen where they hold, else not seen."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from raysweep.scaling.claims import near_optimal, tokens_saved
from raysweep.scaling.compute.budgets import exponents_text
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.fit import fit
from raysweep.scaling.fits import Fits

SLOPE = 0.2
"""Of the planted valley's ridge: .006 u v against .015 u^2."""


def with_noise(frame: pd.DataFrame, predicted: float) -> pd.DataFrame:
    """Noise scales at which lr_max / (1 + B_noise/B) has that slope at each cell's optimum."""
    batch = 2e5 * (frame["tokens"] / 2e9) ** 0.5
    return frame.assign(noise_scale_tokens=batch * predicted / (1 - predicted))


@pytest.fixture(scope="module")
def planted(planted_study) -> Fits:
    frame = planted_study(kinds=("dense", "moe"), per_cell=16, noise=0.0005, moe_rate=1.6)
    return fit(with_noise(frame, SLOPE))


@pytest.mark.slow
def test_what_holds_is_seen(planted: Fits) -> None:
    found = {c.claim: c for c in planted.claims["moe"]}
    words = "smaller batch", "larger learning rate", "lower gradient noise", "data more efficiently"
    by_word = {word: next(c for n, c in found.items() if word in n) for word in words}
    assert all(c.verdict == "seen" for c in by_word.values())
    saved = by_word["data more efficiently"]
    assert "16.37%" in saved.source
    # loss = 1.7 + 480/(N E^.5)^.35 + 2000/D^.37, at N 2.7e8 and D 40 N and smaller cells
    own = []
    sizes = planted.cells_of("dense")[["params_active_non_embedding", "tokens"]]
    for n, d in sizes.to_numpy(float):
        term = 480 / n**0.35 * (1 - 8**-0.175) + 2000 / d**0.37
        own.append(1 - (2000 / term) ** (1 / 0.37) / d)
    assert saved.value.value == pytest.approx(np.mean(own), abs=0.06)
    for name in ("dense", "moe"):
        ridge = next(c for n, c in found.items() if f"B), {name}" in n)
        assert ridge.verdict == "seen", ridge
        assert ridge.value.value == pytest.approx(0, abs=0.1)
    text = planted.summary(everything=True)
    assert "Wang et al. on moe against dense" in text
    assert "seen: MoE wants a smaller batch" in text
    json.dumps(planted.to_dict(), allow_nan=True)


@pytest.mark.slow
def test_what_does_not_hold_is_not_seen(planted_study) -> None:
    frame = planted_study(kinds=("dense", "moe"), per_cell=16, noise=0.0005, moe_rate=0.4,
                          moe_batch=4.0)  # fmt: skip
    frame = with_noise(frame, 0.8)
    frame["noise_scale_tokens"] *= np.where(frame["architecture"] == "moe", 4.0, 1.0)
    found = fit(frame).claims["moe"]
    for word in ("smaller batch", "larger learning rate", "lower gradient noise scale",
                 "lr = lr_max / (1 + B_noise/B), dense"):  # fmt: skip
        assert next(c for c in found if word in c.claim).verdict == "not seen", word
    overlap = next(c for c in found if "Near-optimal batches" in c.claim)
    assert overlap.value.value < 1


def test_near_optimal_ranges_are_those_of_the_valley(planted: Fits) -> None:
    """At its best rate a batch v off costs .015 v^2 - (.006 v)^2 / .06."""
    evidence = planted.evidence_of("dense")
    run = evidence.sizes[str(planted.cells_of("dense").index[-1])]
    low, high = near_optimal(evidence, run, 0.0025)["batch_tokens"]
    half = (0.0025 / (0.015 - 0.006**2 / 0.06)) ** 0.5
    assert np.log(high / low) / 2 == pytest.approx(half, rel=0.25)


def test_tokens_saved_keeps_its_interval_in_order() -> None:
    saved = tokens_saved(Estimate(0.8, 0.7, 0.9))
    assert (saved.low, saved.value, saved.high) == pytest.approx((0.1, 0.2, 0.3))


def test_exponents_of_the_split_come_back_in_the_sources_count(isoflop_profiles) -> None:
    """.507 dense and .590 MoE, planted in active non-embedding parameters on IsoFLOP profiles: by
    each architecture's own law and by its parabolas, and never beside another count's."""
    found = fit(isoflop_profiles("wang2024", (1e9, 1.6e10), 0.35, 0.0003)).exponents
    assert {e.count for e in found} == {"params_active_non_embedding"}
    by = {(e.architecture, e.method): e for e in found}
    for name, planted in (("dense", 0.507), ("moe", 0.590)):
        assert by[name, "source"].params.value == planted
        law = by[name, "law"]
        assert law.params.value == pytest.approx(planted, abs=0.04)
        assert law.params.low - 0.02 < planted < law.params.high + 0.02
        assert law.params.value + law.tokens.value == pytest.approx(1, abs=0.05)
        # Parabolas are biased where the two exponents of the loss differ, and say so.
        assert by[name, "parabolas"].params.value == pytest.approx(planted, abs=0.06)
    text = "\n".join(exponents_text(found))
    assert "N: active parameters but embeddings" in text
    assert "N ~ C^0.590" in text
