"""Compute-optimal allocation: how many parameters and tokens a budget should buy.

The least expected loss along a budget, by the model of the loss and its draws. Intervals join what
the model is uncertain of with what changes when a whole level of compute is left out (the
jackknife over levels), for errors that a budget's runs share do not average out within it. Where
budgets were held, the best size of each is also predicted from the smaller ones and held against
the parabola through its own runs, and that error joins too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from raysweep.errors import UserError
from raysweep.scaling.compute.isoflop import read_minimum
from raysweep.scaling.estimate import NOT_DETERMINED, Estimate
from raysweep.scaling.loss.data import held_budgets
from raysweep.scaling.loss.model import LEVEL, LossModel
from raysweep.scaling.loss.posterior import LawPosterior
from raysweep.scaling.loss.selection import LEVELS_AHEAD, fit_data
from raysweep.scaling.runs import flops_trend
from raysweep.study.shape import COUNTS
from raysweep.text import estimated, written

Interval = tuple[float, float]

OUTSIDE = 2.0
"""A split further than this from the sizes and tokens that were fitted is outside them. At the
largest cell's budget every split but that cell's own is a little beyond one or the other."""

FARTHEST = 1e3
"""Sizes are looked for this far beyond the cells' own, or as far as the budget is from theirs."""

GRID, WINDOW, WINDOW_GRID = 241, math.log(1e3), 61
"""Sizes looked at; then those about the best, within a factor, for the draws."""

DECADE = math.log(10.0)
"""Exponents are taken over the cells' range of ln compute, or this where it is narrower."""

DRAWS = 600
MIN_LEVELS = 4
"""A jackknife over fewer levels says little."""


Count = Callable[[np.ndarray], np.ndarray]
"""FLOPs a token of models of N parameters."""


@dataclass(frozen=True)
class Allocation:
    """The loss-optimal split of a budget; NaN, and a word in `status`, where there is none.

    `params` are of the kind `count`; `exponent` is d ln N_opt / d ln C over the cells' range of
    compute, `tokens_exponent` that of D. `intervals`, of 95 %, are of params, tokens, loss,
    exponent and tokens_exponent; that of the loss is of a new run. `extrapolation` holds params and
    tokens of the split over the largest of each that was fitted (over the smallest, where they lie
    below it; 1 inside): a split far `outside` them is the model's word alone. `why` says what is
    missing."""

    flops: float
    count: str
    params: float
    tokens: float
    loss: float
    exponent: float
    tokens_exponent: float
    status: str  # interior, outside, out of range, not determined
    why: str = ""
    intervals: dict[str, Interval] = field(default_factory=dict)
    extrapolation: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status in ("interior", "outside")

    def estimate(self, name: str) -> Estimate:
        """One of its numbers with its interval."""
        if not self.ok:
            return Estimate.missing(self.why, self.status)
        return Estimate(getattr(self, name), *self.intervals[name], self.status)


def _own_cost(model: LossModel) -> Count:
    """FLOPs a token of the model's own runs, against the N of its law."""
    law = model.require().law
    assert law is not None
    inputs, _ = model.data.inputs(law)
    return flops_trend(inputs["params"], model.data.flops / model.data.columns["tokens"])


def compute_optimal(
    model: LossModel,
    flops: npt.ArrayLike,
    *,
    given: Mapping[str, float] | None = None,
    flops_per_token: Count | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Allocation]:
    """The best split of each of several budgets (FLOPs).

    `given` holds the law's other inputs (experts, top_k, granularity). `flops_per_token` maps the
    law's N to the training FLOPs of a token: by default the trend of the model's own runs. A
    budget whose best size the data leave open by more than a factor of 1000, or put beyond a
    thousand times the cells', has a word and no number. Raises UserError for a budget that is not
    positive."""
    budgets = np.atleast_1d(np.asarray(flops, dtype=float))
    for budget in budgets:
        if not (np.isfinite(budget) and budget > 0):
            raise UserError(f"a budget must be a positive number of FLOPs, not {budget:g}")
    why = _why_silent(model)
    if why:
        return [_nothing(float(c), model.count, NOT_DETERMINED, why) for c in budgets]
    along = _Along(model, dict(given or {}), flops_per_token or _own_cost(model))
    left_out = _left_out(model) if draws else []
    shown = _shown_ahead(along) if draws else 0.0
    return [_allocate(along, float(c), left_out, shown, draws, seed) for c in budgets]


