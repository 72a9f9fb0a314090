"""The valley and the block-arrow algebra against finite differences and dense inverses."""

import numpy as np
import pytest

from raysweep.scaling.optima.arrow import invert, log_determinant, solve
from raysweep.scaling.optima.valley import (
    PARAMETERS,
    TERMS,
    best_rate,
    curvature,
    gap,
    gap_derivatives,
)

VALLEY = np.log([0.009, 1e-4, 0.004, 0.001, 0.0045, 2e-4, 3e-4, 5e-4, 1.1, 0.9])


def test_valley_is_lowest_at_its_optimum_and_convex():
    rng = np.random.default_rng(0)
    for _ in range(50):
        valley = np.r_[rng.normal(np.log(0.003), 2, TERMS), rng.normal(0, 0.3, 2)]
        a, b = rng.uniform(-3, 3, (2, 40, 2))
        ends = gap(a[:, 0], a[:, 1], valley), gap(b[:, 0], b[:, 1], valley)
        half = 0.5 * (a + b)
        middle = gap(half[:, 0], half[:, 1], valley)
        assert (ends[0] >= -1e-12).all()
        assert (middle <= 0.5 * (ends[0] + ends[1]) + 1e-12).all()
    assert gap(np.zeros(1), np.zeros(1), VALLEY)[0] == pytest.approx(0, abs=1e-15)


def test_valley_derivatives_match_finite_differences():
    rng = np.random.default_rng(1)
    u, v = rng.normal(0, 1, (2, 12))
    value, by_point, by_valley = gap_derivatives(u, v, VALLEY)
    np.testing.assert_allclose(value, gap(u, v, VALLEY), rtol=1e-10, atol=1e-14)
    h = 1e-5
    np.testing.assert_allclose(
        by_point[:, 0], (gap(u + h, v, VALLEY) - gap(u - h, v, VALLEY)) / (2 * h), rtol=1e-5
    )
    np.testing.assert_allclose(
        by_point[:, 1], (gap(u, v + h, VALLEY) - gap(u, v - h, VALLEY)) / (2 * h), rtol=1e-5
    )
    for k in range(PARAMETERS):
        step = h * np.eye(PARAMETERS)[k]
        difference = (gap(u, v, VALLEY + step) - gap(u, v, VALLEY - step)) / (2 * h)
        np.testing.assert_allclose(by_valley[:, k], difference, rtol=1e-4, atol=1e-9)


def test_curvature_is_the_second_difference_at_the_optimum():
    h = 1e-3
    axes = np.eye(2) * h

    def at(point: np.ndarray) -> float:
        return float(gap(point[0], point[1], VALLEY))

    numeric = np.empty((2, 2))
    for i in range(2):
        for j in range(2):
            corners = [(s * t) * at(s * axes[i] + t * axes[j]) for s in (1, -1) for t in (1, -1)]
            numeric[i, j] = sum(corners) / (4 * h * h)
    np.testing.assert_allclose(curvature(VALLEY), numeric, rtol=1e-3)


def test_arrow_blocks_match_the_dense_inverse():
    rng = np.random.default_rng(2)
    cells, shared = 4, 5
    size = shared + 3 * cells
    rows = []
    for cell in range(cells):
        row = np.zeros((6, size))
        row[:, :shared] = rng.normal(size=(6, shared))
        row[:, shared + 3 * cell : shared + 3 * cell + 3] = rng.normal(size=(6, 3))
        rows.append(row)
    dense = sum(row.T @ row for row in rows) + np.eye(size)
    own = [slice(shared + 3 * c, shared + 3 * c + 3) for c in range(cells)]
    head = dense[:shared, :shared]
    cross = np.stack([dense[:shared, block] for block in own])
    tail = np.stack([dense[block, block] for block in own])
    inverse = np.linalg.inv(dense)
    blocks = invert(head, cross, tail)
    np.testing.assert_allclose(blocks.shared, inverse[:shared, :shared], rtol=1e-9, atol=1e-12)
    for c, block in enumerate(own):
        np.testing.assert_allclose(blocks.cross[c], inverse[:shared, block], rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(blocks.own[c], inverse[block, block], rtol=1e-8, atol=1e-11)
    target = rng.normal(size=size)
    first, rest = solve(head, cross, tail, target[:shared], target[shared:].reshape(-1, 3))
    np.testing.assert_allclose(np.r_[first, rest.ravel()], inverse @ target, rtol=1e-8)
    assert log_determinant(head, cross, tail) == pytest.approx(np.linalg.slogdet(dense)[1])


def test_the_best_rate_at_a_batch_is_the_least_of_a_fine_grid():
    v = np.array([-1.5, 0.0, 0.7, 2.0])
    u = np.linspace(-3, 3, 6001)
    best = best_rate(v, VALLEY)
    for at, found in zip(v, best, strict=True):
        assert found == pytest.approx(u[gap(u, np.full_like(u, at), VALLEY).argmin()], abs=2e-3)
    assert best[1] == pytest.approx(0, abs=1e-9)


def test_each_row_may_have_a_valley_of_its_own():
    rng = np.random.default_rng(0)
    u, v = rng.normal(0, 1, (2, 5))
    rows = VALLEY + 0.1 * rng.standard_normal((5, PARAMETERS))
    value, slope, _ = gap_derivatives(u, v, rows)
    for k in range(5):
        one = gap_derivatives(u[k : k + 1], v[k : k + 1], rows[k])
        assert value[k] == pytest.approx(one[0][0])
        np.testing.assert_allclose(slope[k], one[1][0])
