"""Serving: counts of parameters, the cost model by hand, and the inference-aware solutions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.scaling.compute.roofline import Profile, Roofline, ServedModel, find_gpu
from raysweep.scaling.compute.serving import (
    Serving,
    Solution,
    serving_cost,
    serving_dict,
    serving_solutions,
    serving_text,
)
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.fit import LossFit, fit_law
from raysweep.scaling.loss.laws import LOSS_LAWS

A100 = find_gpu("a100-80gb")


@pytest.fixture(scope="module")
def joint_fit() -> LossFit:
    """The published joint MoE law, as a fit to its own predictions."""
    law, rng = LOSS_LAWS["joint_moe"], np.random.default_rng(0)
    inputs = {
        "params": np.exp(rng.uniform(np.log(1e8), np.log(1e10), 100)),
        "tokens": np.exp(rng.uniform(np.log(1e9), np.log(1e12), 100)),
        "experts": 2.0 ** rng.integers(0, 7, 100),
    }
    return fit_law(law, LossData.of(inputs, law.predict(law.published, inputs)))


@pytest.fixture(scope="module")
def solutions(joint_fit: LossFit) -> list[Solution]:
    return serving_solutions(joint_fit, 1e22, Serving(A100, 2.0), experts=(2, 4, 16), reference=4)


def find(solutions: list[Solution], kind: str, experts: int) -> Solution:
    return next(s for s in solutions if s.kind == kind and s.experts == experts)


def test_parameters_are_counted_as_in_the_source() -> None:
    model = ServedModel(3e9, experts=8)
    assert model.params_total == pytest.approx((1 + 7 / 3) * 3e9)
    assert model.params_active == pytest.approx((2 / 3 + 2 / 3) * 3e9)
    dense = ServedModel(3e9)
    assert dense.params_total == dense.params_active == 3e9
    assert 12 * dense.layers * dense.d_model**2 == pytest.approx(3e9)
    assert dense.kv_bytes == pytest.approx(4 * dense.layers * dense.d_model)


def test_a_step_reads_the_experts_its_tokens_want() -> None:
    model = ServedModel(3e9, experts=8)
    assert model.params_touched(1) == pytest.approx(model.params_active)
    assert model.params_touched(1e6) == pytest.approx(model.params_total)
    assert model.params_active < model.params_touched(4) < model.params_total


def test_roofline_has_both_roofs() -> None:
    """One sequence decodes at the speed of memory, a long prompt at that of arithmetic."""
    roof, model = Roofline(A100), ServedModel(7e9)
    decode = roof.decode(model, 1, 1, 0)
    assert decode == pytest.approx(2 * 7e9 / (2.039e12 * 0.7))
    prefill = roof.prefill(model, 1, 64, 1024)
    attention = 2 * 1024 * model.layers * model.d_model * 64 * 1024
    assert prefill == pytest.approx((2 * 7e9 * 64 * 1024 + attention) / (312e12 * 0.5))
    assert roof.decode(model, 2, 64, 512) < roof.decode(model, 1, 64, 512)
    assert roof.decode(model, 2, 64, 512) > 0.5 * roof.decode(model, 1, 64, 512)


def test_cost_by_hand() -> None:
    serving = Serving(A100, 1.8, gpu_counts=(1,))
    model = ServedModel(7e9)
    cost = serving_cost(model, serving)
    sequences = (0.9 * 80e9 - 14e9) / (model.kv_bytes * (1024 + 128))
    roof = Roofline(A100)
    step = roof.prefill(model, 1, sequences / 256, 1024) + roof.decode(model, 1, sequences, 1152)
    assert cost.sequences == pytest.approx(sequences)
    assert cost.tokens_per_second == pytest.approx(sequences / step)
    assert cost.dollars_per_million == pytest.approx(1.8 / 3600 * step / sequences * 1e6)


def test_cost_rises_with_size_and_with_experts() -> None:
    serving = Serving(A100, 2.0)
    prices = [serving_cost(ServedModel(n), serving).dollars_per_million for n in (1e9, 7e9, 7e10)]
    assert prices == sorted(prices)
    by_experts = [
        serving_cost(ServedModel(7e9, experts=e), serving).dollars_per_million for e in (4, 16, 64)
    ]
    assert by_experts == sorted(by_experts)
    double = serving_cost(ServedModel(7e9), replace(serving, dollars_per_hour=4.0))
    assert double.dollars_per_million == pytest.approx(2 * prices[1])


def test_a_model_too_large_does_not_fit() -> None:
    cost = serving_cost(ServedModel(7e10), Serving(A100, 2.0, gpu_counts=(1,)))
    assert cost.status == "does not fit"
    assert np.isinf(cost.dollars_per_million)
    more = serving_cost(ServedModel(7e10), Serving(A100, 2.0))
    assert more.status == "fits"
    assert more.gpus >= 4


def test_loss_optimal_models_spend_the_budget_best(
    joint_fit: LossFit, solutions: list[Solution]
) -> None:
    for e in (2, 4, 16):
        best = find(solutions, "loss-optimal", e)
        assert 6 * best.params_active * best.tokens == pytest.approx(1e22)
        assert best.size_share == 1.0
        ratio = best.params_active / best.params
        for factor in (0.9, 1.1):
            active = best.params * factor * ratio
            worse = joint_fit.predict(
                {"params": active, "tokens": 1e22 / (6 * active), "experts": float(e)}
            )
            assert worse > best.loss


def test_the_loss_is_the_laws_at_the_count_it_was_fitted_on() -> None:
    """Wang's law, fitted on active parameters: of two whole experts a token, 4/3 of the dense."""
    law = LOSS_LAWS["wang"]
    n, d, e = (g.ravel() for g in np.meshgrid((1e8, 4e8, 2e9), (2e9, 1e10, 6e10), (1.0, 4.0, 16.0)))
    inputs = {"params": n, "tokens": d, "experts": e}
    truth = {"A": 400.0, "B": 2000.0, "s": 1.8, "a": 0.34, "b": 0.36, "g": 0.13}
    fit = fit_law(law, LossData.of(inputs, law.predict(truth, inputs)))
    found = serving_solutions(fit, 3e20, Serving(A100, 2.0), experts=(4, 8))
    for solution in found:
        if solution.status == "found":
            assert solution.params_active == pytest.approx(solution.params * 4 / 3)
            own = {
                "params": solution.params_active,
                "tokens": solution.tokens,
                "experts": solution.experts,
            }
            assert solution.loss == pytest.approx(law.predict(truth, own)[0], rel=1e-6)
    best = find(found, "loss-optimal", 8)
    # a A / (N^a E^g) = b B / D^b at the best split of 6 N D
    of_n = 0.34 * 400 / best.params_active**0.34 / 8**0.13
    assert of_n == pytest.approx(0.36 * 2000 / best.tokens**0.36, rel=1e-3)


