"""The model against planted truth: wide ladders, groups, sweeps at one batch, steep priors."""

import numpy as np
import pytest

from benchmarks.planted import (
    held,
    optima_held,
    plant_groups,
    plant_wide,
    recommended_gaps,
    search,
    sweep_one_batch,
)
from raysweep.scaling.optima.arrow import log_determinant
from raysweep.scaling.optima.literature import literature_prior
from raysweep.scaling.optima.model import shape_bias
from raysweep.scaling.optima.surface import Surface, fit_surface
from raysweep.study.shape import RunSize


def planted_cells(seed: int, cells: int = 30, trials: int = 3) -> tuple[Surface, float]:
    """Many cells of few trials about a parabola, and its curvature in ln batch."""
    rng = np.random.default_rng(seed)
    sizes = [
        RunSize(params_active_non_embedding=3e7 * 1.1**i, tokens=6e8 * 1.1 ** (i % 7), name=f"c{i}")
        for i in range(cells)
    ]
    index = np.repeat(np.arange(cells), trials)
    off = rng.normal(0, 0.5, (len(index), 2))
    optima = np.log([0.003, 2e5]) + rng.normal(0, 0.1, (cells, 2))
    gap = 0.004 * off[:, 0] ** 2 + 0.004 * off[:, 1] ** 2
    loss = 3 * np.exp(gap + 0.001 * rng.standard_normal(len(index)))
    rate, batch = np.exp(optima[index] + off).T
    return fit_surface(sizes, index, rate, batch, loss, batch_searched=True), 0.008


def test_many_cells_of_few_trials_do_not_make_the_valley_too_steep() -> None:
    ratios = []
    for seed in range(4):
        surface, true = planted_cells(seed)
        assert surface.status == "converged"
        ratios.append(surface.optimum(surface.cells[0]).curvature.diagonal() / true)
    # The joint mode of shape and optima has 1.5 to 2 times the true curvature.
    assert np.exp(np.log(ratios).mean()) == pytest.approx(1.0, rel=0.3)


def test_the_bias_of_the_shape_is_the_slope_of_half_the_ln_determinant() -> None:
    surface, _ = planted_cells(0, cells=5, trials=4)
    problem, mode, layout = surface.problem, surface.mode, surface.problem.layout
    point = problem.at(mode.shared, mode.own)
    variance = problem.variance(mode.widths, problem.noise_gap(point))

    def half_log_determinant(shared: np.ndarray) -> float:
        moved = problem.at(shared, mode.own)
        object.__setattr__(moved, "residual", point.residual)  # weights are held
        (_, _, tail), _ = problem.normal_equations(moved, mode.widths, variance)
        return 0.5 * log_determinant(np.eye(1), np.zeros((len(tail), 1, 3)), tail)

    tail = problem.normal_equations(point, mode.widths, variance)[0][2]
    bias = shape_bias(problem, point, variance, tail)
    step = 1e-4
    for i in range(layout.valley.start, layout.slopes.stop):
        move = np.zeros(layout.size)
        move[i] = step
        slope = half_log_determinant(mode.shared + move) - half_log_determinant(mode.shared - move)
        assert bias[i] == pytest.approx(slope / (2 * step), rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_a_wide_ladder_is_found_without_its_own_law() -> None:
    study = plant_wide(0)
    surface, settled = search(study, 3, prior=literature_prior(["openeurollm"]))
    gaps = recommended_gaps(study, surface)
    assert settled
    assert gaps.mean() <= 0.07
    assert gaps.max() <= 0.5
    assert sum(held(surface, study.exponents)) >= 3


@pytest.mark.slow
def test_groups_share_a_valley_and_lie_in_their_intervals() -> None:
    studies = [plant_groups(seed, groups=5) for seed in range(2)]
    surfaces = [search(study, 3, first=3)[0] for study in studies]
    assert np.mean(list(map(optima_held, studies, surfaces))) >= 0.85
    assert np.mean(list(map(recommended_gaps, studies, surfaces))) <= 0.08


def test_a_sweep_at_one_batch_tells_of_the_rate_at_that_batch() -> None:
    inside = []
    for seed in range(12):
        surface, true = sweep_one_batch(seed)
        assert surface.batch_rule is not None
        inside.append(held(surface, true))
    assert np.mean(inside) >= 0.9
