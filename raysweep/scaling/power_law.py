"""A power law of an optimum, fitted robustly in logs, weighted by what each cell knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from raysweep.errors import UserError
from raysweep.scaling.quantities import QUANTITIES

CONVERGED = "converged"
TOO_FEW_CELLS = "too few cells"
ONE_VALUE = "one value"
COLLINEAR = "collinear"

HUBER = 1.5
"""Departures beyond this many robust sds weigh less."""

EXPECTED = 4
"""Departures of the stated size that count beside the seen ones, for the width of intervals."""

COLLINEAR_BELOW = 0.02
"""Least spread (sd of the log) that an input must keep once the others are regressed out, as a
share of its own spread; below it exponents cannot be told apart."""


@dataclass(frozen=True)
class Exponent:
    """A fitted number with its 95 % interval (NaN where it could not be had)."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """target = coefficient * prod input^exponent, fitted over cells.

    `covariance` is that of the draws of (ln target at the centre, exponents); `scatter` the sd of
    ln target by which the optima of cells depart from the law beyond what their own trials leave
    open. `count` names the column that served as N. A law that could not be fitted has a `status`
    other than `converged`, a `message`, and NaN in place of numbers.
    """

    target: str
    inputs: tuple[str, ...]
    coefficient: Exponent
    exponents: dict[str, Exponent]
    centre: dict[str, float]
    covariance: np.ndarray
    scatter: float
    dof: int
    status: str
    message: str
    n_cells: int
    cells: tuple[str, ...]
    left_out: dict[str, str]
    count: str
    held_out: float
    """Mean |ln(predicted / optimum)|, each cell predicted from the others; NaN where not had."""

    @property
    def ok(self) -> bool:
        return self.status == CONVERGED

    @property
    def name(self) -> str:
        """As in `learning_rate(params, tokens)`."""
        return f"{self.target}({', '.join(self.inputs)})"

    @property
    def unit(self) -> str:
        return QUANTITIES[self.target].unit or QUANTITIES[self.target].name

    @property
    def symbols(self) -> dict[str, str]:
        """Symbol -> meaning, for the formula."""
        inputs = [QUANTITIES[name] for name in self.inputs]
        meanings = {q.symbol: q.meaning or q.name for q in inputs}
        if "params" in self.inputs:
            meanings["N"] = self.count
        return meanings

    @property
    def formula(self) -> str:
        """As in `learning_rate = 1.79 N^-0.713 D^0.307`."""
        if not math.isfinite(self.coefficient.value):
            powers = " ".join(f"{QUANTITIES[name].symbol}^?" for name in self.inputs)
            return f"{self.target} = ? {powers}"
        powers = " ".join(
            f"{QUANTITIES[n].symbol}^{self.exponents[n].value:.3f}" for n in self.inputs
        )
        return f"{self.target} = {self.coefficient.value:.4g} {powers}"

    def predict(self, inputs: Mapping[str, object]) -> np.ndarray:
        """The target at `inputs` (arrays or numbers by name, in the units of `symbols`)."""
        return np.exp(self._design(inputs) @ self._theta())

    def interval(
        self, inputs: Mapping[str, object], level: float = 0.95, new_cell: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Low and high of the target at `inputs`: of a new cell's optimum, or of the law alone."""
        x = self._design(inputs)
        variance = np.einsum("...i,ij,...j->...", x, self.covariance, x)
        if new_cell:
            variance = variance + self.scatter**2
        reach = stats.t.ppf(0.5 + level / 2, self.dof) if self.dof > 0 else np.nan
        middle, half = x @ self._theta(), reach * np.sqrt(variance)
        return np.exp(middle - half), np.exp(middle + half)

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "name": self.name,
            "target": self.target,
            "unit": self.unit,
            "inputs": list(self.inputs),
            "symbols": self.symbols,
            "formula": self.formula,
            "coefficient": self.coefficient.to_dict(),
            "exponents": {name: e.to_dict() for name, e in self.exponents.items()},
            "centre": dict(self.centre),
            "covariance": self.covariance.tolist(),
            "scatter": self.scatter,
            "status": self.status,
            "message": self.message,
            "n_cells": self.n_cells,
            "cells": list(self.cells),
            "left_out": dict(self.left_out),
            "count": self.count,
            "held_out_log_error": self.held_out,
        }

    def _theta(self) -> np.ndarray:
        middle = math.log(self.coefficient.value) + sum(
            self.exponents[n].value * math.log(self.centre[n]) for n in self.inputs
        )
        return np.array([middle, *(self.exponents[n].value for n in self.inputs)])

    def _design(self, inputs: Mapping[str, object]) -> np.ndarray:
        columns = []
        for name in self.inputs:
            if name not in inputs:
                raise UserError(f"the law {self.name} needs {name!r} to predict")
            value = np.asarray(inputs[name], dtype=float)
            if not (value > 0).all():
                raise UserError(f"the law {self.name} needs {name!r} above zero")
            columns.append(np.log(value) - math.log(self.centre[name]))
        ones = np.ones(np.broadcast_shapes(*(c.shape for c in columns)))
        return np.stack([ones, *(c * ones for c in columns)], axis=-1)


