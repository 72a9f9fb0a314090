"""The solver: sum of Huber losses on log loss, many problems minimised at once and tightly.

Many starts and many bootstrap resamples of one design are solved together in numpy. The exponents'
starting grid is paired with amplitudes solved for linearly (variable projection: with the exponents
fixed, every law is linear in its amplitudes); the best are polished by a damped Newton method with
the exact Hessian, while the Huber width shrinks to its final value. Steps are bent along the
curved valleys of such fits (geodesic acceleration, Transtrum & Sethna 2012, arXiv 1201.5885).

The width of 1e-3 makes the objective nearly a sum of absolute values: its Hessian is piecewise and
often indefinite, which is why loosely converged first-order optimizers stop early here (Besiroglu
et al. 2024, arXiv 2404.10102, on the original Chinchilla fit).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from raysweep.scaling.loss.expression import Design, evaluate

HUBER = 1e-3
TOLERANCE = 1e-9  # of the gradient, relative to width * sum of weights
FIRST_WIDTH = 0.1
SHRINK = 0.2
STAGE_TOLERANCE = 1e-3  # of the gradient, before the width shrinks
MAX_STEP = 2.0
PROBE = 0.1  # part of a step that the path's bend is measured over
MAX_ITERATIONS = 600
MAX_DAMPING = 1e10
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

    `target` (log loss) and `weights` are [n] or [B, n]; `start` is [B, p] in centred
    coordinates."""
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
    non-negative weighted least squares solution in relative error. `fixed` [p] holds the centred
    values of the coefficients that are not free (NaN elsewhere)."""
    expression = design.expression
    size = len(expression.names)
    draw = [
        j for j, c in enumerate(expression.coefficients) if c.kind in ("exponent", "saturation")
    ]
    theta = np.zeros((candidates, size))
    if draw:
        unit = _low_discrepancy(candidates, len(draw))
        low = np.array([expression.coefficients[j].start[0] for j in draw])
        high = np.array([expression.coefficients[j].start[1] for j in draw])
        theta[:, draw] = low + unit * (high - low)
    held = ~bounds.free
    theta[:, held] = fixed[held]
    theta = np.clip(
        theta,
        np.where(bounds.free, bounds.low, -np.inf),
        np.where(bounds.free, bounds.high, np.inf),
    )

    amplitudes = [
        j for j, c in enumerate(expression.coefficients) if c.kind in ("amplitude", "log10")
    ]
    solve_for = [j for j in amplitudes if bounds.free[j]]
    if solve_for:
        theta[:, solve_for] = _project(design, target, weights, theta, solve_for, bounds)
    value = evaluate(design, theta, derivatives=False).value
    scores = (weights * huber(value - target, 0.02)).sum(axis=1)
    order = np.argsort(np.where(np.isfinite(scores), scores, np.inf), kind="stable")
    return theta[order[:keep]]


def _low_discrepancy(count: int, dims: int) -> np.ndarray:
    """[count, dims] points that fill the unit cube evenly: the additive recurrence with powers of
    the root of x^(dims + 1) = x + 1 (Roberts 2018). SciPy's Sobol would cost 0.3 s of imports."""
    root = 2.0
    for _ in range(40):
        root = (1 + root) ** (1 / (dims + 1))
    steps = root ** -np.arange(1.0, dims + 1)
    return (0.5 + np.arange(1, count + 1)[:, None] * steps) % 1


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
    column_of = {
        int(part.index[0]): part.share for part in evaluation.parts if part.share is not None
    }
    columns = np.stack([column_of[j] * relative for j in amplitudes], axis=-1)  # [B, n, k]
    rest = sum(
        (s * relative for j, s in column_of.items() if j not in amplitudes), start=np.zeros(1)
    )
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


@dataclass
class _Point:
    """The objective and what a step needs to know of it, at one place for each of B problems."""

    theta: np.ndarray  # [B, p]
    objective: np.ndarray  # [B]
    gradient: np.ndarray  # [B, p]
    hessian: np.ndarray  # [B, p, p]
    value: np.ndarray  # [B, n] predicted log loss
    jacobian: np.ndarray  # [B, n, p]
    inner: np.ndarray  # [B, n] weight of the points within the Huber width
    slope: np.ndarray  # [B] largest gradient component that the box leaves free

    def take(self, rows: np.ndarray) -> _Point:
        return _Point(*(getattr(self, f)[rows] for f in _Point.__dataclass_fields__))

    def replaced(self, rows: np.ndarray, other: _Point) -> _Point:
        """`other` where `rows` [B] is true, else itself."""

        def pick(name: str) -> np.ndarray:
            old, new = getattr(self, name), getattr(other, name)
            return np.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return _Point(*(pick(f) for f in _Point.__dataclass_fields__))