def best_size(
    model: LossModel,
    flops: float,
    *,
    given: Mapping[str, float] | None = None,
    flops_per_token: Count | None = None,
) -> float:
    """The N of the least expected loss at a budget; NaN where it lies out of range."""
    posterior = model.require().posterior
    assert posterior is not None
    along = _Along(model, dict(given or {}), flops_per_token or _own_cost(model))
    return float(np.exp(along.best(posterior, flops)))


def outside(ranges: Mapping[str, Interval], params: float, tokens: float) -> dict[str, float]:
    """How many times the largest params and tokens of `ranges` a run has, or the smallest where it
    has fewer; 1 inside."""
    run = {"params": params, "tokens": tokens}
    return {name: value / float(np.clip(value, *ranges[name])) for name, value in run.items()}


def lies_outside(factors: Mapping[str, float]) -> bool:
    """Whether a run of such factors lies outside what was fitted by more than `OUTSIDE`."""
    return any(max(f, 1 / f) > OUTSIDE for f in factors.values())


def ranges_of(model: LossModel) -> dict[str, Interval]:
    """The smallest and largest of every input that the model's law was fitted to."""
    assert model.law is not None
    inputs, _ = model.data.inputs(model.law)
    return {name: (float(v.min()), float(v.max())) for name, v in inputs.items()}


@dataclass(frozen=True)
class _Along:
    """The expected loss along a budget."""

    model: LossModel
    given: dict[str, float]
    cost: Count
    known: dict[tuple[LawPosterior, float], float] = field(default_factory=dict)

    def runs(self, flops: float, log_params: np.ndarray) -> dict[str, np.ndarray]:
        """The columns of runs of given ln N at a budget."""
        params = np.exp(log_params)
        own = dict.fromkeys(COUNTS, params)
        return {
            **{name: np.full(len(params), value) for name, value in self.given.items()},
            **own,
            "tokens": flops / self.cost(params),
            "flops": np.full(len(params), flops),
        }

    def inputs(self, flops: float, log_params: np.ndarray) -> dict[str, np.ndarray]:
        return self.model.inputs(self.runs(flops, log_params))[0]

    def grid(self, flops: float) -> np.ndarray:
        """The ln N that are looked at for a budget."""
        low, high = np.log(ranges_of(self.model)["params"])
        most = self.model.data.flops
        far = abs(np.log(flops) - np.clip(np.log(flops), *np.log([most.min(), most.max()])))
        reach = max(far, np.log(FARTHEST))
        return np.linspace(low - reach, high + reach, GRID)

    def best(self, posterior: LawPosterior, flops: float) -> float:
        """ln N of the least expected loss by a posterior; NaN where it lies at the end of the
        grid."""
        found = self.known.get((posterior, flops))
        if found is None:
            grid = self.grid(flops)
            found = float(_lowest(grid, posterior.mean(self.inputs(flops, grid))[None])[0])
            self.known[posterior, flops] = found
        return found


