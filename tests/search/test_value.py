"""What trials are worth, on planted surfaces, and how a budget is spent."""

import numpy as np
import pytest

from raysweep.scaling.optima.surface import fit_surface
from raysweep.search.value import (
    Outlook,
    next_cell,
    spread,
    targets_of,
)
from raysweep.study import Study
from raysweep.study.shape import RunSize

CELLS = [
    RunSize(params_active_non_embedding=1e7 * 4**i, tokens=2e8 * 4**i, name=f"c{i}")
    for i in range(4)
]
TARGET = RunSize(params_active_non_embedding=7e9, tokens=1.4e11, name="target")
FLOPS = [cell.compute for cell in CELLS]


def surface_with(trials: list[int], seed: int = 0):
    """A fitted surface with this many trials in each of the four cells, about planted optima."""
    rng = np.random.default_rng(seed)
    index, rates, batches, losses = [], [], [], []
    for i, count in enumerate(trials):
        cell = CELLS[i]
        best = np.log(1.79 * cell.params_active_non_embedding**-0.713 * cell.tokens**0.307)
        centre = np.log(0.58 * cell.tokens**0.571)
        for _ in range(count):
            u, v = rng.uniform(-1.5, 1.5, 2)
            index.append(i)
            rates.append(np.exp(best + u))
            batches.append(np.exp(centre + v))
            losses.append(3.0 * np.exp(0.02 * u**2 + 0.01 * v**2 - 0.05 * i + 1e-3 * rng.normal()))
    return fit_surface(CELLS, np.array(index), np.array(rates), np.array(batches), np.array(losses))


def fall(surface, i: int, count: int = 1) -> float:
    """How far more trials in a cell lower the target's regret."""
    outlook = Outlook(surface, [CELLS[i]], [TARGET])
    return outlook.regret([0]) - outlook.regret([count])


def test_an_unknown_cell_teaches_more_than_a_well_known_one() -> None:
    surface = surface_with([12, 12, 12, 2])
    values = [fall(surface, i) for i in range(4)]
    assert values[3] == max(values)
    assert all(v >= 0 for v in values)


def test_a_trial_is_worth_less_the_more_there_are() -> None:
    few, many = surface_with([4, 4, 4, 4]), surface_with([40, 40, 40, 40])
    assert fall(many, 3) < fall(few, 3)
    one, ten, twenty = (fall(few, 0, count) for count in (1, 10, 20))
    assert one < ten < twenty
    assert twenty - ten < 0.5 * (ten - one)


def test_the_regret_foreseen_is_the_one_that_a_fit_with_those_trials_has() -> None:
    before, after = surface_with([5, 5, 5, 5], seed=1), surface_with([5, 5, 25, 25], seed=1)
    foreseen = Outlook(before, CELLS, [TARGET]).regret([0, 0, 20, 20])
    now = Outlook(before, CELLS, [TARGET]).regret([0] * 4)
    found = Outlook(after, CELLS, [TARGET]).regret([0] * 4)
    assert found < now
    assert foreseen == pytest.approx(found, rel=0.6)
    # With nothing added it is the expected gap of the surface's own posterior, noise aside.
    at = before.optimum(TARGET)
    assert now == pytest.approx(0.5 * (at.curvature * at.covariance).sum(), rel=0.1)


def test_a_plan_keeps_to_the_budget_and_beats_the_cheapest_cells_alone() -> None:
    surface = surface_with([4, 4, 4, 4])
    outlook = Outlook(surface, CELLS, [TARGET])
    budget = 3.0 * sum(FLOPS)
    counts, regret = outlook.plan(FLOPS, budget, [20] * 4, [1, 0, 0, 0])
    assert np.dot(counts, FLOPS) <= budget
    assert max(counts) <= 20
    assert counts[0] >= 1
    assert regret == pytest.approx(outlook.regret(counts))
    assert regret < outlook.regret([20, 20, 0, 0])
    assert regret <= 1.02 * outlook.regret(spread([4] * 4, FLOPS, budget, [20] * 4, [0] * 4))


def test_a_plan_leaves_out_cells_that_tell_nothing_of_the_targets() -> None:
    surface = surface_with([4, 4, 4, 4])
    outlook = Outlook(surface, CELLS, [CELLS[3]])
    near, far = outlook.regret([0, 0, 0, 6]), outlook.regret([6, 0, 0, 0])
    assert near < far


def spent(start: list[int], least: list[int], targets: list[RunSize]) -> list[int]:
    """Cells in the order in which they get trials, until a budget is spent."""
    surface, had, order = surface_with(start), list(start), []
    budget = 4.0 * sum(FLOPS)
    while True:
        most = [12 - h for h in had]
        chosen = next_cell(surface, CELLS, had, FLOPS, most, least, budget, targets)
        if chosen is None:
            break
        order.append(chosen)
        budget -= FLOPS[chosen]
        had[chosen] += 1
        least = [max(0, more - (i == chosen)) for i, more in enumerate(least)]
    assert 0 <= budget < min((f for f, h in zip(FLOPS, had, strict=True) if h < 12), default=budget)
    return order


def test_a_budget_is_spent_on_all_cells_and_the_cheap_ones_come_first() -> None:
    order = spent([2, 2, 2, 2], [0] * 4, [TARGET])
    assert list(dict.fromkeys(order)) == [0, 1, 2, 3]


@pytest.mark.slow
def test_what_cells_get_in_any_case_is_kept_for_them() -> None:
    order = spent([4, 0, 0, 0], [0, 1, 1, 3], [TARGET])
    assert order.count(3) >= 3
    assert spent([0, 0, 0, 0], [2, 0, 0, 0], [TARGET])[:2] == [0, 0]


def test_where_no_plan_promises_much_cells_are_treated_alike() -> None:
    order = spent([3, 3, 3, 3], [0] * 4, [TARGET])
    assert [order.count(i) for i in range(4)] == [4, 4, 4, 4]


def test_spreading_evens_out_the_cells() -> None:
    assert spread([0, 0, 0], [1.0, 2.0, 4.0], 11.0, [9, 9, 9], [0] * 3) == [3, 2, 1]
    assert spread([0, 0, 0], [1.0, 2.0, 4.0], 11.0, [9, 9, 9], [0, 0, 2]) == [1, 1, 2]
    assert spread([6, 2, 2], [1.0, 2.0, 4.0], 13.0, [9, 9, 9], [0] * 3) == [1, 2, 2]
    assert spread([0, 0], [1.0, 2.0], 100.0, [3, 2], [0, 0]) == [3, 2]
    assert spread([0], [5.0], 4.0, [3], [0]) == [0]


def test_targets_come_from_the_file_or_from_ten_times_the_largest_cell() -> None:
    plain = {
        "study": "t",
        "architectures": {"dense": {}, "moe": {"experts": 8, "top_k": 2}},
        "scales": [{"d_model": 32, "layers": 2, "heads": 2}],
        "horizons": [{"tokens": 1e6}],
    }
    study = Study.from_dict(plain)
    dense, moe = sorted(targets_of(study), key=lambda t: t.experts)
    assert dense.tokens == 1e7
    assert moe.params_total is not None
    assert moe.params_total_non_embedding > 2 * moe.params_active_non_embedding
    named = {**plain, "targets": [{"architecture": "moe", "params": 1e9, "tokens": 1e11}]}
    (only,) = targets_of(Study.from_dict(named))
    assert (only.params_active_non_embedding, only.tokens, only.experts) == (1e9, 1e11, 8)
