"""The solver: sum of Huber losses on log loss, minimised to tight convergence for many problems at once.

Many starts and many bootstrap resamples of one design are solved together in numpy. The exponents'
starting grid is paired with amplitudes solved for linearly (variable projection: with the exponents
fixed, every law is linear in its amplitudes); the best are polished by a damped Newton method with the
exact Hessian, while the Huber width shrinks to its final value.

The width of 1e-3 makes the objective nearly a sum of absolute values: its Hessian is piecewise and often
indefinite, which is why loosely converged first-order optimizers stop early here (Besiroglu et al. 2024,
arXiv 2404.10102, on the original Chinchilla fit).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.stats import qmc

from raysweep.scaling.evaluation import evaluate
from raysweep.scaling.form import Design

HUBER = 1e-3
TOLERANCE = 1e-9  # of the gradient, relative to width * sum of weights
FIRST_WIDTH = 0.1
SHRINK = 0.2
MAX_STEP = 2.0
MAX_ITERATIONS = 300
CHUNK = 128  # problems solved together: their arrays stay in cache


@dataclass(frozen=True)
class Solution:
    """Local minima of B problems, in centred coordinates."""

    theta: np.ndarray  # [B, p]
    objective: np.ndarray  # [B]
    gradient: np.ndarray  # [B] largest free component, relative to width * sum of weights
    converged: np.ndarray  # [B] bool
    at_bound: np.ndarray  # [B, p] bool
    iterations: np.ndarray  # [B]


@dataclass(frozen=True)
class Bounds:
    """The box of the fitted, centred coefficients; `free` is False for a coefficient held fixed."""

    low: np.ndarray  # [p]
    high: np.ndarray
    free: np.ndarray


def huber(residuals: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """Huber's loss: r^2/2 within `width`, width * (|r| - width/2) beyond."""
    size = np.abs(residuals)
    inner = np.minimum(size, width)
    return inner * (size - 0.5 * inner)


def minimise(
    design: Design,
    target: np.ndarray,
    weights: np.ndarray,
    start: np.ndarray,
    bounds: Bounds,
    width: float = HUBER,
    first_width: float = FIRST_WIDTH,
    workers: int | None = None,
) -> Solution:
    """Minimise sum_i weights_i * huber(log predicted_i - target_i) from every row of `start`.

    `target` (log loss) and `weights` are [n] or [B, n]; `start` is [B, p] in centred coordinates."""
    problems = len(start)
    # Small chunks keep arrays in cache; two threads share the rest, as numpy releases the GIL.
    pieces = [slice(k, min(k + CHUNK, problems)) for k in range(0, problems, CHUNK)]

    def solve(piece: slice) -> Solution:
        return _newton(
            design,
            target if target.ndim == 1 else target[piece],
            weights if weights.ndim == 1 else weights[piece],
            start[piece],
            bounds,
            width,
            first_width,
        )

    workers = workers or min(len(pieces), os.cpu_count() or 1)
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(solve, pieces))
    else:
        parts = [solve(piece) for piece in pieces]
    fields = [np.concatenate([getattr(p, f) for p in parts]) for f in Solution.__dataclass_fields__]
    return Solution(*fields)


def starting_points(
    design: Design,
    target: np.ndarray,
    weights: np.ndarray,
    bounds: Bounds,
    fixed: np.ndarray,
    candidates: int,
    keep: int,
) -> np.ndarray:
    """The `keep` most promising of many starts, [keep, p] centred.

    Exponents are a low-discrepancy sample of their starting ranges; for each the amplitudes are the
    non-negative weighted least squares solution in relative error. `fixed` [p] holds the centred values of
    the coefficients that are not free (NaN elsewhere)."""
    form = design.form
    size = len(form.names)
    draw = [j for j, c in enumerate(form.coefficients) if c.kind in ("exponent", "saturation")]
    theta = np.zeros((candidates, size))
    if draw:
        unit = qmc.Sobol(len(draw), seed=0).random(candidates)
        low = np.array([form.coefficients[j].start[0] for j in draw])
        high = np.array([form.coefficients[j].start[1] for j in draw])
        theta[:, draw] = low + unit * (high - low)
    held = ~bounds.free
    theta[:, held] = fixed[held]
    theta = np.clip(theta, np.where(bounds.free, bounds.low, -np.inf), np.where(bounds.free, bounds.high, np.inf))

    amplitudes = [j for j, c in enumerate(form.coefficients) if c.kind in ("amplitude", "log10")]
    solve_for = [j for j in amplitudes if bounds.free[j]]
    if solve_for:
        theta[:, solve_for] = _project(design, target, weights, theta, solve_for, bounds)
    value = evaluate(design, theta, derivatives=False).value
    scores = (weights * huber(value - target, 0.02)).sum(axis=1)
    order = np.argsort(np.where(np.isfinite(scores), scores, np.inf), kind="stable")
    return theta[order[:keep]]


