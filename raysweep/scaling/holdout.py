"""Model selection by held-out error: which law, fitted to smaller scales, predicts the largest.

Extrapolation is what a law is for, so candidates are judged by leaving out the largest scale (or
budget), then the largest but one, and so on; AICc, which only judges interpolation, is reported
beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from raysweep.errors import UserError
from raysweep.scaling.fitting import HUBER
from raysweep.scaling.form import Inputs, input_columns
from raysweep.scaling.loss_fit import LossFit
from raysweep.scaling.loss_law import Law

# Values of one level differ by less than this factor; runs of one budget do by a few per cent.
LEVEL_RATIO = 1.2


@dataclass(frozen=True)
class HeldOut:
    """Errors of one fit on points it has not seen."""

    fit: LossFit
    predicted: np.ndarray  # [m] loss
    observed: np.ndarray  # [m] loss
    extrapolation: float  # largest held-out scale over largest fitted one

    @property
    def mean_absolute_error(self) -> float:
        """In units of the loss; NaN where there was no fit."""
        return float(np.mean(np.abs(self.predicted - self.observed)))

    @property
    def mean_log_error(self) -> float:
        """Mean of |log predicted - log observed|: the relative error."""
        return float(np.mean(np.abs(np.log(self.predicted / self.observed))))

    @property
    def bias(self) -> float:
        """Mean of predicted - observed, in units of the loss."""
        return float(np.mean(self.predicted - self.observed))


@dataclass(frozen=True)
class Candidate:
    """A law, and how it is fitted.

    `emphasis` weighs each point by (its scale / the largest)^emphasis: a law that is not quite true
    extrapolates better from the scales nearest to the target."""

    law: Law
    emphasis: float = 0.0
    fixed: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extras = [f"{k}={v:g}" for k, v in self.fixed.items()]
        if self.emphasis:
            extras.append(f"weights ~ scale^{self.emphasis:g}")
        return self.law.key + (f" ({', '.join(extras)})" if extras else "")


@dataclass(frozen=True)
class Score:
    """How a candidate did."""

    candidate: Candidate
    fit: LossFit  # on all the data
    folds: tuple[HeldOut, ...]  # those it could be fitted in, largest scale first
    failed_folds: int
    error: float  # mean held-out |log| error over its folds; NaN where it has none
    aicc: float  # NaN under an emphasis, whose weights make it incomparable


@dataclass(frozen=True)
class Selection:
    """Candidates from best to worst, and by what they were ranked ("held-out error" or "AICc")."""

    scores: tuple[Score, ...]
    ranked_by: str

    @property
    def best(self) -> Score:
        return self.scores[0]


def levels(scale: np.ndarray) -> np.ndarray:
    """Number each point's level [n]: values within a factor LEVEL_RATIO of a neighbour are one."""
    scale = np.asarray(scale, dtype=float)
    order = np.argsort(scale, kind="stable")
    jumps = np.diff(np.log(scale[order])) > np.log(LEVEL_RATIO)
    numbered = np.empty(len(scale), dtype=int)
    numbered[order] = np.concatenate([[0], np.cumsum(jumps)])
    return numbered


def held_out(
    candidate: Candidate,
    inputs: Inputs,
    loss: np.ndarray,
    scale: np.ndarray,
    held: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    cells: np.ndarray | None = None,
    huber: float = HUBER,
    bootstrap: int = 0,
    trial_noise: np.ndarray | float = 0.0,
) -> HeldOut:
    """Fit a candidate without the points `held` [n] bool, and predict them.

    `scale` [n] is what the hold-out extrapolates in: FLOPs, a budget, or parameters. Resamples
    (`bootstrap` of them, with `trial_noise` [n] or one for all) give the fit intervals."""
    loss, scale = np.asarray(loss, dtype=float), np.asarray(scale, dtype=float)
    if held.all() or not held.any():
        raise UserError("a hold-out needs points on both sides: none, or all, are held out")
    columns = input_columns(candidate.law.form, inputs)
    seen = ~held
    fit = _fit(
        candidate,
        {k: v[seen] for k, v in columns.items()},
        loss[seen],
        scale[seen],
        None if weights is None else weights[seen],
        None if cells is None else cells[seen],
        huber,
        bootstrap,
        trial_noise[seen] if isinstance(trial_noise, np.ndarray) else trial_noise,
    )
    predicted = fit.predict({k: v[held] for k, v in columns.items()})
    reach = float(scale[held].max() / scale[seen].max())
    return HeldOut(fit, predicted, loss[held], reach)


