"""The worth of a trial, on planted surfaces."""

import numpy as np
from raysweep.scaling.surface import CellFeatures, fit_surface

from raysweep.search.value import targets_of, trial_value
from raysweep.study import Study

CELLS = [CellFeatures(f"c{i}", params=1e7 * 4**i, tokens=2e8 * 4**i) for i in range(4)]
TARGET = CellFeatures("target", params=7e9, tokens=1.4e11)


def surface_with(trials: list[int]):
    """A fitted surface with this many trials in each of the four cells, about planted optima."""
    rng = np.random.default_rng(0)
    index, rates, batches, losses = [], [], [], []
    for i, count in enumerate(trials):
        best = np.log(1.79 * CELLS[i].params ** -0.713 * CELLS[i].tokens ** 0.307)
        centre = np.log(0.58 * CELLS[i].tokens ** 0.571)
        for _ in range(count):
            u, v = rng.uniform(-1.5, 1.5, 2)
            index.append(i)
            rates.append(np.exp(best + u))
            batches.append(np.exp(centre + v))
            losses.append(3.0 * np.exp(0.02 * u**2 + 0.01 * v**2 - 0.05 * i + 1e-3 * rng.normal()))
    return fit_surface(CELLS, np.array(index), np.array(rates), np.array(batches), np.array(losses))


def test_an_unknown_cell_teaches_more_than_a_well_known_one() -> None:
    surface = surface_with([12, 12, 12, 2])
    values = [trial_value(surface, cell, [TARGET]) for cell in CELLS]
    assert values[3] == max(values)
    assert all(v >= 0 for v in values)


def test_a_trial_is_worth_less_the_more_there_are() -> None:
    few, many = surface_with([4, 4, 4, 4]), surface_with([40, 40, 40, 40])
    assert trial_value(many, CELLS[3], [TARGET]) < trial_value(few, CELLS[3], [TARGET])


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
    assert moe.params_total > 2 * moe.params
    named = {**plain, "targets": [{"architecture": "moe", "params": 1e9, "tokens": 1e11}]}
    (only,) = targets_of(Study.from_dict(named))
    assert (only.params, only.tokens, only.experts) == (1e9, 1e11, 8)