def _project(
    design: Design,
    target: np.ndarray,
    weights: np.ndarray,
    theta: np.ndarray,
    amplitudes: list[int],
    bounds: Bounds,
) -> np.ndarray:
    """Log amplitudes [B, k] that fit best for given exponents: projected coordinate descent on the
    normal equations, which keeps them positive."""
    bare = theta.copy()
    bare[:, amplitudes] = 0.0
    evaluation = evaluate(design, bare)
    relative = np.exp(evaluation.value - target)  # predicted / observed with amplitudes of one
    column_of = {int(part.index[0]): part.share for part in evaluation.parts if part.share is not None}
    columns = np.stack([column_of[j] * relative for j in amplitudes], axis=-1)  # [B, n, k]
    rest = sum((s * relative for j, s in column_of.items() if j not in amplitudes), start=np.zeros(1))
    right = (weights * (1.0 - rest))[..., None] * columns
    normal = np.einsum("n,bni,bnj->bij", weights, columns, columns)
    target_moment = right.sum(axis=1)
    low, high = np.exp(bounds.low[amplitudes]), np.exp(bounds.high[amplitudes])
    values = np.full((len(theta), len(amplitudes)), 1.0 / len(amplitudes))
    for _ in range(200):
        for i in range(len(amplitudes)):
            others = (normal[:, i] * values).sum(axis=1) - normal[:, i, i] * values[:, i]
            best = (target_moment[:, i] - others) / np.maximum(normal[:, i, i], 1e-300)
            values[:, i] = np.clip(best, low[i], high[i])
    # A term squeezed out by its neighbours would start on a plateau: give it a per cent.
    return np.log(np.maximum(values, 0.01))


