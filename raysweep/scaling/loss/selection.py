"""Which law of the loss answers: each predicts every level of compute from those below it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import t as student

from raysweep.errors import UserError
from raysweep.scaling.estimate import NOT_DETERMINED
from raysweep.scaling.loss.data import STAND_INS, LossData
from raysweep.scaling.loss.fit import LossFit, fit_law
from raysweep.scaling.loss.laws import LOSS_LAWS, Law
from raysweep.scaling.loss.model import LEVEL, Ahead, LawScore, LossModel
from raysweep.scaling.loss.posterior import LawPosterior, fit_posterior
from raysweep.scaling.loss.solver import HUBER

ONE_ROUTING_LAWS = ("chinchilla", "kaplan")
"""Laws of cells that all have one routing."""

ROUTING_LAWS = ("wang", "yun", "clark", "joint_moe", "sparsity", "fine_grained")
"""Laws of cells that differ in experts."""

FEWEST_CELLS = 3
LEVELS_AHEAD = 6
"""The highest levels, at most, that are predicted from those below them."""

PREFERENCE = 0.75
"""A law answers in place of one listed before it where its error is this share of that one's."""

SPREAD = 0.05
"""An input that varies by less, in its log, says nothing of its exponent."""

PRIOR_LEVELS, WORST_SQUARE = 4.0, 6.0
"""Levels that the claimed variance counts as, against those that were predicted; and the most that
one of these counts for, so that a single level gone wrong does not rule."""

BINS_PER_OCTAVE = 2
"""Batches this near count as one for the three-term law."""

RESAMPLED = 2
"""Laws of a group whose predictions of unseen cells get an interval."""


def choose_loss(data: LossData, laws: Sequence[str] | None = None) -> LossModel:
    """The answer about the loss: the law that predicts best one level of compute ahead.

    `laws` are keys of `LOSS_LAWS`, those preferred among equals first; by default the laws of one
    routing, or of several. Repeats are averaged first. A law that cannot be fitted, ends at a bound
    or has no level to predict does not answer; where none does, the model is `not determined` and
    says why."""
    for name in laws or ():
        if name not in LOSS_LAWS:
            raise UserError(f"unknown law of the loss '{name}'; known: {', '.join(LOSS_LAWS)}")
    data = data.averaged()
    keys = laws or (ROUTING_LAWS if len(_routings(data)) > 1 else ONE_ROUTING_LAWS)
    level = data.levels()
    fits = {key: _score(LOSS_LAWS[key], data, level) for key in keys}
    scores = tuple(score for score, _ in fits.values())
    usable = [score for score in scores if score.ok]
    if not usable:
        why = "; ".join(f"{score.law}: {score.why}" for score in scores)
        return LossModel(NOT_DETERMINED, why, data, scores)
    best = usable[0]
    for score in usable[1:]:
        if score.error < PREFERENCE * best.error:
            best = score
    posterior = fits[best.law][1]
    squares = [min(a.square, WORST_SQUARE) for a in best.ahead]
    inflation = (PRIOR_LEVELS + sum(squares)) / (PRIOR_LEVELS + len(squares))
    return LossModel(
        status="ok",
        why="",
        data=data,
        scores=scores,
        law=LOSS_LAWS[best.law],
        count=best.count,
        posterior=posterior,
        inflation=math.sqrt(max(1.0, inflation)),
        freedom=int(level.max()) + 1,
    )


def _routings(data: LossData) -> np.ndarray:
    """The different (experts, top_k) among runs [k, 2]; dense where none is told."""
    pairs = np.stack([data.columns["experts"], data.columns["top_k"]], axis=1)
    return np.unique(np.nan_to_num(pairs, nan=1.0), axis=0)


def fit_data(law: Law, data: LossData, *, fine: bool = False) -> LawPosterior:
    """The posterior of a law on averaged data."""
    inputs, _ = data.inputs(law)
    return fit_posterior(law, inputs, data.loss, data.log_se, run_sd=data.run_sd, fine=fine)


def _score(law: Law, data: LossData, level: np.ndarray) -> tuple[LawScore, LawPosterior | None]:
    """How a law does on each level from those below it, and its fit to all of them."""

    def refused(why: str, count: str = "") -> tuple[LawScore, None]:
        return LawScore(law.key, count, math.nan, (), why), None

    try:
        inputs, count = data.inputs(law)
    except UserError as error:
        return refused(str(error))
    why = _why_silent(law, inputs, data.loss)
    if why:
        return refused(why, count)
    posterior = fit_data(law, data, fine=True)
    if posterior.at_bound:
        return refused(
            f"{', '.join(posterior.at_bound)} ended on the edge of the allowed range", count
        )
    ahead = []
    for k in range(max(1, level.max() + 1 - LEVELS_AHEAD), level.max() + 1):
        below, held = data.select(level < k), data.select(level == k)
        if not _why_silent(law, below.inputs(law)[0], below.loss):
            ahead.append(_predict_level(law, below, held, len(np.unique(level[level < k]))))
    if not ahead:
        return refused("no level of compute has enough below it to be predicted from", count)
    error = float(np.average([a.error for a in ahead], weights=[a.seen for a in ahead]))
    return LawScore(law.key, count, error, tuple(ahead)), posterior


