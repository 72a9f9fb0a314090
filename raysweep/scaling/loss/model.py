"""LossModel: the answer about the loss of any run, with intervals that hold beyond the cells."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from scipy.special import stdtrit

from raysweep.errors import UserError
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.loss.data import STAND_INS, LossData, Runs, run_columns
from raysweep.scaling.loss.laws import Law
from raysweep.scaling.loss.posterior import LawPosterior

LEVEL = 0.95
"""Of every interval."""

NORMAL = 1.96
"""Half of such an interval, in known sds."""

DRAWS = 1000


@dataclass(frozen=True)
class Ahead:
    """One level of compute, predicted by a law that had seen the levels below it alone.

    `reach` is the largest ln compute beyond the cells seen; `error` the mean |ln(predicted /
    observed)| of the level's `n` runs from the `seen` ones below, `bias` the mean of ln observed -
    ln predicted, `square` the mean of their squared errors over the variance that was claimed,
    `covered` how many lay inside their 95 % interval."""

    flops: float
    reach: float
    n: int
    seen: int
    error: float
    bias: float
    square: float
    covered: int


@dataclass(frozen=True)
class LawScore:
    """How a law did one level of compute ahead; `error` NaN, and `why`, where it cannot answer.

    `error` is the mean over the levels, each weighed by the runs that it was predicted from."""

    law: str
    count: str
    error: float
    ahead: tuple[Ahead, ...]
    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why

    @property
    def runs(self) -> int:
        """How many runs were predicted, over all levels."""
        return sum(a.n for a in self.ahead)

    @property
    def covered(self) -> int:
        """How many of them lay inside their 95 % interval."""
        return sum(a.covered for a in self.ahead)

    @property
    def off(self) -> float:
        """By what share they were off on average; NaN without any."""
        return sum(a.error * a.n for a in self.ahead) / self.runs if self.runs else math.nan


@dataclass(frozen=True, eq=False)
class LossModel:
    """The law of the loss that predicts best one budget ahead, with all that it is uncertain of.

    `status` is `ok` or `not determined`, and `why` says it in a sentence; then every number is
    NaN. `count` is the column that the law takes as N. `inflation` (at least 1) is how much larger
    errors one level ahead were than claimed, by which the claim is widened; `freedom` the levels
    that the claim rests on, Student's degrees of freedom. `scores` tells how every law did.
    `unseen` is an sd of ln loss that all its data have in common, and no scatter tells of."""

    status: str
    why: str
    data: LossData
    scores: tuple[LawScore, ...]
    law: Law | None = None
    count: str = ""
    posterior: LawPosterior | None = None
    inflation: float = 1.0
    freedom: int = 1
    unseen: float = 0.0

    @property
    def ok(self) -> bool:
        return self.posterior is not None

    @property
    def score(self) -> LawScore:
        """How the law did one level ahead; without any level where there is no law."""
        key = self.law.key if self.law else ""
        return next((s for s in self.scores if s.law == key), LawScore(key, "", math.nan, ()))

    def predict(self, runs: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss, and both ends of the 95 % interval of a *new run*'s, [n] each.

        NaN where nothing is determined, and for runs that lack a column which the law reads."""
        return self._interval(runs, self.posterior.noise_sd if self.posterior else math.nan)

    def predict_mean(self, runs: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same for the expected loss, without what one run departs from another."""
        return self._interval(runs, 0.0)

    def sample(self, runs: Runs, count: int = DRAWS, seed: int = 0) -> np.ndarray:
        """Joint draws [count, n] of the expected ln loss of runs: what is common to them (the law's
        coefficients, the departure from it) moves them together, so ratios are told well."""
        inputs, known = self.inputs(runs)
        draws = np.full((count, len(known)), np.nan)
        if self.posterior is not None and known.any():
            rng = np.random.default_rng(seed)
            inputs = {name: value[known] for name, value in inputs.items()}
            draws[:, known] = self.posterior.draws(inputs, count, rng, self._scales(count, rng))
            if self.unseen:
                draws[:, known] += self.unseen * rng.standard_normal((count, 1))
        return draws

    def inputs(self, runs: Runs) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What the law reads of runs [n], and which of them tell all of it."""
        columns = run_columns(runs)
        n = len(columns["tokens"])
        if self.law is None:
            return {}, np.zeros(n, dtype=bool)
        inputs = {}
        for name in self.law.inputs:
            if name == "sparsity":
                inputs[name] = 1 - columns["top_k"] / columns["experts"]
            elif name == "params":
                own = columns[self.count]
                other = columns.get(STAND_INS.get(self.count, ""), own)
                inputs[name] = np.where(np.isnan(own), other, own)
            else:
                inputs[name] = columns[name]
        known = np.isfinite(np.stack(list(inputs.values()))).all(axis=0)
        return inputs, np.asarray(known)

    def beyond(self, runs: Runs) -> np.ndarray:
        """How many times the compute of the largest cell each run [n] has; below 1 inside."""
        return run_columns(runs)["flops"] / self.data.flops.max()

    @cached_property
    def coefficients(self) -> dict[str, Estimate]:
        """The law's coefficients and what it derives from them, as its formula states them."""
        if self.posterior is None or self.law is None:
            return {}
        rng = np.random.default_rng(0)
        draws = self.posterior.coefficient_draws(DRAWS, rng, self._scales(DRAWS, rng))
        at = np.vstack([self.posterior.theta, draws])
        values = dict(zip(self.law.names, self.posterior.stated(at).T, strict=True))
        values |= {name: derive(values) for name, derive in self.law.derived.items()}
        ends = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
        found = {}
        for name, v in values.items():
            low, high = np.quantile(v[1:], ends)
            found[name] = Estimate(float(v[0]), float(low), float(high))
        return found

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return {
            "status": self.status,
            "why": self.why,
            "law": self.law.key if self.law else None,
            "count": self.count,
            "coefficients": {k: asdict(v) for k, v in self.coefficients.items()},
            "noise": self.posterior.noise_sd if self.posterior else math.nan,
            "departure": self.posterior.departure if self.posterior else math.nan,
            "inflation": self.inflation,
            "unseen": self.unseen,
            "n_cells": len(self.data),
            "levels": self.freedom,
            "scores": [asdict(score) for score in self.scores],
        }

    def require(self) -> LossModel:
        """Itself, or a UserError that says why it cannot answer."""
        if not self.ok:
            raise UserError(f"the law of the loss is {self.status}: {self.why}")
        return self

    def _interval(self, runs: Runs, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs, known = self.inputs(runs)
        value, low, high = (np.full(len(known), np.nan) for _ in range(3))
        if self.posterior is not None and known.any():
            inputs = {name: v[known] for name, v in inputs.items()}
            mean, sd = self.posterior.predict(inputs)
            reach = stdtrit(self.freedom, 0.5 + LEVEL / 2) * np.hypot(self.inflation * sd, noise)
            reach = np.hypot(reach, NORMAL * self.unseen)
            value[known], low[known], high[known] = np.exp([mean, mean - reach, mean + reach])
        return value, low, high

    def _scales(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """How far draws [count] go from the mean in units of the claim: Student's t in all."""
        return self.inflation * np.sqrt(self.freedom / rng.chisquare(self.freedom, count))