def _newton(
    design: Design,
    target: np.ndarray,
    weights: np.ndarray,
    start: np.ndarray,
    bounds: Bounds,
    width: float,
    first_width: float,
) -> Solution:
    """Damped Newton on B problems with a shrinking Huber width; rows leave when they converge."""
    problems, size = start.shape
    free_low = np.where(bounds.free, bounds.low, -np.inf)
    free_high = np.where(bounds.free, bounds.high, np.inf)
    target = np.broadcast_to(target, (problems, target.shape[-1]))
    weights = np.broadcast_to(weights, (problems, weights.shape[-1]))
    mass = weights.sum(axis=1)

    out_theta = np.clip(start, free_low, free_high)
    out_f = np.full(problems, np.inf)
    out_slope = np.full(problems, np.inf)
    converged = np.zeros(problems, dtype=bool)
    iterations = np.zeros(problems, dtype=int)

    # state of the rows still running
    rows = np.arange(problems)
    theta = out_theta.copy()
    trial = theta.copy()
    delta = np.full(problems, max(first_width, width))
    damping = np.full(problems, 1e-3)
    f = np.full(problems, np.inf)
    g = np.zeros((problems, size))
    hess = np.zeros((problems, size, size))
    slope = np.full(problems, np.inf)
    predicted = np.zeros(problems)

    for iteration in range(MAX_ITERATIONS):
        y, w = target[rows], weights[rows]
        d = delta[:, None]
        at = evaluate(design, trial)
        residual = at.value - y
        pull = w * np.clip(residual, -d, d)
        f_new = (w * huber(residual, d)).sum(axis=1)
        g_new = at.gradient(pull)
        hess_new = at.hessian(w * (np.abs(residual) <= d), pull)
        slope_new = _free_slope(trial, g_new, free_low, free_high, bounds.free)

        gain = f - f_new
        level = np.abs(f_new - f) <= 1e-13 * np.abs(f)
        finite = np.isfinite(f_new) & np.isfinite(g_new).all(axis=1)
        accept = finite & ((gain > 1e-4 * predicted) | (level & (slope_new < slope)))
        ratio = np.where(accept & np.isfinite(gain), gain / np.maximum(predicted, 1e-300), 1.0)
        damping = np.where(
            accept,
            np.where(ratio > 0.5, damping * 0.1, np.where(ratio < 0.1, damping * 3, damping)),
            np.maximum(damping, 1e-8) * 8,
        )
        damping = np.maximum(damping, 1e-16)
        theta = np.where(accept[:, None], trial, theta)
        f = np.where(accept, f_new, f)
        slope = np.where(accept, slope_new, slope)
        g = np.where(accept[:, None], g_new, g)
        hess = np.where(accept[:, None, None], hess_new, hess)

        relative = slope / (delta * mass[rows])
        last = delta <= width
        done = last & (relative <= TOLERANCE)
        shrink = ~last & (relative <= 1e-3)
        # A stage whose gradient no longer falls (a kink at this width) moves on to the next too.
        stuck = damping > 1e10
        shrink |= stuck & ~last
        gone = done | (stuck & last)
        leaving = rows[gone]
        out_theta[leaving], out_f[leaving] = theta[gone], f[gone]
        out_slope[leaving], converged[leaving] = relative[gone], done[gone]
        iterations[leaving] = iteration

        delta = np.where(shrink, np.maximum(delta * SHRINK, width), delta)
        stay = ~gone
        if not stay.any():
            break
        state = (rows, theta, delta, damping, f, g, hess, slope, shrink)
        rows, theta, delta, damping, f, g, hess, slope, shrink = (a[stay] for a in state)
        step, predicted = _step(theta, g, hess, damping, free_low, free_high, bounds.free)
        # A new width changes the objective: look again from the same place, and accept what is seen.
        step[shrink] = 0.0
        predicted = np.where(shrink, 0.0, predicted)
        f = np.where(shrink, np.inf, f)
        damping = np.where(shrink, 1e-3, damping)
        trial = np.clip(theta + step, free_low, free_high)
    else:
        out_theta[rows], out_f[rows] = theta, f
        out_slope[rows] = slope / (delta * mass[rows])
        iterations[rows] = MAX_ITERATIONS

    at_bound = bounds.free & ((out_theta <= free_low) | (out_theta >= free_high))
    return Solution(out_theta, out_f, out_slope, converged, at_bound, iterations)


def _free_slope(
    theta: np.ndarray, g: np.ndarray, low: np.ndarray, high: np.ndarray, free: np.ndarray
) -> np.ndarray:
    """The largest gradient component that can still be followed inside the box, [B]."""
    blocked = ((theta <= low) & (g > 0)) | ((theta >= high) & (g < 0)) | ~free
    return np.abs(np.where(blocked, 0.0, g)).max(axis=1)


def _step(
    theta: np.ndarray,
    g: np.ndarray,
    hess: np.ndarray,
    damping: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    free: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A damped Newton step [B, p] and the decrease it promises [B].

    Eigenvalues are taken by size, so directions of negative curvature are descended along too."""
    size = theta.shape[1]
    blocked = ((theta <= low) & (g > 0)) | ((theta >= high) & (g < 0)) | ~free
    g = np.where(blocked, 0.0, g)
    keep = ~blocked
    hess = np.where(keep[:, :, None] & keep[:, None, :], hess, 0.0)
    values, vectors = np.linalg.eigh(hess)
    values = np.abs(values)
    top = values.max(axis=1, keepdims=True)
    values = np.maximum(values, 1e-14 * top) + damping[:, None] * np.maximum(top, 1e-300)
    along = np.matmul(vectors.swapaxes(1, 2), g[..., None])[..., 0]
    step = -np.matmul(vectors, (along / values)[..., None])[..., 0]
    longest = np.abs(step).max(axis=1, keepdims=True)
    step = step * np.minimum(1.0, MAX_STEP / np.maximum(longest, 1e-300))
    step = np.clip(theta + step, low, high) - theta
    quadratic = np.einsum("bi,bij,bj->b", step, hess, step)
    predicted = np.maximum(-(g * step).sum(axis=1) - 0.5 * quadratic, 0.0)
    assert step.shape[1] == size
    return step, predicted