def _why_silent(law: Law, inputs: Mapping[str, np.ndarray], loss: np.ndarray) -> str:
    """Why these cells can tell nothing of a law, if so."""
    places = np.unique(np.log1p(np.stack(list(inputs.values()), axis=1)), axis=0)
    if len(places) < FEWEST_CELLS:
        cells = "1 distinct cell" if len(places) == 1 else f"{len(places)} distinct cells"
        return f"{cells}: at least {FEWEST_CELLS} are needed"
    for name, value in inputs.items():
        spread = -np.log1p(-value) if name == "sparsity" else np.log(value)
        if np.ptp(spread) < SPREAD:
            return f"every cell has the same {name}: add cells at another"
    if np.ptp(np.log(loss)) < 1e-9:
        return "every loss is the same, so nothing can be told to scale"
    return ""


def _predict_level(law: Law, below: LossData, held: LossData, levels: int) -> Ahead:
    posterior = fit_data(law, below)
    mean, sd = posterior.predict(held.inputs(law)[0])
    sd = np.sqrt(sd**2 + posterior.noise_sd**2 + held.log_se**2)
    off = np.log(held.loss) - mean
    inside = np.abs(off) <= student(levels).ppf(0.5 + LEVEL / 2) * sd
    return Ahead(
        flops=float(np.exp(np.log(held.flops).mean())),
        reach=float(np.log(held.flops.max() / below.flops.max())),
        n=len(off),
        seen=len(below),
        error=float(np.abs(off).mean()),
        bias=float(off.mean()),
        square=float(np.mean((off / sd) ** 2)),
        covered=int(inside.sum()),
    )


@dataclass(frozen=True)
class NotFitted:
    """A law of the loss that these cells cannot even be given to, with why."""

    name: str
    message: str
    status: str = "missing input"

    @property
    def ok(self) -> bool:
        return False

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {"law": self.name, "status": self.status, "message": self.message}


@dataclass(frozen=True)
class Unseen:
    """A cell that a law of the loss predicted without having seen it; the interval, NaN without
    resamples, is that of a new run."""

    cell: str
    observed: float
    predicted: float
    low: float
    high: float