def fit_power_law(
    target: str,
    inputs: Mapping[str, np.ndarray],
    values: np.ndarray,
    log_sd: np.ndarray,
    *,
    cells: Sequence[str] | None = None,
    left_out: Mapping[str, str] | None = None,
    families: np.ndarray | None = None,
    count: str = "",
    n_boot: int = 200,
    seed: int = 0,
) -> PowerLaw:
    """Fit ln values [n] on ln inputs (each [n], all positive); `log_sd` [n] is the sd of ln values.

    Weights are 1 / (log_sd^2 + scatter^2), the scatter between cells estimated by moments
    (DerSimonian and Laird); Huber's loss guards against a stray cell. Intervals come from
    resampling the cells' standardised departures, trial noise included, with Student's t for the
    few cells there are. Never raises on data: too few cells, an input of one value or collinear
    inputs give a status.
    """
    names = tuple(inputs)
    y = np.log(np.asarray(values, dtype=float))
    logs = np.column_stack([np.log(np.asarray(inputs[n], dtype=float)) for n in names])
    cells = tuple(cells) if cells is not None else tuple(str(i) for i in range(len(y)))
    sd = np.asarray(log_sd, dtype=float)
    keep = np.isfinite(y) & np.isfinite(logs).all(1) & np.isfinite(sd)
    gone = {
        c: "an input or the optimum is not known" for c, k in zip(cells, keep, strict=True) if not k
    }
    gone = {**gone, **(left_out or {})}
    y, logs, sd = y[keep], logs[keep], sd[keep]
    cells = tuple(c for c, k in zip(cells, keep, strict=True) if k)
    n, p = len(y), 1 + len(names)

    groups = np.zeros(len(keep)) if families is None else np.asarray(families)
    status, message = _check(names, logs, y, groups[keep])
    centre = logs.mean(0) if n else np.full(len(names), np.nan)
    common = {
        "target": target,
        "inputs": names,
        "centre": dict(zip(names, np.exp(centre).tolist(), strict=True)),
        "n_cells": n,
        "cells": cells,
        "left_out": gone,
        "count": count,
    }
    if status != CONVERGED:
        nothing = Exponent(math.nan, math.nan, math.nan)
        return PowerLaw(
            coefficient=nothing,
            exponents=dict.fromkeys(names, nothing),
            covariance=np.full((p, p), np.nan),
            scatter=math.nan,
            dof=0,
            status=status,
            message=message,
            held_out=math.nan,
            **common,
        )
    x = np.column_stack([np.ones(n), logs - centre])
    weight, scatter = _weights(x, y, sd)
    theta, departure = _robust(x, y[None], weight)
    theta, departure = theta[0], departure[0]
    covariance = _bootstrap(x, theta, departure, weight, n_boot, seed)
    dof = n - p
    reach = stats.t.ppf(0.975, dof)

    def number(direction: np.ndarray) -> tuple[float, float, float]:
        middle = float(direction @ theta)
        half = float(reach * np.sqrt(direction @ covariance @ direction))
        return middle, middle - half, middle + half

    unit = np.eye(p)
    origin = np.concatenate([[1.0], -centre])  # ln target where every input is 1
    return PowerLaw(
        coefficient=Exponent(*(_exp(v) for v in number(origin))),
        exponents={name: Exponent(*number(unit[k + 1])) for k, name in enumerate(names)},
        covariance=covariance,
        scatter=scatter,
        dof=dof,
        status=CONVERGED,
        message="",
        held_out=_leave_one_out(x, y, weight),
        **common,
    )


def _exp(value: float) -> float:
    return math.exp(min(max(value, -700.0), 700.0))


