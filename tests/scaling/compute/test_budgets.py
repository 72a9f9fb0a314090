"""What fits say of budgets: planted exponents, planted savings of experts, and their absence."""

import math

import numpy as np
import pytest

from raysweep.errors import UserError
from raysweep.results.published import read_chinchilla, read_isoflop
from raysweep.scaling.compute.roofline import find_gpu
from raysweep.scaling.compute.serving import Serving
from raysweep.scaling.fit import fit


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


def test_without_experts_or_law_there_is_a_reason_and_no_number(planted_study) -> None:
    dense = fit(planted_study(scales=(1e7,), per_cell=12))
    split = dense.allocation["dense"]
    assert not split.ok
    assert split.message
    assert math.isnan(split.flops)
    with pytest.raises(UserError, match="one number of experts only"):
        dense.serve(1e20, Serving(find_gpu("H100"), 3.0))


def test_parabolas_need_budgets_and_tell_their_bias(shared_data) -> None:
    (held,) = fit(read_isoflop(shared_data / "isoflop_marin_comma.csv")).allocation.values()
    assert held.parabolas is not None
    assert held.optimum is not None
    assert held.parabolas.exponent - held.bias == pytest.approx(held.optimum.exponent, abs=0.1)
    (scattered,) = fit(read_chinchilla(shared_data / "chinchilla_points.csv")).allocation.values()
    assert scattered.parabolas is None
    assert scattered.optimum is not None
    assert np.isfinite(scattered.optimum.exponent)
