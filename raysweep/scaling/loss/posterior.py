"""LawPosterior: a law with a weak prior on its coefficients and a smooth departure from the law.

No law of the loss is exact: what a fit leaves over is smooth in the sizes, and a law that takes it
for noise is too sure of itself, most of all beyond its cells. So

    ln L = ln law(coefficients; x) + departure(x) + noise

with the coefficients' prior as declared with the law, the departure a Gaussian process over the
logs of the law's inputs, and noise with the heavy tails of Student's t (its weights found by
iteration). The two widths are those of greatest evidence (Laplace's approximation), under weak
priors. The exponents, which a narrow range of compute tells only if the law were exact, are thus
held by the prior until the data say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import minimize

from raysweep.scaling.loss.expression import (
    Design,
    Inputs,
    compile_expression,
    evaluate,
    read_inputs,
)
from raysweep.scaling.loss.laws import Law

LENGTH = 3.0
"""Length over which a departure forgets, in the log of an input: a factor of 20."""

DEPARTURE, NOISE = (0.006, 1.0), (0.004, 1.5)
"""Priors of the two widths in ln loss: the median and the sd of the log."""

TAILS = 4.0
"""Degrees of freedom of the noise."""

ROUNDS, FINE = 3, 6
"""Rounds of coefficients, widths and weights: of a fit that is compared, of one that answers."""

STEPS = 60

LEAST = 1e-6
"""sd of ln loss that every loss has: below it a covariance cannot be factored."""

LEFT = 1e-12
"""Share of a departure's variance that its factor may leave out."""


