"""Which law of the loss answers: each predicts every level of compute from those below it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from raysweep.errors import UserError
from raysweep.scaling.estimate import NOT_DETERMINED
from raysweep.scaling.loss.data import SPREAD, LossData
from raysweep.scaling.loss.laws import LOSS_LAWS, Law
from raysweep.scaling.loss.model import LEVEL, Ahead, LawScore, LossModel
from raysweep.scaling.loss.posterior import LawPosterior, fit_posterior

ONE_ROUTING_LAWS = ("chinchilla", "kaplan")
"""Laws of cells that all have one routing."""

ROUTING_LAWS = ("wang", "yun", "clark", "joint_moe", "sparsity", "fine_grained")
"""Laws of cells that differ in experts."""

BY_PRIOR = "chinchilla"
"""The law whose prior tells the effect of an N or a D that never varies, with its width."""

MIN_CELLS = 3
LEVELS_AHEAD = 6
"""The highest levels, at most, that are predicted from those below them."""

PREFERENCE, CHANCE = 0.75, 0.8
"""A law answers in place of one listed before it where its error is at most this share of that
one's; over many predicted runs, where chance tells errors of equal laws apart by about 1/sqrt(runs)
at most, 1 - CHANCE/sqrt(runs)."""

PRIOR_LEVELS, WORST_SQUARE = 4.0, 6.0
"""Levels that the claimed variance counts as, against those that were predicted; and the most that
one of these counts for, so that a single level gone wrong does not rule."""

BINS_PER_OCTAVE = 2
"""Batches this near count as one for the three-term law."""


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
    if laws is None and keys == ONE_ROUTING_LAWS and data.unspanned:
        keys = (BY_PRIOR,)  # a law of FLOPs alone would take the effect of N for that of D
    return _choose(data, [LOSS_LAWS[key] for key in keys])


def choose_law(data: LossData, law: Law) -> LossModel:
    """The same of one law, which need not be among `LOSS_LAWS`."""
    return _choose(data.averaged(), [law])


def _choose(data: LossData, laws: Sequence[Law]) -> LossModel:
    level = data.levels()
    fits = {law.key: _score(law, data, level) for law in laws}
    scores = tuple(score for score, _ in fits.values())
    usable = [score for score in scores if score.ok]
    if not usable:
        why = "; ".join(f"{score.law}: {score.why}" for score in scores)
        return LossModel(NOT_DETERMINED, why, data, scores)
    best = usable[0]
    for score in usable[1:]:
        if score.error < max(PREFERENCE, 1 - CHANCE / math.sqrt(score.runs)) * best.error:
            best = score
    posterior = fits[best.law][1]
    squares = [min(a.square, WORST_SQUARE) for a in best.ahead]
    inflation = (PRIOR_LEVELS + sum(squares)) / (PRIOR_LEVELS + len(squares))
    return LossModel(
        status="ok",
        why="",
        data=data,
        scores=scores,
        law=next(law for law in laws if law.key == best.law),
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
    # Levels are predicted by prior alone only where all of the data leave it so: else a law would
    # be held to levels that others need not predict.
    by_prior = law.key == BY_PRIOR and bool(data.unspanned)
    why = _why_silent(inputs, data.loss, by_prior)
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
        if not _why_silent(below.inputs(law)[0], below.loss, by_prior):
            ahead.append(_predict_level(law, below, held, len(np.unique(level[level < k]))))
    if not ahead:
        return refused("no level of compute has enough below it to be predicted from", count)
    error = float(np.average([a.error for a in ahead], weights=[a.seen for a in ahead]))
    return LawScore(law.key, count, error, tuple(ahead)), posterior


def _why_silent(inputs: Mapping[str, np.ndarray], loss: np.ndarray, by_prior: bool) -> str:
    """Why these cells can tell nothing of a law of these inputs, if so; `by_prior` lets its prior
    tell the effect of those that never vary."""
    places = np.unique(np.log1p(np.stack(list(inputs.values()), axis=1)), axis=0)
    if len(places) < MIN_CELLS:
        cells = "1 distinct cell" if len(places) == 1 else f"{len(places)} distinct cells"
        return f"{cells}: at least {MIN_CELLS} are needed"
    for name, value in inputs.items():
        spread = -np.log1p(-value) if name == "sparsity" else np.log(value)
        if np.ptp(spread) < SPREAD and not by_prior:
            return f"every cell has the same {name}: add cells at another"
    if np.ptp(np.log(loss)) < 1e-9:
        return "every loss is the same, so nothing can be told to scale"
    return ""


def _predict_level(law: Law, below: LossData, held: LossData, levels: int) -> Ahead:
    posterior = fit_data(law, below)
    mean, sd = posterior.predict(held.inputs(law)[0])
    sd = np.sqrt(sd**2 + posterior.noise_sd**2 + held.log_se**2)
    off = np.log(held.loss) - mean
    inside = np.abs(off) <= stdtrit(levels, 0.5 + LEVEL / 2) * sd
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