@dataclass(frozen=True)
class LossCheck:
    """How a law of the loss does on compute it has not seen; NaN where it could not be tried.

    `error` is the mean |ln(predicted / observed)| over the highest level of compute, predicted from
    the lower ones; `extrapolation` the factor in FLOPs between the two; `aicc` as of
    `aicc`; `unseen` each cell of that level.
    """

    error: float
    n_test: int
    extrapolation: float
    aicc: float
    unseen: tuple[Unseen, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain values, NaN kept."""
        return asdict(self)


def check_loss_law(
    fit: LossFit | NotFitted, cells: pd.DataFrame, *, n_boot: int = 200, seed: int = 0
) -> LossCheck:
    """Leave out the highest level of compute of the cells that a law was fitted to, and predict it.

    `cells` are those of `fit_loss_law`: rows without a loss are left."""
    nothing = LossCheck(math.nan, 0, math.nan, math.nan)
    if not isinstance(fit, LossFit) or not fit.ok:
        return nothing
    data = LossData.from_cells(cells)
    level = data.levels()
    held = level == level.max()
    if held.all():
        return replace(nothing, aicc=aicc(fit))
    below, above = data.select(~held), data.select(held)
    extrapolation = float(above.flops.max() / below.flops.max())
    tried = fit_law(fit.law, below, bootstrap=n_boot, seed=seed)
    if not tried.ok:
        return LossCheck(math.nan, len(above), extrapolation, aicc(fit))
    inputs, _ = above.inputs(fit.law)
    predicted = tried.predict(inputs)
    low = high = np.full(len(above), math.nan)
    if tried.samples is not None and len(tried.samples) > 1:
        low, high = tried.interval(inputs, new_observation=True, seed=seed)
    names = cells.index[cells["loss"].notna()][held]
    unseen = zip(names, above.loss, predicted, low, high, strict=True)
    return LossCheck(
        error=float(np.abs(np.log(predicted / above.loss)).mean()),
        n_test=len(above),
        extrapolation=extrapolation,
        aicc=aicc(fit),
        unseen=tuple(Unseen(str(c), *(float(v) for v in values)) for c, *values in unseen),
    )


def check_loss_laws(
    fits: Mapping[str, LossFit | NotFitted],
    cells: pd.DataFrame,
    *,
    n_boot: int = 200,
    seed: int = 0,
) -> dict[str, LossCheck]:
    """The check of each law; the `RESAMPLED` that predict best get intervals, which take long."""
    checks = {key: check_loss_law(fit, cells, n_boot=0) for key, fit in fits.items()}
    tried = [key for key, check in checks.items() if math.isfinite(check.error)]
    for key in sorted(tried, key=lambda k: checks[k].error)[:RESAMPLED]:
        checks[key] = check_loss_law(fits[key], cells, n_boot=n_boot, seed=seed)
    return checks


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


def fit_loss_law(
    cells: pd.DataFrame, law: str, *, n_boot: int = 200, seed: int = 0
) -> LossFit | NotFitted:
    """Fit one law of `LOSS_LAWS` to the column `loss` of a cell table; rows without it are left."""
    if law not in LOSS_LAWS:
        raise UserError(f"unknown law of the loss {law!r}; known: {', '.join(LOSS_LAWS)}")
    data = LossData.from_cells(cells)
    if not len(data):
        return NotFitted(law, f"no finished trial tells all of {_listed(law)}", "too few cells")
    # Three cells leave no freedom for a floor, and cannot tell which of them is a stray: Kaplan's
    # own form by least squares is all there is.
    bare = law == "kaplan" and len(data) == 3
    try:
        return fit_law(
            LOSS_LAWS[law],
            data,
            fixed={"E0": 0.0} if bare else None,
            huber=1.0 if bare else HUBER,
            bootstrap=n_boot,
            seed=seed,
        )
    except UserError as error:
        return NotFitted(law, str(error))


def fit_loss_laws(
    cells: pd.DataFrame, laws: Sequence[str], *, n_boot: int = 200, seed: int = 0
) -> dict[str, LossFit | NotFitted]:
    """Several laws over one group, by key."""
    return {law: fit_loss_law(cells, law, n_boot=n_boot, seed=seed) for law in laws}


def batch_table(cells: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """The best trial of each half octave of batch of each cell: what the three-term law is
    fitted on.

    Columns as in `cells`, with `batch_tokens`, `steps`, `loss`, and `cell_group` for resampling.
    """
    known = trials[(trials["batch_tokens"] > 0) & trials["cell"].isin(cells.index)]
    # Where batches are drawn from a continuous range each has one trial, at any learning rate: only
    # neighbours tell what a batch can reach. Grids of powers of two, or of sqrt 2, stay as they
    # are.
    bins = np.round(BINS_PER_OCTAVE * np.log2(known["batch_tokens"].to_numpy(float)))
    best = known.loc[known["loss"].groupby([known["cell"], bins]).idxmin()]
    table = cells.loc[best["cell"]].drop(columns=["loss"], errors="ignore").reset_index()
    batch = best["batch_tokens"].to_numpy(float)
    return table.assign(
        cell_group=table["cell"],
        batch_tokens=batch,
        steps=table["tokens"].to_numpy(float) / batch,
        loss=best["loss"].to_numpy(float),
    )


def predict_loss(
    fits: Mapping[str, LossFit | NotFitted], order: Sequence[str], inputs: Mapping[str, float]
) -> tuple[str, float, float, float] | None:
    """(law, loss, low, high) at one point by the first fitted law of `order` whose inputs are
    given.

    `inputs` holds `tokens`, `flops`, `experts`, `top_k` and parameter counts by column. The
    interval is that of a new run; NaN where the law was not resampled. None where no law can
    tell.
    """
    for key in order:
        fit = fits.get(key)
        if not isinstance(fit, LossFit) or not fit.ok:
            continue
        count = inputs.get(fit.law.parameter_count)
        if count is None or not math.isfinite(count):
            count = inputs.get(STAND_INS.get(fit.law.parameter_count, ""), math.nan)
        point = {**inputs, "params": count, "sparsity": 1 - inputs["top_k"] / inputs["experts"]}
        wanted = {name: np.array([point[name]]) for name in fit.law.inputs if name in point}
        if len(wanted) < len(fit.law.inputs) or not np.isfinite(list(wanted.values())).all():
            continue
        value = float(fit.predict(wanted)[0])
        if fit.samples is None or len(fit.samples) < 2:
            return key, value, math.nan, math.nan
        low, high = fit.interval(wanted, new_observation=True)
        return key, value, float(low[0]), float(high[0])
    return None


def _listed(law: str) -> str:
    return ", ".join((*LOSS_LAWS[law].inputs, "loss"))