@dataclass(frozen=True, eq=False)
class Scatter:
    """The covariance diag(variance) + factor factor^T of n losses about the law.

    A smooth departure at n places is one of few: with r columns of the factor, all here costs
    n r^2, by the lemmas of Woodbury and of Sylvester."""

    variance: np.ndarray  # [n]
    factor: np.ndarray  # [n, r]

    def whiten(self, values: np.ndarray) -> np.ndarray:
        """Values [n, ...] times a root W of the inverse covariance: W^T W is that inverse."""
        left, scaled, shrunk = self._root
        values = values / left if values.ndim == 1 else values / left[:, None]
        return values - scaled @ ((scaled.T @ values).T * shrunk).T

    def solve(self, values: np.ndarray) -> np.ndarray:
        """The inverse covariance times values [n]."""
        left, scaled, shrunk = self._root
        whitened = self.whiten(values)
        return (whitened - scaled @ ((scaled.T @ whitened) * shrunk)) / left

    def minus_log_density(self, values: np.ndarray) -> float:
        """Of values [n], but for a constant."""
        scale = np.sqrt(self.variance)
        scaled, values = self.factor / scale[:, None], values / scale
        root = np.linalg.cholesky(np.eye(scaled.shape[1]) + scaled.T @ scaled)
        known = solve_triangular(root, scaled.T @ values, lower=True)
        size = np.log(scale).sum() + np.log(np.diag(root)).sum()
        return float(0.5 * (values @ values - known @ known) + size)

    @cached_property
    def _root(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """sds [n]; an orthonormal base [n, r] of the scaled factor; what is taken off along it."""
        scale = np.sqrt(self.variance)
        base, values, _ = np.linalg.svd(self.factor / scale[:, None], full_matrices=False)
        return scale, base, 1 - 1 / np.sqrt(1 + values**2)


@dataclass(frozen=True, eq=False)
class LawPosterior:
    """What n losses tell of a law's p coefficients and of its departure, by Laplace's method."""

    law: Law
    design: Design
    logs: np.ndarray  # [n, k] log inputs of the data
    theta: np.ndarray  # [p] centred coefficients at the mode
    covariance: np.ndarray  # [p, p] of them
    departure: float  # sd
    noise: float  # sd of the noise at weight 1
    noise_sd: float  # of a new loss
    at_bound: tuple[str, ...]
    scatter: Scatter  # departure + noise of the n losses
    jacobian: np.ndarray  # [n, p] at the mode
    target: np.ndarray  # [n] ln loss

    def mean(self, inputs: Inputs) -> np.ndarray:
        """The expected ln loss [m] of runs."""
        at = evaluate(self._design(inputs), self._mode_uncentred[None], derivatives=False)
        return at.value[0] + self._kernel(self._logs(inputs), self.logs) @ self._pull

    def predict(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """The expected ln loss [m] of runs and its sd, without the noise of a run."""
        mean, slopes, weights = self._at(inputs)
        left = np.maximum(self.departure**2 - (weights**2).sum(axis=0), 0.0)
        spread = np.einsum("mp,pq,mq->m", slopes, self.covariance, slopes)
        return mean, np.sqrt(left + spread)

    def draws(
        self, inputs: Inputs, count: int, rng: np.random.Generator, scale: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Joint draws [count, m] of the expected ln loss of runs, each `scale` [count] as far from
        the mean: coefficients through the law itself, and the departure given them."""
        coefficients = self.coefficient_draws(count, rng, scale)
        new = self._design(inputs)
        value = evaluate(new, coefficients @ self._uncentring.T, derivatives=False).value
        seen = evaluate(self.design, coefficients, derivatives=False).value
        logs = self._logs(inputs)
        weights = self.scatter.whiten(self._kernel(self.logs, logs))  # [n, m]
        left = self.scatter.whiten((self.target - seen).T)
        covariance = self._kernel(logs, logs) - weights.T @ weights
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        own = rng.standard_normal((count, len(logs))) @ root.T
        return value + left.T @ weights + own * np.reshape(scale, (-1, 1))

    def coefficient_draws(
        self, count: int, rng: np.random.Generator, scale: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Draws [count, p] of the centred coefficients, inside their ranges."""
        values, vectors = np.linalg.eigh(self.covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        draws = rng.standard_normal((count, len(self.theta))) @ root.T * np.reshape(scale, (-1, 1))
        low, high = _box(self.law)
        return np.clip(self.theta + draws, low, high)

    def stated(self, theta: np.ndarray) -> np.ndarray:
        """Centred coefficients [..., p] as the law's formula states them."""
        return self.law.expression.state(theta @ self._uncentring.T)

    @cached_property
    def _uncentring(self) -> np.ndarray:
        return np.linalg.inv(self.design.to_centred)

    @cached_property
    def _mode_uncentred(self) -> np.ndarray:
        return self._uncentring @ self.theta

    @cached_property
    def _pull(self) -> np.ndarray:
        """What the data leave of the law [n], over the covariance of departure and noise."""
        seen = evaluate(self.design, self.theta[None], derivatives=False).value[0]
        return self.scatter.solve(self.target - seen)

    @cached_property
    def _whitened(self) -> np.ndarray:
        """The Jacobian [n, p] over the root of that covariance."""
        return self.scatter.whiten(self.jacobian)

    def _design(self, inputs: Inputs) -> Design:
        expression = self.law.expression
        return compile_expression(expression, read_inputs(expression, inputs), centre=False)

    def _logs(self, inputs: Inputs) -> np.ndarray:
        return _features(read_inputs(self.law.expression, inputs))

    def _kernel(self, one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return self.departure**2 * correlation(one, two)

    def _at(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean [m]; its slopes by the coefficients [m, p]; the whitened kernel [n, m]."""
        at = evaluate(self._design(inputs), self._mode_uncentred[None])
        slopes = at.jacobian()[0] @ self._uncentring
        kernel = self._kernel(self.logs, self._logs(inputs))
        weights = self.scatter.whiten(kernel)
        mean = at.value[0] + kernel.T @ self._pull
        return mean, slopes - weights.T @ self._whitened, weights


def correlation(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Squared-exponential correlation [n, m] of departures at log inputs [n, k] and [m, k]."""
    square = ((one[:, None, :] - two[None, :, :]) ** 2).sum(axis=-1)
    return np.exp(-0.5 * square / LENGTH**2)


def correlation_factor(logs: np.ndarray) -> np.ndarray:
    """[n, r] F with F F^T the correlation at log inputs [n, k], but for `LEFT`: Cholesky's
    factorization that takes the place least known as the next."""
    left, factor = np.ones(len(logs)), np.zeros((len(logs), len(logs)))
    for rank in range(len(logs)):
        next_ = int(left.argmax())
        if left[next_] < LEFT:
            return factor[:, :rank]
        known = factor[:, :rank] @ factor[next_, :rank]
        new = (correlation(logs, logs[next_, None])[:, 0] - known) / np.sqrt(left[next_])
        factor[:, rank], left = new, left - new**2
    return factor


def fit_posterior(
    law: Law,
    inputs: Inputs,
    loss: np.ndarray,
    log_se: np.ndarray,
    *,
    run_sd: float = 0.0,
    fine: bool = False,
) -> LawPosterior:
    """The posterior of a law given losses [n] with known sds of ln loss (0 where none is known).

    `run_sd` is what a new run has of its own beyond the scatter of the (averaged) data. `fine`
    takes the iterations that an answer deserves. Any number of losses will do: where they say
    little the prior speaks, with its width."""
    logs = read_inputs(law.expression, inputs)
    design = compile_expression(law.expression, logs, centre=True)
    target = np.log(loss)
    factor = correlation_factor(_features(logs))
    problem = _Problem(law, design, target, log_se**2, *_prior(law, target), factor)
    widths = np.array([DEPARTURE[0], NOISE[0]])
    weights = np.ones(len(target))
    theta = _first(problem, widths, weights)
    for _ in range(FINE if fine else ROUNDS):
        jacobian = evaluate(design, theta[None]).jacobian()[0]
        widths = _widths(problem, theta, jacobian, widths, weights)
        weights = _weights(problem, theta, widths, weights)
        theta, _ = _mode(problem, theta, widths, weights)
    scatter = problem.scatter(widths, weights)
    jacobian = evaluate(design, theta[None]).jacobian()[0]
    whitened = scatter.whiten(jacobian)
    covariance = np.linalg.inv(whitened.T @ whitened + np.diag(problem.precision))
    low, high = _box(law)
    stuck = (theta <= low) | (theta >= high)
    noise_sd = float(np.hypot(widths[1] / np.sqrt(weights.mean()), run_sd))
    return LawPosterior(
        law=law,
        design=design,
        logs=_features(logs),
        theta=theta,
        covariance=covariance,
        departure=float(widths[0]),
        noise=float(widths[1]),
        noise_sd=noise_sd,
        at_bound=tuple(n for n, s in zip(law.names, stuck, strict=True) if s),
        scatter=scatter,
        jacobian=jacobian,
        target=target,
    )


@dataclass(frozen=True, eq=False)
class _Problem:
    """What the fit of one law to n losses needs, prepared once."""

    law: Law
    design: Design
    target: np.ndarray  # [n] ln loss
    known: np.ndarray  # [n] known variance of it
    centre: np.ndarray  # [p] prior mean
    precision: np.ndarray  # [p] prior precision
    factor: np.ndarray  # [n, r] of the correlation of departures

    def scatter(self, widths: np.ndarray, weights: np.ndarray) -> Scatter:
        """Departure and noise."""
        variance = widths[1] ** 2 / weights + self.known + LEAST**2
        return Scatter(variance, widths[0] * self.factor)


def _features(logs: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.stack(list(logs.values()), axis=1)


def _box(law: Law) -> tuple[np.ndarray, np.ndarray]:
    coefficients = law.expression.coefficients
    return np.array([c.low for c in coefficients]), np.array([c.high for c in coefficients])


def _prior(law: Law, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision [p] of the centred coefficients; amplitudes as shares of a typical
    loss."""
    typical = float(np.median(target))
    centre, sd = [], []
    for coefficient in law.expression.coefficients:
        mean, width = coefficient.prior
        amplitude = coefficient.kind in ("amplitude", "log10")
        centre.append(typical + np.log(mean) if amplitude else mean)
        sd.append(width)
    return np.array(centre), np.array(sd) ** -2.0


def _first(problem: _Problem, widths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The best mode from the prior's centre and from exponents half and one and a half as large."""
    exponent = np.array([c.kind == "exponent" for c in problem.law.expression.coefficients])
    starts = [np.where(exponent, f * problem.centre, problem.centre) for f in (1.0, 0.5, 1.5)]
    found = [_mode(problem, start, widths, weights) for start in starts]
    return min(found, key=lambda pair: pair[1])[0]


def _mode(
    problem: _Problem, theta: np.ndarray, widths: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, float]:
    """The most probable coefficients [p] at given widths, by damped Gauss-Newton steps; and minus
    their log posterior."""
    scatter = problem.scatter(widths, weights)
    low, high = _box(problem.law)

    def look(at: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        found = evaluate(problem.design, at[None])
        stacked = np.column_stack([problem.target - found.value[0], found.jacobian()[0]])
        stacked = scatter.whiten(stacked)
        off = at - problem.centre
        value = 0.5 * (stacked[:, 0] @ stacked[:, 0] + off @ (problem.precision * off))
        return float(value), stacked[:, 0], stacked[:, 1:]

    theta = np.clip(theta, low, high)
    value, residual, jacobian = look(theta)
    damping = 1e-3
    for _ in range(STEPS):
        hessian = jacobian.T @ jacobian + np.diag(problem.precision)
        gradient = problem.precision * (theta - problem.centre) - jacobian.T @ residual
        step = -np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        step *= min(1.0, 1.0 / np.abs(step).max()) if step.any() else 1.0
        there = np.clip(theta + step, low, high)
        tried = look(there)
        if tried[0] < value:
            small = value - tried[0] < 1e-8 * max(value, 1.0)
            theta, (value, residual, jacobian) = there, tried
            damping = max(damping / 5, 1e-9)
            if small:
                break
        else:
            damping *= 6
            if damping > 1e8:
                break
    return theta, value


def _widths(
    problem: _Problem,
    theta: np.ndarray,
    jacobian: np.ndarray,
    widths: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """The sds of departure and noise of greatest evidence, the law linear about its mode."""
    value = evaluate(problem.design, theta[None], derivatives=False).value[0]
    off = problem.target - value + jacobian @ (theta - problem.centre)
    law = jacobian / np.sqrt(problem.precision)
    middle, spread = np.log([DEPARTURE[0], NOISE[0]]), np.array([DEPARTURE[1], NOISE[1]])

    def minus_evidence(log_widths: np.ndarray) -> float:
        own = problem.scatter(np.exp(log_widths), weights)
        both = Scatter(own.variance, np.column_stack([own.factor, law]))
        prior = 0.5 * (((log_widths - middle) / spread) ** 2).sum()
        return both.minus_log_density(off) + float(prior)

    options = {"xatol": 0.02, "fatol": 0.01, "maxiter": 60}
    found = minimize(minus_evidence, np.log(widths), method="Nelder-Mead", options=options)
    return np.exp(found.x)


def _weights(
    problem: _Problem, theta: np.ndarray, widths: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Weights [n], at most 1, of Student's t: what stands apart from law and departure counts
    less."""
    value = evaluate(problem.design, theta[None], derivatives=False).value[0]
    residual = problem.target - value
    scatter = problem.scatter(widths, weights)
    left = residual - scatter.factor @ (scatter.factor.T @ scatter.solve(residual))
    own = left**2 / (widths[1] ** 2 + problem.known)
    return np.minimum((TAILS + 1) / (TAILS + own), 1.0)
