"""The measured noise scale and expert load of cells, and the law of the noise scale."""

import json

import numpy as np
import pandas as pd
import pytest

from raysweep.scaling.optima.noise_scale import (
    cell_expert_load,
    cell_noise_scale,
    fit_noise_scale,
    noise_along,
)


def planted(losses, factor=None, noise=0.0):
    """Cells with a loss each, and noise scales 2e8 / L^(1/0.21) (Kaplan et al. 2020)."""
    names = [f"c{i}" for i in range(len(losses))]
    scale = 2e8 / losses ** (1 / 0.21)
    scale = scale if factor is None else scale * np.where(factor, 0.5, 1.0)
    scale = scale * np.exp(noise * np.random.default_rng(0).standard_normal(len(losses)))
    cells = pd.DataFrame({"loss": losses}, index=names)
    table = pd.DataFrame({"noise_scale_tokens": scale, "log_sd": 0.05, "left_out": ""}, index=names)
    return cells, table


def test_kaplans_law_comes_back():
    law = fit_noise_scale(*planted(np.linspace(2.2, 4, 9)))
    assert law is not None
    assert law.b0 == pytest.approx(2e8, rel=1e-6)
    assert law.exponents["loss"].value == pytest.approx(-1 / 0.21, rel=1e-6)
    assert law.exponents["loss"].covers(-1 / 0.21)
    assert law.n == 9


def test_a_factor_is_the_ratio_of_the_halves_and_its_interval_covers():
    losses = np.tile(np.linspace(2.2, 4, 6), 2)
    second = np.repeat([0, 1], 6)
    inside = 0
    for seed in range(40):
        cells, table = planted(losses, second)
        rng = np.random.default_rng(seed)
        table["noise_scale_tokens"] *= np.exp(0.2 * rng.standard_normal(12))
        law = fit_noise_scale(cells, table, ("loss",), second)
        assert law is not None
        inside += law.exponents["factor"].covers(np.log(0.5))
    assert 35 <= inside <= 40


def test_too_few_cells_have_no_law():
    assert fit_noise_scale(*planted(np.array([2.5, 3.0]))) is None
    assert fit_noise_scale(*planted(np.full(8, 2.5))) is None


def test_the_noise_scale_averages_numerator_and_denominator_apart():
    trials = pd.DataFrame(
        {
            "cell": ["a", "a", "a", "b"],
            "loss": [2.0, 2.001, 3.0, 2.0],
            "noise_trace": [10.0, 30.0, 1e6, np.nan],
            "noise_grad_sq": [1.0, 9.0, 1.0, np.nan],
            "noise_scale_tokens": [np.nan, np.nan, 5.0, np.nan],
            "sequence_length": [100.0, 100.0, 100.0, 100.0],
        }
    )
    found = cell_noise_scale(pd.DataFrame(index=["a", "b"]), trials)
    assert found.loc["a", "noise_scale_tokens"] == pytest.approx(100 * 20 / 5)
    assert found["noise_scale_tokens"].isna().to_dict() == {"a": False, "b": True}
    assert found.loc["b", "left_out"] == "noise scale not measured"


def test_quarters_of_a_run_are_those_of_the_trials_near_the_best():
    def quarters(*traces: float) -> str:
        every = [{"loss": 4.0 - k, "grad_sq": 2.0, "trace": t} for k, t in enumerate(traces)]
        return json.dumps([{"loss": None, "grad_sq": None, "trace": None}, *every])

    trials = pd.DataFrame(
        {
            "cell": ["a", "a", "a", "b"],
            "loss": [2.0, 2.001, 3.0, 2.0],
            "noise_quarters": [quarters(10, 20), quarters(30, -40), quarters(9, 9), None],
            "sequence_length": [100.0] * 4,
        }
    )
    cells = pd.DataFrame({"architecture": ["dense", "dense"]}, index=["a", "b"])
    found = noise_along(cells, trials)
    assert found["quarter"].tolist() == [2]
    assert found["loss"].tolist() == [4.0]
    assert found["noise_scale_tokens"].tolist() == [1000.0]


def test_expert_load_is_that_of_the_trials_near_the_best():
    cells = pd.DataFrame({"architecture_kind": ["moe", "dense"]}, index=["a", "b"])
    trials = pd.DataFrame(
        {
            "cell": ["a", "a", "a", "b"],
            "loss": [2.0, 2.01, 3.0, 2.0],
            "expert_load_entropy": [0.9, 0.8, 0.1, np.nan],
            "expert_load_max_over_mean": [1.1, 1.3, 9.0, np.nan],
            "router_confidence": [0.5, np.nan, 0.5, np.nan],
        }
    )
    load = cell_expert_load(cells, trials)
    assert list(load.index) == ["a"]
    assert load.loc["a", "expert_load_entropy"] == pytest.approx(0.85)
    assert load.loc["a", "n_trials"] == 2