def test_equal_quality_is_smaller_overtrained_and_cheaper(solutions: list[Solution]) -> None:
    """Yun et al.: 16 experts, 70-85 % smaller than loss-optimal, match 4 experts and serve
    cheaper."""
    reference = find(solutions, "loss-optimal", 4)
    small = find(solutions, "equal quality", 16)
    assert small.loss == pytest.approx(reference.loss, rel=1e-6)
    assert small.flops == reference.flops
    assert 0.1 < small.size_share < 0.4
    assert small.tokens > find(solutions, "loss-optimal", 16).tokens
    assert small.cost.dollars_per_million < 0.5 * reference.cost.dollars_per_million


def test_fewer_experts_need_more_compute_for_the_same_quality(solutions: list[Solution]) -> None:
    reference = find(solutions, "loss-optimal", 4)
    more = find(solutions, "same quality, more compute", 2)
    assert more.loss == pytest.approx(reference.loss, rel=1e-6)
    assert more.training_share > 1.05
    assert more.flops == pytest.approx(more.training_share * 1e22)


def test_equal_cost_is_equal_or_says_it_is_not(solutions: list[Solution]) -> None:
    reference = find(solutions, "loss-optimal", 4)
    same = find(solutions, "equal cost", 16)
    assert same.cost.dollars_per_million == pytest.approx(
        reference.cost.dollars_per_million, rel=0.01
    )
    assert same.loss < reference.loss
    assert same.beyond >= 1.0