def _allocate(
    along: _Along,
    flops: float,
    others: list[LawPosterior],
    shown: float,
    draws: int,
    seed: int,
) -> Allocation:
    model = along.model
    assert model.posterior is not None
    low, high = np.log([model.data.flops.min(), model.data.flops.max()])
    half = 0.5 * max(high - low, DECADE)
    steps = np.array(
        [math.exp(0.5 * (low + high) - half), flops, math.exp(0.5 * (low + high) + half)]
    )
    best = np.array([along.best(model.posterior, float(c)) for c in steps])
    if not np.isfinite(best).all():
        return _nothing(
            flops, model.count, "out of range", "the loss still falls at the ends of the range"
        )
    params = float(np.exp(best[1]))
    loss, low, high = (float(v[0]) for v in model.predict(along.runs(flops, best[1:2])))
    values = _quantities(along, steps, best)
    intervals: dict[str, Interval] = {}
    if draws:
        window = [b + np.linspace(-WINDOW, WINDOW, WINDOW_GRID) for b in best]
        runs = [along.runs(float(c), w) for c, w in zip(steps, window, strict=True)]
        joined = {name: np.concatenate([r[name] for r in runs]) for name in runs[0]}
        sampled = model.sample(joined, draws, seed).reshape(draws, len(steps), WINDOW_GRID)
        drawn = np.stack(
            [_lowest(w, sampled[:, k]) for k, w in enumerate(window)], axis=1
        )  # [draws, 3]
        if np.isnan(drawn).any(axis=1).mean() > 1 - LEVEL:
            return _nothing(
                flops,
                model.count,
                NOT_DETERMINED,
                "the best size is open by more than a factor of 1000 to either side",
            )
        kept = drawn[np.isfinite(drawn).all(axis=1)]
        left_out = np.array([[along.best(p, float(c)) for c in steps] for p in others])
        left_out = left_out[np.isfinite(left_out).all(axis=1)] if len(left_out) else left_out
        spread = _quantities(along, steps, kept)
        jackknife = _quantities(along, steps, left_out) if len(left_out) > 2 else {}
        for name, draw in spread.items():
            least = 0.0 if name.endswith("exponent") else shown
            ends = _ends(float(values[name]), draw, jackknife.get(name), least, model.freedom)
            exponent = name.endswith("exponent")
            intervals[name] = ends if exponent else (math.exp(ends[0]), math.exp(ends[1]))
        intervals["loss"] = (low, high)
    tokens = float(np.exp(values["tokens"]))
    factors = outside(ranges_of(model), params, tokens)
    return Allocation(
        flops=flops,
        count=model.count,
        params=params,
        tokens=tokens,
        loss=loss,
        exponent=float(values["exponent"]),
        tokens_exponent=float(values["tokens_exponent"]),
        status="outside" if lies_outside(factors) else "interior",
        intervals=intervals,
        extrapolation=factors,
    )


def _quantities(along: _Along, steps: np.ndarray, best: np.ndarray) -> dict[str, np.ndarray]:
    """ln N_opt, ln D_opt at the middle of three budgets, and both exponents between the outer two,
    from ln N_opt [..., 3]."""
    span = math.log(steps[2] / steps[0])
    log_tokens = np.log(steps) - np.log(along.cost(np.exp(best)))
    return {
        "params": best[..., 1],
        "tokens": log_tokens[..., 1],
        "exponent": (best[..., 2] - best[..., 0]) / span,
        "tokens_exponent": (log_tokens[..., 2] - log_tokens[..., 0]) / span,
    }