def _check(
    names: Sequence[str], logs: np.ndarray, y: np.ndarray, families: np.ndarray
) -> tuple[str, str]:
    """Whether the cells can tell the exponents; else a status and what to do."""
    n, p = len(y), 1 + len(names)
    if n < p + 1:
        return (
            TOO_FEW_CELLS,
            f"{n} cell{'s' * (n != 1)} with a known optimum, {p + 1} needed",
        )
    spread = logs.std(0)
    for k, name in enumerate(names):
        if spread[k] < 1e-9:
            return ONE_VALUE, f"all cells have one value of {name}: its exponent cannot be told"
    told = " and ".join(names)
    apart = f"{told} move together in all cells: add horizons or scales to part them"
    if _collinear(logs):
        return COLLINEAR, apart
    sizes = [k for k, name in enumerate(names) if name in ("params", "tokens")]
    _, family = np.unique(families, return_inverse=True)
    size = np.bincount(family)
    within = np.column_stack(
        [logs[:, k] - (np.bincount(family, logs[:, k]) / size)[family] for k in sizes]
        or [np.empty((n, 0))]
    )
    if len(sizes) == 2 and _collinear(within):
        return COLLINEAR, apart.replace("all cells", "the cells of each architecture")
    return CONVERGED, ""


def _collinear(logs: np.ndarray) -> bool:
    """Whether a column [n, k] keeps next to nothing once the others are regressed out."""
    centred = logs - logs.mean(0)
    spread = centred.std(0)
    if (spread < 1e-9).any():
        return True
    centred = centred / spread
    for k in range(centred.shape[1]):
        others, rest = np.delete(centred, k, axis=1), centred[:, k]
        if others.shape[1]:
            rest = rest - others @ np.linalg.lstsq(others, rest, rcond=None)[0]
        if rest.std() < COLLINEAR_BELOW:
            return True
    return False


def _weights(x: np.ndarray, y: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, float]:
    """Precisions [n] and the between-cell scatter, by DerSimonian and Laird's moments."""
    n, p = x.shape
    known = np.maximum(sd, 1e-4) ** 2
    w = 1 / known
    hat = np.linalg.solve((x.T * w) @ x, x.T * w)
    residual = y - x @ (hat @ y)
    excess = float((w * residual**2).sum()) - (n - p)
    share = float(w.sum() - np.trace(hat @ (x * w[:, None])))
    variance = max(0.0, excess / share) if share > 0 else 0.0
    return 1 / (known + variance), math.sqrt(variance)


def _robust(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Huber regressions of each row of y [b, n] with weights [n] or [b, n].

    Returns theta [b, p] and standardised departures [b, n]."""
    n, p = x.shape
    root = np.sqrt(weight)
    huber = np.ones_like(y)
    theta = np.zeros((len(y), p))
    z = y
    for _ in range(20):
        w = weight * huber
        normal = (x.T * w[:, None, :]) @ x
        theta = np.linalg.solve(normal, ((w * y) @ x)[..., None])[..., 0]
        z = (y - theta @ x.T) * root
        size = np.abs(z)
        robust_sd = 1.4826 * np.median(size, axis=1, keepdims=True) * math.sqrt(n / (n - p))
        limit = HUBER * np.maximum(robust_sd, 1e-9)
        last, huber = huber, np.minimum(1.0, limit / np.maximum(size, 1e-300))
        if np.abs(huber - last).max() < 1e-4:
            break
    return theta, z


def _leverage(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    scaled = x * np.sqrt(weight)[:, None]
    return np.einsum("np,pn->n", scaled, np.linalg.pinv(scaled))


def _bootstrap(
    x: np.ndarray,
    theta: np.ndarray,
    departure: np.ndarray,
    weight: np.ndarray,
    n_boot: int,
    seed: int,
) -> np.ndarray:
    """Covariance of theta [p, p] over resampled departures, scaled up for leverage.

    A few cells may by luck lie closer to the law than their own errors allow. So departures that
    are smaller than those errors are moderated, as if `EXPECTED` more of the stated size had been
    seen.
    """
    rng = np.random.default_rng(seed)
    free = departure / np.sqrt(np.maximum(1 - _leverage(x, weight), 0.05))
    seen, dof = float((departure**2).sum()), len(departure) - len(theta)
    free *= math.sqrt(max(1.0, (EXPECTED + seen) / (EXPECTED + dof) * dof / max(seen, 1e-12)))
    drawn = rng.choice(free, size=(max(n_boot, 20), len(free)))
    draws, _ = _robust(x, x @ theta + drawn / np.sqrt(weight), weight)
    return np.atleast_2d(np.cov(draws.T))


def _leave_one_out(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Mean |error| of ln target, each cell predicted from the others."""
    n, p = x.shape
    needed = _leverage(x, weight) > 1 - 1e-6  # without such a cell an exponent cannot be told
    if n < p + 2 or needed.all():
        return math.nan
    theta, _ = _robust(x, np.tile(y, (n, 1)), weight * (1 - np.eye(n)) + 1e-12 * weight)
    errors = np.abs(y - np.einsum("ip,ip->i", x, theta))
    return float(errors[~needed].mean())
