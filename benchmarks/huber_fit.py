"""The fit that published laws were made with, as a peer to the product's (`loss/posterior.py`).

`fit_law` gives a LossFit, with status, residuals and resamples. The sum of Huber losses on ln loss
is minimised from many starts (see `huber_solver`). A resample draws whole cells with replacement
(never the rows of one cell, which share its errors), as multiplicities over the one set of data, so
that a thousand refits are solved together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks import huber_solver as solver
from raysweep.errors import UserError
from raysweep.scaling.compute.isoflop import interval_ends
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.expression import (
    SYMBOL_INPUTS,
    Design,
    Inputs,
    checked,
    compile_expression,
    evaluate,
    input_columns,
    read_inputs,
)
from raysweep.scaling.loss.laws import Law

MIN_CELLS = 3
# Inputs whose independent variation is below this share of the common one cannot be told apart.
COLLINEAR = 0.02
# Relative singular value of the Jacobian below which a direction of the coefficients is
# undetermined.
UNDETERMINED = 1e-7
# The same at a mere starting point, where only an exact trade-off is one of the law and the inputs.
CONFOUNDED = 1e-11
# Starting points looked at for such a trade-off.
LOOKED_AT = 8
# Range of a log amplitude where it is not measured at the centre of the data.
UNCENTRED_REACH = 100.0
# Width that refits of resamples start from, in units of the final one: wide enough to leave the
# kinks of the full sample's minimum, narrow enough to stay close to it.
WARM_WIDTH = 30.0


Status = Literal[
    "converged",  # interior minimum, gradient at tolerance
    "at bound",  # minimum, but a coefficient sits on the edge of its range
    "not converged",  # the last iterate; trust nothing it says
    "too few cells",
    "one value",  # an input that the law raises to a power never varies
    "collinear",  # two inputs move together, so their coefficients cannot be told apart
    "identical losses",
]


@dataclass(frozen=True)
class LossFit:
    """A fitted law. Where `ok` is False every coefficient is NaN (or the last iterate, where the
    solver did not converge) and `message` says in plain words why."""

    law: Law
    coefficients: dict[str, float]
    status: Status
    message: str
    objective: float  # sum of Huber losses on log loss
    huber: float
    n_points: int
    n_cells: int
    n_free: int  # coefficients fitted, not held fixed
    residuals: np.ndarray  # [n] log observed - log predicted
    fixed: dict[str, float]
    inputs: Inputs = field(repr=False)
    loss: np.ndarray = field(repr=False)  # [n]
    weights: np.ndarray = field(repr=False)  # [n]
    cells: np.ndarray = field(repr=False)  # [n] id of the cell each point belongs to
    log_se: np.ndarray = field(repr=False)  # [n] known sd of ln loss, 0 where none is known
    samples: np.ndarray | None = field(default=None, repr=False)  # [n_boot, p], stated coefficients
    n_failed: int = 0  # resamples that gave no fit, left out of `samples`

    @property
    def name(self) -> str:
        """The law's key in the registry."""
        return self.law.key

    @property
    def ok(self) -> bool:
        """Whether the numbers may be used."""
        return self.status in ("converged", "at bound")

    @property
    def values(self) -> np.ndarray:
        """The coefficients as an array [p], in the law's order."""
        return np.array([self.coefficients[n] for n in self.law.names])

    @property
    def covariance(self) -> np.ndarray | None:
        """Bootstrap covariance of the stated coefficients [p, p]; None without resamples."""
        return None if self.samples is None else np.cov(self.samples, rowvar=False)

    def predict(self, inputs: Inputs) -> np.ndarray:
        """Predicted loss [n] (nats per token where the data are)."""
        return self.law.predict(self.values, inputs)

    def interval(
        self, inputs: Inputs, level: float = 0.95, new_observation: bool = False, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end [n] of the interval of the predicted loss.

        From coefficient uncertainty alone, or, for a `new_observation`, with the scatter of the
        fit's own residuals on top. Raises UserError where the fit was not resampled."""
        samples = self._samples()
        estimate = np.log(self.predict(inputs))
        log_loss = np.log(self.law.predict(samples, inputs))
        if new_observation:
            spread = self.residuals * np.sqrt(self.n_points / max(self.n_points - self.n_free, 1))
            rng = np.random.default_rng(seed)
            log_loss = log_loss + rng.choice(spread, size=log_loss.shape)
            estimate = np.median(log_loss, axis=0)
        low, high = interval_ends(log_loss, estimate, level)
        return np.exp(low), np.exp(high)

    def coefficient_interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Interval of a coefficient, or of one of the law's derived quantities."""
        draws = self.draws(name)
        known = self.coefficients.get(name)
        estimate = self.derived(name) if known is None else known
        low, high = interval_ends(draws[:, None], np.array([estimate]), level)
        return float(low[0]), float(high[0])

    def derived(self, name: str) -> float:
        """A quantity the law derives from its coefficients, such as "N_opt exponent"."""
        values = {k: np.asarray(v) for k, v in self.coefficients.items()}
        return float(self.law.derived[name](values))

    def draws(self, name: str) -> np.ndarray:
        """The resampled values [n_boot] of a coefficient or derived quantity."""
        samples = self._samples()
        columns = dict(zip(self.law.names, samples.T, strict=True))
        if name in columns:
            return columns[name]
        if name not in self.law.derived:
            known = ", ".join([*self.law.names, *self.law.derived])
            raise UserError(f"law '{self.name}' has no quantity '{name}'; it has {known}")
        return self.law.derived[name](columns)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The smallest and largest value of every input the fit rests on."""
        return {k: (float(np.min(v)), float(np.max(v))) for k, v in self.inputs.items()}

    def to_dict(self, level: float = 0.95) -> dict[str, object]:
        """Everything but the data, as plain JSON values; NaN and infinity become None."""
        intervals: dict[str, list[float | None]] = {}
        sds: dict[str, float | None] = {}
        if self.samples is not None and len(self.samples) > 1:
            for name in (*self.law.names, *self.law.derived):
                intervals[name] = [_plain(v) for v in self.coefficient_interval(name, level)]
                sds[name] = _plain(float(np.std(self.draws(name), ddof=1)))
        rms = float(np.sqrt(np.mean(self.residuals**2)))
        return {
            "law": self.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "parameter_count": self.law.parameter_count,
            "status": self.status,
            "message": self.message,
            "coefficients": {k: _plain(v) for k, v in self.coefficients.items()},
            "fixed": {k: _plain(v) for k, v in self.fixed.items()},
            "derived": {k: _plain(self.derived(k)) for k in self.law.derived},
            "level": level,
            "intervals": intervals,
            "sds": sds,
            "objective": _plain(self.objective),
            "huber": self.huber,
            "rms_log_residual": _plain(rms),
            "n_points": self.n_points,
            "n_cells": self.n_cells,
            "n_resamples": 0 if self.samples is None else len(self.samples),
            "n_failed_resamples": self.n_failed,
            "ranges": {k: list(v) for k, v in self.ranges().items()},
        }

    def _samples(self) -> np.ndarray:
        if self.samples is None or len(self.samples) < 2:
            raise UserError(
                f"the fit of law '{self.name}' has no resamples ({self.status}): "
                "ask for them with fit_law(..., bootstrap=1000)"
            )
        return self.samples


def fit_law(
    law: Law,
    data: LossData,
    *,
    weights: npt.ArrayLike | None = None,
    fixed: Mapping[str, float] | None = None,
    huber: float = solver.HUBER,
    bootstrap: int = 0,
    seed: int = 0,
) -> LossFit:
    """Fit a law by the sum of Huber losses (width `huber`) on ln loss, from many starts.

    `weights` [n] multiplies each point's term; `fixed` holds coefficients at given values. A
    `bootstrap` of that many resamples draws whole cells, and the known errors of the losses afresh.
    Raises UserError for values that no law can take, and for a column that the data lack."""
    inputs, _ = data.inputs(law)
    logs = read_inputs(law.expression, inputs)
    columns = input_columns(law.expression, inputs)
    observed = checked("loss", data.loss)
    n = len(data)
    weight = np.ones(n) if weights is None else _checked_weights(weights, n)
    held = dict(fixed or {})
    for name in held:
        if name not in law.names:
            raise UserError(f"law '{law.key}' has no coefficient '{name}' to hold fixed")
    free = np.array([name not in held for name in law.names])
    counts = weight > 0
    places = np.unique(np.stack(list(logs.values()), axis=1)[counts], axis=0)
    empty = LossFit(
        law=law,
        coefficients=dict.fromkeys(law.names, float("nan")),
        status="too few cells",
        message="",
        objective=float("nan"),
        huber=huber,
        n_points=n,
        n_cells=min(len(np.unique(data.cell[counts])), len(places)),
        n_free=int(free.sum()),
        residuals=np.full(n, np.nan),
        fixed=held,
        inputs=columns,
        loss=observed,
        weights=weight,
        cells=data.cell,
        log_se=data.log_se,
    )
    refusal = _refuse(law, logs, observed, empty.n_cells, free)
    if refusal:
        return replace(empty, status=refusal[0], message=refusal[1])

    problem = _problem(law, logs, weight, held)
    target = np.log(observed)
    starts = solver.starting_points(
        problem.design, target, weight, problem.bounds, problem.held, law.candidates, law.starts
    )
    mixed = _confounded(law, problem, starts, weight)
    if mixed is not None:
        return replace(empty, status="collinear", message=_trade_off(mixed))
    solution = solver.minimise(
        problem.design, target, weight, starts, problem.bounds, huber, workers=1
    )
    best = _best(solution)
    theta = solution.theta[best]
    at = evaluate(problem.design, theta[None])
    values = law.expression.state(problem.design.uncentre(theta))
    for name, value in held.items():
        values[law.names.index(name)] = value
    status, message = _judge(law, problem, solution, best, at.jacobian()[0], weight)
    if status == "collinear":
        values = np.full(len(law.names), np.nan)
    fitted = replace(
        empty,
        coefficients={k: float(v) for k, v in zip(law.names, values, strict=True)},
        status=status,
        message=message,
        objective=float(solution.objective[best]),
        residuals=target - at.value[0],
    )
    return resample(fitted, bootstrap, seed=seed) if bootstrap and fitted.ok else fitted


def cell_multiplicities(cells: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each point counts in each resample [resamples, n], drawing whole cells."""
    ids, cell = np.unique(cells, return_inverse=True)
    draws = rng.multinomial(len(ids), np.full(len(ids), 1.0 / len(ids)), size=resamples)
    return draws[:, cell].astype(float)


def resample(
    fit: LossFit, resamples: int = 1000, *, seed: int = 0, workers: int | None = None
) -> LossFit:
    """`fit` with `samples` from refits of resampled cells.

    Known errors of the losses are drawn afresh for every point of every resample. Refits that do
    not converge, or rest on fewer cells than coefficients, are left out and counted in
    `n_failed`."""
    if not fit.ok:
        return fit
    if resamples < 2:
        raise UserError(f"a bootstrap needs at least 2 resamples, not {resamples}")
    rng = np.random.default_rng(seed)
    law = fit.law
    problem = _problem(law, read_inputs(law.expression, fit.inputs), fit.weights, fit.fixed)
    weights = cell_multiplicities(fit.cells, resamples, rng) * fit.weights
    target = np.log(fit.loss)
    if np.any(fit.log_se):
        target = target + rng.standard_normal((resamples, len(target))) * fit.log_se
    start = problem.design.centre(law.expression.unstate(fit.values))
    solution = solver.minimise(
        problem.design,
        target,
        weights,
        np.tile(start, (resamples, 1)),
        problem.bounds,
        fit.huber,
        first_width=WARM_WIDTH * fit.huber,
        workers=workers,
    )
    # A draw of fewer distinct cells than coefficients has a minimum, but not only one.
    first = np.unique(fit.cells, return_index=True)[1]
    usable = solution.converged & ((weights[:, first] > 0).sum(axis=1) >= fit.n_free)
    samples = law.expression.state(problem.design.uncentre(solution.theta[usable]))
    for name, value in fit.fixed.items():
        samples[:, law.names.index(name)] = value
    return replace(fit, samples=samples, n_failed=int((~usable).sum()))


@dataclass(frozen=True)
class _Problem:
    """What the solver needs to know of a law on given data."""

    design: Design
    bounds: solver.Bounds
    held: np.ndarray  # [p] centred values of held coefficients, NaN elsewhere


def _problem(
    law: Law, logs: Mapping[str, np.ndarray], weights: np.ndarray, held: Mapping[str, float]
) -> _Problem:
    """The centred design, the box and the held coefficients, as the solver wants them."""
    design = compile_expression(law.expression, logs, centre=True, weights=weights)
    free = np.array([name not in held for name in law.names])
    stated = np.array([held.get(name, 1.0) for name in law.names])
    # A held coefficient is held in centred coordinates: exact while nothing it mixes with
    # moves, so an expression whose held coefficient mixes with free ones is compiled uncentred.
    mixes = design.to_centred - np.eye(len(free))
    low = np.array([c.low for c in law.expression.coefficients])
    high = np.array([c.high for c in law.expression.coefficients])
    if np.any(mixes[~free][:, free]):
        design = compile_expression(law.expression, logs, centre=False)
        amplitude = np.array([c.kind == "amplitude" for c in law.expression.coefficients])
        low[amplitude], high[amplitude] = -UNCENTRED_REACH, UNCENTRED_REACH
    fitted = law.expression.unstate(stated)
    values = np.where(free, np.nan, design.centre(np.where(free, 0.0, fitted)))
    return _Problem(design, solver.Bounds(low, high, free), values)


def _refuse(
    law: Law, logs: Mapping[str, np.ndarray], loss: np.ndarray, n_cells: int, free: np.ndarray
) -> tuple[Status, str] | None:
    """Why these data cannot determine the law at all, if they cannot."""
    need = max(MIN_CELLS, int(free.sum()) + 1)
    if n_cells < need:
        cells = "1 distinct cell" if n_cells == 1 else f"{n_cells} distinct cells"
        return "too few cells", (
            f"{cells} for {int(free.sum())} coefficients: at least {need} are needed"
        )
    if np.ptp(np.log(loss)) < 1e-9:
        return "identical losses", "every loss is the same, so nothing can be told to scale"
    varying = []
    for symbol in _free_symbols(law, free):
        if np.ptp(logs[symbol]) < 1e-9:
            name = SYMBOL_INPUTS[symbol]
            return "one value", (
                f"every point has the same {name}, so its exponent cannot be fitted: "
                f"add cells at another {name}, or hold it fixed"
            )
        varying.append((SYMBOL_INPUTS[symbol], logs[symbol]))
    if len(varying) > 1:
        table = np.stack([(v - v.mean()) / v.std() for _, v in varying], axis=1)
        _, sizes, directions = np.linalg.svd(table, full_matrices=False)
        if sizes[-1] < COLLINEAR * sizes[0]:
            names = [k for (k, _), d in zip(varying, directions[-1], strict=True) if abs(d) > 0.3]
            return "collinear", (
                f"{' and '.join(names)} rise together in every cell, so their exponents cannot "
                "be told apart: add cells off that line"
            )
    return None


def _free_symbols(law: Law, free: np.ndarray) -> list[str]:
    """Symbols with a free coefficient; one a raw input."""
    names = {n for n, f in zip(law.names, free, strict=True) if f}
    groups = [*(t.powers for t in law.expression.terms), law.expression.interaction]
    used = [s for ps in groups for p in ps if p.coefficient in names for s in p.symbols.split()]
    return list({SYMBOL_INPUTS[s]: s for s in reversed(used)}.values())[::-1]


def _confounded(
    law: Law, problem: _Problem, starts: np.ndarray, weights: np.ndarray
) -> np.ndarray | None:
    """Names of coefficients that trade off exactly on these inputs, wherever one starts: say,
    four that shape the experts' term where experts take two values."""
    free = problem.bounds.free
    jacobian = evaluate(problem.design, starts[:LOOKED_AT]).jacobian()[..., free]
    looked = [_undetermined(j, weights, CONFOUNDED) for j in jacobian]
    found = [mixed for mixed in looked if mixed is not None]
    if len(found) < len(looked):
        return None
    return np.array(law.names)[free][np.any(found, axis=0)]


def _judge(
    law: Law,
    problem: _Problem,
    solution: solver.Solution,
    best: int,
    jacobian: np.ndarray,
    weights: np.ndarray,
) -> tuple[Status, str]:
    """The status of the best local minimum, and what to say about it."""
    if not solution.converged[best]:
        return "not converged", (
            f"the gradient is still {solution.gradient[best]:.1e} of its scale after "
            f"{solution.iterations[best]} iterations; the numbers are the last iterate"
        )
    inside = problem.bounds.free & ~solution.at_bound[best]
    names = np.array(law.names)
    mixed = _undetermined(jacobian[:, inside], weights, UNDETERMINED)
    if mixed is not None:
        return "collinear", _trade_off(names[inside][mixed])
    if solution.at_bound[best].any():
        stuck = names[solution.at_bound[best]]
        return "at bound", (
            f"{', '.join(stuck)} ended on the edge of the allowed range: the data do not "
            "determine it, the rest of the fit stands given that edge"
        )
    close = solution.objective <= solution.objective[best] * (1 + 1e-6) + 1e-15
    reached = int((close & solution.converged).sum())
    return "converged", f"{reached} of {len(solution.objective)} starts reached this minimum"


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _undetermined(jacobian: np.ndarray, weights: np.ndarray, threshold: float) -> np.ndarray | None:
    """Columns [p] of a Jacobian [n, p] that mix in its flattest direction; None where it has
    none."""
    columns = np.sqrt(weights)[:, None] * jacobian
    size = np.linalg.norm(columns, axis=0)
    if not (size > 0).all() or columns.shape[1] < 2:
        return None
    _, singular, directions = np.linalg.svd(columns / size, full_matrices=False)
    if singular[-1] >= threshold * singular[0]:
        return None
    return np.abs(directions[-1]) > 0.2


def _trade_off(names: np.ndarray) -> str:
    return (
        f"{', '.join(names)} can trade off against each other without changing any prediction: "
        "more varied cells are needed"
    )


def _best(solution: solver.Solution) -> int:
    """The lowest converged minimum; the lowest of all where none converged."""
    score = np.where(np.isfinite(solution.objective), solution.objective, np.inf)
    if solution.converged.any():
        score = np.where(solution.converged, score, np.inf)
    return int(np.argmin(score))


def _checked_weights(weights: npt.ArrayLike, n: int) -> np.ndarray:
    array = np.asarray(weights, dtype=float)
    if array.shape != (n,):
        raise UserError(f"{array.size} weights for {n} points: give one a point")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"weights must be finite and not negative, but row {row} holds {array[row]:g}"
        )
    if not array.any():
        raise UserError("every weight is zero: nothing is left to fit")
    return array