def _ends(
    value: float, draws: np.ndarray, left_out: np.ndarray | None, shown: float, freedom: int
) -> Interval:
    """The interval of a value from its draws, widened by the jackknife over levels and by the
    error `shown` one level ahead, which has that of reading a budget in it."""
    low, high = np.quantile(draws, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    sd = shown
    if left_out is not None:
        k = len(left_out)
        sd = math.hypot(sd, math.sqrt((k - 1) / k * ((left_out - left_out.mean()) ** 2).sum()))
    own = float(stdtrit(freedom, 0.5 + LEVEL / 2)) * sd
    down, up = max(value - float(low), 0.0), max(float(high) - value, 0.0)
    return value - math.hypot(down, own), value + math.hypot(up, own)


def _lowest(log_params: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    """Where each row of ln losses [B, m] over an even grid is least; NaN at the grid's ends."""
    at = np.argmin(log_loss, axis=1)
    inside = (at > 0) & (at < log_loss.shape[1] - 1)
    middle, shift, _ = least(log_loss)
    found = log_params[middle] + shift * (log_params[1] - log_params[0])
    return np.where(inside, found, np.nan)


def least(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the middle of three points, how many steps beyond it, value), [m] each, of the least of each
    row of [m, n] over an even grid, by a parabola through those points."""
    at = np.clip(np.argmin(values, axis=1), 1, values.shape[1] - 2)
    rows = np.arange(len(values))
    left, middle, right = (values[rows, at + k] for k in (-1, 0, 1))
    bend = np.maximum(left - 2 * middle + right, 1e-300)
    shift = np.clip(0.5 * (left - right) / bend, -1.0, 1.0)
    return at, shift, middle - 0.5 * bend * shift**2


def _left_out(model: LossModel) -> list[LawPosterior]:
    """The law fitted without each level of compute in turn."""
    assert model.law is not None
    level = model.data.levels()
    if level.max() + 1 < MIN_LEVELS:
        return []
    return [fit_data(model.law, model.data.select(level != k)) for k in range(level.max() + 1)]


def _shown_ahead(along: _Along) -> float:
    """Root mean square of ln (best size of a held budget, predicted from those below it, over the
    one that a parabola through its own runs reads); 0 where budgets tell of fewer than two."""
    model = along.model
    assert model.law is not None
    budget = held_budgets(model.data.flops)
    if budget is None:
        return 0.0
    params = model.data.inputs(model.law)[0]["params"]
    found = []
    for k in range(max(2, budget.max() + 1 - LEVELS_AHEAD), budget.max() + 1):
        own = budget == k
        read = read_minimum(params[own], model.data.loss[own])
        below = fit_data(model.law, model.data.select(budget < k))
        found.append(along.best(below, float(model.data.flops[own].mean())) - np.log(read))
    known = np.array([f for f in found if np.isfinite(f)])
    return float(np.sqrt(np.mean(known**2))) if len(known) > 1 else 0.0


def _why_silent(model: LossModel) -> str:
    if not model.ok or model.law is None:
        return model.why
    if not {"params", "tokens"} <= set(model.law.inputs):
        return (
            f"the law '{model.law.key}' answers, which does not read both parameters and tokens: "
            "it cannot say how to split a budget between them"
        )
    for name in model.data.unspanned:
        return f"every cell has the same {name}: add cells at another"
    return ""


COUNT_NAMES = {
    "params_total": "all parameters",
    "params_total_non_embedding": "all parameters but embeddings",
    "params_active": "active parameters",
    "params_active_non_embedding": "active parameters but embeddings",
    "params_dense": "parameters of the dense twin",
}


def allocations_text(found: Mapping[str, Sequence[Allocation]]) -> str:
    """Splits of budgets by architecture as a table for a terminal."""
    lines: list[str] = []
    for name, rows in found.items():
        counts = dict.fromkeys(COUNT_NAMES[a.count] for a in rows if a.ok)
        which = f": N is {', '.join(counts)}" if counts else ""
        lines += [*([""] if lines else []), f"{name}{which}"]
        for a in rows:
            at = f"  {written(a.flops, 'flops'):>9} FLOPs  "
            if not a.ok:
                lines.append(f"{at}{a.status}: {a.why}")
                continue
            said = {
                key: estimated(getattr(a, key), *a.intervals[key], style=key)
                for key in ("params", "tokens", "loss")
            }
            far = ", outside the cells" if a.status == "outside" else ""
            lines.append(f"{at}N {said['params']}, D {said['tokens']}{far}")
            lines.append(f"{'':{len(at)}}loss {said['loss']} of a new run")
        for a in [a for a in rows if a.ok][:1]:
            n, d = (
                estimated(getattr(a, key), *a.intervals[key], style="exponent")
                for key in ("exponent", "tokens_exponent")
            )
            lines.append(f"  over the cells' range N ~ C^{n}, D ~ C^{d}")
    return "\n".join(lines)


def _nothing(flops: float, count: str, status: str, why: str) -> Allocation:
    nan = float("nan")
    return Allocation(flops, count, nan, nan, nan, nan, nan, status, why)
