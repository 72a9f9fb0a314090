"""LossFit: one law of the loss fitted to data, with its status, residuals and uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import ndtr, ndtri

from raysweep.errors import UserError

if TYPE_CHECKING:
    from raysweep.scaling.form import Inputs
    from raysweep.scaling.loss_law import Law

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
                "ask for them with fit(..., bootstrap=1000)"
            )
        return self.samples


def interval_ends(
    draws: np.ndarray, estimate: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end [n] of the interval that resamples `draws` [n_boot, n] give `estimate`
    [n].

    Bias-corrected percentiles (Efron 1981): plain ones cover too much here, as the objective is
    nearly a sum of absolute values, whose minimum is jumpy under resampling. Like plain
    percentiles they respect any transformation of the quantity."""
    below = (draws < estimate).mean(axis=0) + 0.5 * (draws == estimate).mean(axis=0)
    resolution = 0.5 / len(draws)
    shift = ndtri(np.clip(below, resolution, 1 - resolution))
    reach = ndtri(0.5 + 0.5 * level)
    ends = [
        np.array([np.quantile(d, q) for d, q in zip(draws.T, ndtr(2 * shift + z), strict=True)])
        for z in (-reach, reach)
    ]
    return ends[0], ends[1]


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