def aicc(fit: LossFit) -> float:
    """Akaike's criterion, corrected for few points; lower is better, on the same data only.

    Takes the Huber loss as the log density of errors whose scale is fitted too (for a width far
    below the errors, Laplace's): 2 n log(objective / width / n) + 2 k + 2 k (k + 1) / (n - k -
    1)."""
    n, k = fit.n_points, fit.n_free + 1
    if not fit.ok or n <= k + 1:
        return float("nan")
    spread = max(fit.objective / fit.huber / n, 1e-300)
    return 2 * n * np.log(spread) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def select(
    candidates: Sequence[Candidate],
    inputs: Inputs,
    loss: np.ndarray,
    scale: np.ndarray,
    *,
    folds: int = 2,
    weights: np.ndarray | None = None,
    cells: np.ndarray | None = None,
    huber: float = HUBER,
) -> Selection:
    """Rank candidates by how well they predict each of the `folds` largest levels from smaller
    ones.

    A candidate that cannot be fitted in some fold ranks behind all that can. Where no candidate
    can be fitted in any fold, AICc ranks them and `ranked_by` says so."""
    if not candidates:
        raise UserError("no law to choose from: name at least one")
    loss, scale = np.asarray(loss, dtype=float), np.asarray(scale, dtype=float)
    level = levels(scale)
    tests = list(range(level.max(), 0, -1))[:folds]
    fits: list[LossFit] = []
    errors: list[list[HeldOut]] = []
    for candidate in candidates:
        columns = input_columns(candidate.law.form, inputs)
        fits.append(_fit(candidate, columns, loss, scale, weights, cells, huber))
        errors.append([])
        for k in tests:
            kept = level <= k
            errors[-1].append(
                held_out(
                    candidate,
                    {name: v[kept] for name, v in columns.items()},
                    loss[kept],
                    scale[kept],
                    level[kept] == k,
                    weights=None if weights is None else weights[kept],
                    cells=None if cells is None else cells[kept],
                    huber=huber,
                )
            )
    scores = []
    for candidate, fit, tried in zip(candidates, fits, errors, strict=True):
        judged = tuple(h for h in tried if h.fit.ok)
        error = float(np.mean([h.mean_log_error for h in judged])) if judged else float("nan")
        criterion = float("nan") if candidate.emphasis else aicc(fit)
        scores.append(Score(candidate, fit, judged, len(tests) - len(judged), error, criterion))
    by_error = any(s.folds for s in scores)

    def rank(score: Score) -> tuple[bool, int, float]:
        value = score.error if by_error else score.aicc
        known = bool(np.isfinite(value))
        return (not (score.fit.ok and known), score.failed_folds, value if known else 0.0)

    return Selection(tuple(sorted(scores, key=rank)), "held-out error" if by_error else "AICc")


def _fit(
    candidate: Candidate,
    columns: Mapping[str, np.ndarray],
    loss: np.ndarray,
    scale: np.ndarray,
    weights: np.ndarray | None,
    cells: np.ndarray | None,
    huber: float,
    bootstrap: int = 0,
    trial_noise: np.ndarray | float = 0.0,
) -> LossFit:
    emphasis = (scale / scale.max()) ** candidate.emphasis
    return candidate.law.fit(
        columns,
        loss,
        emphasis if weights is None else emphasis * weights,
        cells=cells,
        fixed=candidate.fixed,
        huber=huber,
        bootstrap=bootstrap,
        trial_noise=trial_noise,
    )