@dataclass(frozen=True)
class _Box:
    low: np.ndarray  # [p], -inf for coefficients that are held
    high: np.ndarray
    free: np.ndarray

    def blocked(self, theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Coefficients [B, p] that are held, or on an edge that descent would cross."""
        outward = ((theta <= self.low) & (gradient > 0)) | ((theta >= self.high) & (gradient < 0))
        return outward | ~self.free


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
    problems = len(start)
    box = _Box(
        np.where(bounds.free, bounds.low, -np.inf),
        np.where(bounds.free, bounds.high, np.inf),
        bounds.free,
    )
    target = np.broadcast_to(target, (problems, target.shape[-1]))
    weights = np.broadcast_to(weights, (problems, weights.shape[-1]))
    mass = weights.sum(axis=1)
    out = Solution(
        theta=np.clip(start, box.low, box.high),
        objective=np.full(problems, np.inf),
        gradient=np.full(problems, np.inf),
        converged=np.zeros(problems, dtype=bool),
        at_bound=np.zeros(start.shape, dtype=bool),
        iterations=np.zeros(problems, dtype=int),
    )

    rows = np.arange(problems)  # those still running; everything below is theirs
    widths = np.full(problems, max(first_width, width))
    damping = np.full(problems, 1e-3)
    point = _look(design, out.theta, target, weights, widths, box)
    for iteration in range(1, MAX_ITERATIONS + 1):
        relative = point.slope / (widths * mass[rows])
        last, stuck = widths <= width, damping > MAX_DAMPING
        done = last & (relative <= TOLERANCE)
        leave = done | (last & stuck) | (iteration == MAX_ITERATIONS)
        gone = rows[leave]
        out.theta[gone], out.objective[gone] = point.theta[leave], point.objective[leave]
        out.gradient[gone], out.converged[gone] = relative[leave], done[leave]
        out.iterations[gone] = iteration
        stay = ~leave
        if not stay.any():
            break
        # A wide stage need not be exact, and one stuck on a kink of its own may move on too.
        narrow = (~last & ((relative <= STAGE_TOLERANCE) | stuck))[stay]
        rows, widths, damping, point = rows[stay], widths[stay], damping[stay], point.take(stay)
        y, w = target[rows], weights[rows]
        widths = np.where(narrow, np.maximum(widths * SHRINK, width), widths)
        step, promised = _step(design, point, damping, box)
        # A new width is a new objective: look again from the same place and take what is seen.
        step[narrow] = 0.0
        there = _look(design, np.clip(point.theta + step, box.low, box.high), y, w, widths, box)

        gain = point.objective - there.objective
        # Where the objective's last digits are spent, the gradient still tells which is closer.
        level = np.abs(gain) <= 1e-13 * np.abs(point.objective)
        finite = np.isfinite(there.objective) & np.isfinite(there.gradient).all(axis=1)
        better = (gain > 1e-4 * promised) | (level & (there.slope < point.slope))
        accept = finite & (better | narrow)
        ratio = gain / np.maximum(promised, 1e-300)
        eased = np.where(ratio < 0.1, damping * 3, damping)
        eased = np.where((ratio > 0.5) | level, damping * 0.1, eased)
        damping = np.where(accept, np.maximum(eased, 1e-16), np.maximum(damping, 1e-8) * 8)
        damping = np.where(narrow, 1e-3, damping)
        point = point.replaced(accept, there)

    edge = (out.theta <= box.low) | (out.theta >= box.high)
    return replace(out, at_bound=bounds.free & edge)


def _look(
    design: Design,
    theta: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    widths: np.ndarray,
    box: _Box,
) -> _Point:
    """Objective and derivatives at `theta` [B, p], with each problem's own Huber width [B]."""
    at = evaluate(design, theta)
    residual, d = at.value - target, widths[:, None]
    inner = weights * (np.abs(residual) <= d)
    pull = weights * np.clip(residual, -d, d)
    gradient = at.gradient(pull)
    return _Point(
        theta=theta,
        objective=(weights * huber(residual, d)).sum(axis=1),
        gradient=gradient,
        hessian=at.hessian(inner, pull),
        value=at.value,
        jacobian=at.jacobian(),
        inner=inner,
        slope=np.abs(np.where(box.blocked(theta, gradient), 0.0, gradient)).max(axis=1),
    )


def _step(
    design: Design, point: _Point, damping: np.ndarray, box: _Box
) -> tuple[np.ndarray, np.ndarray]:
    """A damped Newton step [B, p], bent along the valley, and the decrease it promises [B].

    Eigenvalues are taken by size, so directions of negative curvature are descended along too."""
    blocked = box.blocked(point.theta, point.gradient)
    open_ = ~blocked
    hessian = np.where(open_[:, :, None] & open_[:, None, :], point.hessian, 0.0)
    values, vectors = np.linalg.eigh(hessian)
    values = np.abs(values)
    # With every point beyond its Huber width the Hessian of a plain power law is zero: there the
    # damping takes its scale from the gradient, or no amount of it would shorten the step.
    steepest = np.abs(np.where(blocked, 0.0, point.gradient)).max(axis=1, keepdims=True)
    top = np.maximum(values.max(axis=1, keepdims=True), steepest / MAX_STEP)
    top = np.maximum(top, 1e-300)
    values = np.maximum(values, 1e-14 * top) + damping[:, None] * top

    def solve(right: np.ndarray) -> np.ndarray:
        along = _times(vectors.swapaxes(1, 2), np.where(blocked, 0.0, right))
        return _times(vectors, along / values)

    gradient = np.where(blocked, 0.0, point.gradient)
    step = -solve(gradient)
    longest = np.abs(step).max(axis=1, keepdims=True)
    step *= np.minimum(1.0, MAX_STEP / np.maximum(longest, 1e-300))
    step = np.clip(point.theta + step, box.low, box.high) - point.theta
    quadratic = (step * _times(hessian, step)).sum(axis=1)
    promised = np.maximum(-(gradient * step).sum(axis=1) - 0.5 * quadratic, 0.0)

    # Second directional derivative of the predictions, and the correction that cancels it.
    ahead = evaluate(design, point.theta + PROBE * step, derivatives=False).value
    bend = 2 / PROBE * ((ahead - point.value) / PROBE - _times(point.jacobian, step))
    turn = -0.5 * solve(_times(point.jacobian.swapaxes(1, 2), point.inner * bend))
    mild = np.linalg.norm(turn, axis=1) <= 0.75 * np.linalg.norm(step, axis=1)
    return np.where(mild[:, None], step + turn, step), promised


def _times(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Batched matrix times vector: [B, m, k] and [B, k] -> [B, m]."""
    return np.matmul(matrices, vectors[..., None])[..., 0]
