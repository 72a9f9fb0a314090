"""What fits say of budgets: planted exponents, planted savings of experts, and their absence."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from raysweep.errors import UserError
from raysweep.results.published import read_chinchilla, read_isoflop
from raysweep.scaling.compute.budgets import cost_of
from raysweep.scaling.compute.candidates import candidates_of
from raysweep.scaling.compute.roofline import find_gpu
from raysweep.scaling.compute.serving import Serving
from raysweep.scaling.fit import fit
from raysweep.scaling.runs import describe_run, token_cost
from raysweep.study import Study
from raysweep.study.shape import COUNTS


@pytest.fixture(scope="module")
def both(planted_study):
    return fit(planted_study(kinds=("dense", "moe"), per_cell=14, noise=0.0007))


def test_every_architecture_tells_its_planted_split(both) -> None:
    # loss = 1.7 + 480/(N E^0.5)^0.35 + 2000/D^0.37
    planted = 0.37 / (0.35 + 0.37)
    for name in ("dense", "moe"):
        split = both.allocation[name]
        assert split.ok
        assert split.optimum.exponent == pytest.approx(planted, abs=0.05)
        low, high = split.optimum.intervals["exponent"]
        assert low - 0.02 <= planted <= high + 0.02
        assert split.parabolas is None  # no budget is held


def test_serving_is_answered_from_the_law_of_experts(both) -> None:
    """Dense is a candidate, and the shares of experts are those of the rows."""
    serving = Serving(find_gpu("H100"), 3.0)
    solutions = both.serve([1e20, 1e21], serving, reference="dense")
    assert {s.name for s in solutions} == {"dense", "moe"}
    assert {s.budget for s in solutions} == {1e20, 1e21}
    best = next(s for s in solutions if s.name == "moe")
    cell = both.cells_of("moe").iloc[-1]
    for count in ("total", "active"):
        own = cell[f"params_{count}_non_embedding"] / cell["params_dense"]
        assert getattr(best, f"params_{count}") / best.params == pytest.approx(own)
    law = both.serving_law(serving, law="wang")
    assert law.curve.law.key == "wang"


@pytest.fixture(scope="module")
def tiny(planted_study):
    """Models of which the head takes most: the FLOPs of their shapes, with experts and without."""
    ladder = {p: Study.from_dict(ladder_of(p)).cells for p in TINY}
    rows = []
    for p, cells in ladder.items():
        own = planted_study(scales=(p,), kinds=("dense", "moe"), per_cell=14, noise=0.0007)
        for cell in cells:
            part = own[own["architecture"] == cell.architecture]
            counts = {c: getattr(cell.counts, c) for c in (*COUNTS[:4], "flops_per_token")}
            shape = {c: getattr(cell.shape, c) for c in ("d_model", "layers", "vocab_size")}
            rows.append(part.assign(**counts, **shape, params_dense=cell.params_dense))
    return fit(pd.concat(rows, ignore_index=True))


TINY = (2e4, 6e4, 2e5)


def ladder_of(params: float) -> dict:
    return {
        "study": "tiny",
        "architectures": {"dense": {}, "moe": {"experts": 8, "top_k": 2}},
        "scales": [{"params": params}],
        "horizons": [{"tokens_per_param": 10}],
        "search": {
            "trials_per_cell": 1,
            "learning_rate": {"low": 1e-3, "high": 1e-1},
            "batch_sequences": {"low": 4, "high": 8},
        },
        "model": {"sequence_length": 64, "head_dim": 8},
    }


@pytest.mark.slow
def test_all_that_charges_a_run_charges_the_same(tiny) -> None:
    """Split, serving and recommend to the digit; beyond the cells near the FLOPs of a true shape,
    and in the end those of 6 N D."""
    serving = Serving(find_gpu("H100"), 3.0)
    (moe,) = (c for c in candidates_of(tiny.cells) if c.name == "moe")
    for name in tiny.architectures:
        cells = tiny.cells_of(name)
        experts, top_k = (int(cells.iloc[-1][c]) for c in ("experts", "top_k"))
        budgets = (1e12, 1e14, 1e20)
        for budget, split in zip(budgets, tiny.split(budgets)[name], strict=True):
            run = describe_run(cells, split.params, split.tokens, experts=experts, top_k=top_k)
            assert split.count == "params_active_non_embedding"
            assert run.flops == pytest.approx(budget, rel=1e-6)
    solved = tiny.serve(1e14, serving, law="wang")
    best = next(s for s in solved if s.name == "moe" and s.kind == "loss-optimal")
    assert best.tokens == pytest.approx(1e14 / float(moe.cost(best.params_active)))
    for n in (6e6, 2e8):
        (dense, *_) = Study.from_dict(ladder_of(n)).cells
        active = dense.counts.params_active_non_embedding
        charged = float(token_cost(tiny.cells_of("dense"))(active))
        assert charged == pytest.approx(dense.counts.flops_per_token, rel=0.05)


def test_a_budget_may_be_a_number_of_numpy(both) -> None:
    (asked,) = both.split(np.int64(10**18))["dense"]
    assert asked.params == both.split(1e18)["dense"][0].params


@pytest.mark.parametrize("count", COUNTS)
def test_flops_are_charged_whatever_count_a_law_reads(tiny, count: str) -> None:
    for name in tiny.architectures:
        cells = tiny.cells_of(name)
        model = replace(tiny.loss_model(name), count=count)
        told = cost_of(model, cells)(cells[count].to_numpy(float))
        np.testing.assert_allclose(told, cells["flops_per_token"], rtol=0.05)


def test_without_experts_or_law_there_is_a_reason_and_no_number(planted_study) -> None:
    dense = fit(planted_study(scales=(1e7,), per_cell=12))
    split = dense.allocation["dense"]
    assert not split.ok
    assert split.message
    assert math.isnan(split.flops)
    with pytest.raises(UserError, match="one number of experts only"):
        dense.serve(1e20, Serving(find_gpu("H100"), 3.0))


@pytest.mark.slow
def test_parabolas_need_budgets_and_tell_their_bias(shared_data) -> None:
    (held,) = fit(read_isoflop(shared_data / "isoflop_marin_comma.csv")).allocation.values()
    assert held.parabolas is not None
    assert held.optimum is not None
    assert held.parabolas.exponent - held.bias == pytest.approx(held.optimum.exponent, abs=0.1)
    (scattered,) = fit(read_chinchilla(shared_data / "chinchilla_points.csv")).allocation.values()
    assert scattered.parabolas is None
    assert scattered.optimum is not None
    assert np.isfinite(scattered.optimum.exponent)
