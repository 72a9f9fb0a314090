"""Law: one formula of the loss, declared once; predicts, differentiates and fits itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysweep.errors import UserError
from raysweep.scaling import fitting
from raysweep.scaling.bootstrap import bootstrap as resample
from raysweep.scaling.evaluation import evaluate
from raysweep.scaling.form import (
    SYMBOL_INPUTS,
    Design,
    Form,
    Inputs,
    checked,
    compile_form,
    input_columns,
    read_inputs,
)
from raysweep.scaling.loss_fit import LossFit, Status

FEWEST_CELLS = 3
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


@dataclass(frozen=True)
class Law:
    """A law of the loss.

    `form` is its mathematics; the rest is what a reader needs to know: the formula in words that
    print anywhere, each symbol with its unit, where it comes from, and which count of parameters
    it means by N (a column of the results table)."""

    key: str
    name: str
    formula: str
    symbols: Mapping[str, str]  # symbol -> meaning and unit
    source: str
    parameter_count: str
    form: Form
    derived: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = field(
        default_factory=dict
    )
    note: str = ""
    published: Mapping[str, float] = field(default_factory=dict)  # where the source gives values
    candidates: int = 1024  # starting points looked at
    starts: int = 24  # starting points polished

    @property
    def names(self) -> tuple[str, ...]:
        """The coefficients' names, in order."""
        return self.form.names

    @property
    def inputs(self) -> tuple[str, ...]:
        """The named inputs it reads."""
        return tuple(dict.fromkeys(SYMBOL_INPUTS[s] for s in self.form.symbols))

    def predict(self, coefficients: Mapping[str, float] | np.ndarray, inputs: Inputs) -> np.ndarray:
        """The loss [n] for one set of coefficients, or [B, n] for an array of them [B, p]."""
        values = self._array(coefficients)
        design = compile_form(self.form, read_inputs(self.form, inputs), centre=False)
        theta = self.form.unstate(np.atleast_2d(values))
        log_loss = evaluate(design, theta, derivatives=False).value
        return np.exp(log_loss[0] if values.ndim == 1 else log_loss)

    def predict_each(self, values: np.ndarray, inputs: Inputs) -> np.ndarray:
        """The loss [B] of the b-th coefficients of `values` [B, p] at the b-th point of
        `inputs`."""
        spread = {k: np.broadcast_to(v, (len(values),)) for k, v in inputs.items()}
        design = compile_form(self.form, read_inputs(self.form, spread), centre=False)
        theta = self.form.unstate(values)
        return np.exp(evaluate(design, theta, derivatives=False, paired=True).value)

    def jacobian(
        self, coefficients: Mapping[str, float] | np.ndarray, inputs: Inputs
    ) -> np.ndarray:
        """d loss / d coefficients [n, p], for the coefficients as stated."""
        values = self._array(coefficients)
        design = compile_form(self.form, read_inputs(self.form, inputs), centre=False)
        theta = self.form.unstate(values)
        at = evaluate(design, theta[None])
        slopes = [c.slope(theta[j]) for j, c in enumerate(self.form.coefficients)]
        return np.exp(at.value[0])[:, None] * at.jacobian()[0] * np.array(slopes)

    def fit(
        self,
        inputs: Inputs,
        loss: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        *,
        cells: npt.ArrayLike | None = None,
        fixed: Mapping[str, float] | None = None,
        huber: float = fitting.HUBER,
        bootstrap: int = 0,
        trial_noise: float | np.ndarray = 0.0,
        seed: int = 0,
    ) -> LossFit:
        """Fit by the sum of Huber losses (width `huber`) on log loss, from many starts.

        `inputs` names arrays [n] (see `self.inputs`), `loss` is [n] in nats per token, `weights`
        [n] multiplies each point's term. `cells` [n] says which points belong to one cell
        (default: each point its own), so that a `bootstrap` of that many resamples draws whole
        cells; `trial_noise` is the sd of log loss between repeated trials, added afresh in every
        resample. `fixed` holds coefficients at given values. Raises UserError for values that no
        law can take."""
        logs = read_inputs(self.form, inputs)
        columns = {
            k: np.asarray(v, dtype=float) for k, v in input_columns(self.form, inputs).items()
        }
        n = len(next(iter(logs.values())))
        observed = checked("loss", loss)
        if observed.shape != (n,):
            raise UserError(f"{observed.size} losses for {n} points: give one loss a point")
        weight = np.ones(n) if weights is None else _checked_weights(weights, n)
        cell = (
            np.arange(n) if cells is None else np.unique(np.asarray(cells), return_inverse=True)[1]
        )
        if cell.shape != (n,):
            raise UserError(f"{cell.size} cell ids for {n} points: give one a point")
        held = dict(fixed or {})
        for name in held:
            if name not in self.names:
                raise UserError(f"law '{self.key}' has no coefficient '{name}' to hold fixed")

        free = np.array([name not in held for name in self.names])
        counts = weight > 0
        places = np.unique(np.stack(list(logs.values()), axis=1)[counts], axis=0)
        n_cells = min(len(np.unique(cell[counts])), len(places))

        def result(
            status: Status,
            message: str,
            values: np.ndarray,
            objective: float,
            residuals: np.ndarray,
        ) -> LossFit:
            return LossFit(
                law=self,
                coefficients={k: float(v) for k, v in zip(self.names, values, strict=True)},
                status=status,
                message=message,
                objective=objective,
                huber=huber,
                n_points=n,
                n_cells=n_cells,
                n_free=int(free.sum()),
                residuals=residuals,
                fixed=held,
                inputs=columns,
                loss=observed,
                weights=weight,
                cells=cell,
            )

        refusal = self._refuse(logs, observed, n_cells, free)
        if refusal:
            nothing = np.full(len(self.names), np.nan)
            return result(*refusal, nothing, np.nan, np.full(n, np.nan))

        problem = self.problem(logs, weight, held)
        target = np.log(observed)
        starts = fitting.starting_points(
            problem.design,
            target,
            weight,
            problem.bounds,
            problem.held,
            self.candidates,
            self.starts,
        )
        mixed = self._confounded(problem, starts, weight)
        if mixed is not None:
            nothing = np.full(len(self.names), np.nan)
            return result("collinear", _trade_off(mixed), nothing, np.nan, np.full(n, np.nan))
        solution = fitting.minimise(
            problem.design, target, weight, starts, problem.bounds, huber, workers=1
        )
        best = _best(solution)
        theta = solution.theta[best]
        at = evaluate(problem.design, theta[None])
        residuals = target - at.value[0]
        values = self.form.state(problem.design.uncentre(theta))
        for name, value in held.items():
            values[self.names.index(name)] = value
        status, message = self._judge(problem, solution, best, at.jacobian()[0], weight)
        if status == "collinear":
            values = np.full(len(self.names), np.nan)
        fitted = result(status, message, values, float(solution.objective[best]), residuals)
        if bootstrap and fitted.ok:
            fitted = resample(fitted, bootstrap, trial_noise=trial_noise, seed=seed)
        return fitted

    def problem(
        self, logs: Mapping[str, np.ndarray], weights: np.ndarray, held: Mapping[str, float]
    ) -> Problem:
        """The centred design, the box and the held coefficients, as the solver wants them."""
        design = compile_form(self.form, logs, centre=True, weights=weights)
        free = np.array([name not in held for name in self.names])
        stated = np.array([held.get(name, 1.0) for name in self.names])
        # A held coefficient is held in centred coordinates: exact while nothing it mixes with
        # moves, so a form whose held coefficient mixes with free ones is compiled uncentred.
        mixes = design.to_centred - np.eye(len(free))
        low = np.array([c.low for c in self.form.coefficients])
        high = np.array([c.high for c in self.form.coefficients])
        if np.any(mixes[~free][:, free]):
            design = compile_form(self.form, logs, centre=False)
            amplitude = np.array([c.kind == "amplitude" for c in self.form.coefficients])
            low[amplitude], high[amplitude] = -UNCENTRED_REACH, UNCENTRED_REACH
        fitted = self.form.unstate(stated)
        values = np.where(free, np.nan, design.centre(np.where(free, 0.0, fitted)))
        return Problem(design, fitting.Bounds(low, high, free), values)

    def _array(self, coefficients: Mapping[str, float] | np.ndarray) -> np.ndarray:
        if isinstance(coefficients, Mapping):
            missing = [n for n in self.names if n not in coefficients]
            if missing:
                raise UserError(f"law '{self.key}' needs the coefficient '{missing[0]}' too")
            return np.array([float(coefficients[n]) for n in self.names])
        return np.asarray(coefficients, dtype=float)

    def _refuse(
        self, logs: Mapping[str, np.ndarray], loss: np.ndarray, n_cells: int, free: np.ndarray
    ) -> tuple[Status, str] | None:
        """Why these data cannot determine the law at all, if they cannot."""
        need = max(FEWEST_CELLS, int(free.sum()) + 1)
        if n_cells < need:
            cells = "1 distinct cell" if n_cells == 1 else f"{n_cells} distinct cells"
            return "too few cells", (
                f"{cells} for {int(free.sum())} coefficients: at least {need} are needed"
            )
        if np.ptp(np.log(loss)) < 1e-9:
            return "identical losses", "every loss is the same, so nothing can be told to scale"
        varying = []
        for symbol in self._free_symbols(free):
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
                names = [
                    k for (k, _), d in zip(varying, directions[-1], strict=True) if abs(d) > 0.3
                ]
                return "collinear", (
                    f"{' and '.join(names)} rise together in every cell, so their exponents cannot "
                    "be told apart: add cells off that line"
                )
        return None

    def _free_symbols(self, free: np.ndarray) -> list[str]:
        """Symbols with a free coefficient; one a raw input."""
        names = {n for n, f in zip(self.names, free, strict=True) if f}
        groups = [*(t.powers for t in self.form.terms), self.form.tilt]
        used = [s for ps in groups for p in ps if p.coefficient in names for s in p.symbols.split()]
        return list({SYMBOL_INPUTS[s]: s for s in reversed(used)}.values())[::-1]

    def _confounded(
        self, problem: Problem, starts: np.ndarray, weights: np.ndarray
    ) -> np.ndarray | None:
        """Names of coefficients that trade off exactly on these inputs, wherever one starts: say,
        four that shape the experts' term where experts take two values."""
        free = problem.bounds.free
        jacobian = evaluate(problem.design, starts[:LOOKED_AT]).jacobian()[..., free]
        looked = [_undetermined(j, weights, CONFOUNDED) for j in jacobian]
        found = [mixed for mixed in looked if mixed is not None]
        if len(found) < len(looked):
            return None
        return np.array(self.names)[free][np.any(found, axis=0)]

    def _judge(
        self,
        problem: Problem,
        solution: fitting.Solution,
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
        names = np.array(self.names)
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


@dataclass(frozen=True)
class Problem:
    """What the solver needs to know of a law on given data."""

    design: Design
    bounds: fitting.Bounds
    held: np.ndarray  # [p] centred values of held coefficients, NaN elsewhere


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


def _best(solution: fitting.Solution) -> int:
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