def test_a_profile_file_replaces_the_roofline(tmp_path: Path) -> None:
    """A profile of the roofline's own latencies gives the roofline's cost."""
    roof, rows = Roofline(A100), []
    for params in np.geomspace(1e9, 1e10, 9):
        for sequences in np.geomspace(0.1, 2000, 60):
            model = ServedModel(params, experts=8)
            for phase, seconds in (
                ("prefill", roof.prefill(model, 2, sequences, 1024)),
                ("decode", roof.decode(model, 2, sequences, 1152)),
            ):
                rows.append((phase, 8, 2, params, sequences, seconds))
    path = tmp_path / "profile.csv"
    columns = ["phase", "experts", "gpus", "params", "sequences", "seconds"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    profile = Profile.read(path)
    assert profile.gpus == (2,)
    model = ServedModel(3.3e9, experts=8)
    by_roof = serving_cost(model, Serving(A100, 2.0, gpu_counts=(2,)))
    measured = Serving(A100, 2.0, latency=profile, gpu_counts=profile.gpus)
    by_profile = serving_cost(model, measured)
    assert by_profile.dollars_per_million == pytest.approx(by_roof.dollars_per_million, rel=0.01)
    with pytest.raises(UserError, match="no prefill of 4 experts"):
        serving_cost(ServedModel(3.3e9, experts=4), measured)

    pd.DataFrame(rows, columns=columns).drop(columns="gpus").to_csv(path, index=False)
    with pytest.raises(UserError, match="no column 'gpus'"):
        Profile.read(path)
    pd.DataFrame([("decode", 8, 2, 1e9, 1.0, -1.0)], columns=columns).to_csv(path, index=False)
    with pytest.raises(UserError, match="row 0: every number must be positive"):
        Profile.read(path)


def test_misuse_is_one_line(joint_fit: LossFit) -> None:
    with pytest.raises(UserError, match="choose from"):
        find_gpu("abacus")
    with pytest.raises(UserError, match="dollars_per_hour must be a positive"):
        serving_solutions(joint_fit, 1e20, Serving(A100, 0.0))
    law = LOSS_LAWS["chinchilla"]
    n, d = np.meshgrid(np.geomspace(1e8, 1e9, 4), np.geomspace(1e9, 1e10, 4))
    inputs = {"params": n.ravel(), "tokens": d.ravel()}
    dense = fit_law(law, LossData.of(inputs, law.predict(law.published, inputs)))
    with pytest.raises(UserError, match="does not read params, tokens and experts"):
        serving_solutions(dense, 1e20, Serving(A100, 2.0))
    few = fit_law(law, LossData.of({k: v[:2] for k, v in inputs.items()}, [3.0, 2.9]))
    with pytest.raises(UserError, match="not usable"):
        serving_solutions(few, 1e20, Serving(A100, 2.0))


def test_table_and_json_tell_the_same(joint_fit: LossFit, solutions: list[Solution]) -> None:
    serving = Serving(A100, 2.0)
    told = serving_dict(solutions, serving, 1e22)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    found = told["solutions"]
    assert isinstance(found, list)
    text = serving_text(solutions, serving, 1e22)
    rows = [line for line in text.splitlines() if line[:7].strip().isdigit()]
    assert len(rows) == len(found) == len(solutions)
    for row, solution in zip(rows, solutions, strict=True):
        assert solution.kind in row
        if solution.status == "found":
            assert f"{solution.loss:.4f}" in row
    outside = replace(joint_fit, inputs={**joint_fit.inputs, "experts": np.array([1.0, 2.0])})
    far = serving_solutions(outside, 1e22, serving, experts=(2, 64))
    assert "a guess, not a measurement" in serving_text(far, serving, 1e22)
    assert find(far, "loss-optimal", 64).beyond == pytest.approx(32)
