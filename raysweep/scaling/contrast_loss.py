"""One side over another by laws of the loss: losses, and what each needs for equal loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from raysweep.scaling.compute.efficiency import FARTHEST, amount_for
from raysweep.scaling.contrast import (
    CONVERGED,
    OF_COMPUTE,
    ONE_LAW,
    OWN_LAWS,
    SAME_SIZE,
    C,
    Contrast,
    D,
    N,
    no_contrast,
)
from raysweep.scaling.fits import Fits
from raysweep.scaling.groups import Group
from raysweep.scaling.loss.data import LossData
from raysweep.scaling.loss.fit import LossFit, interval_ends

Loss = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(active non-embedding N, D) [B] -> loss [B], each of another draw; the estimate first."""


def contrast_losses(
    reference: Fits, other: Fits, matched: Contrast, *, seed: int = 0
) -> list[Contrast]:
    """By laws of the loss: the losses at one size, tokens and FLOPs for equal loss.

    At the largest size that both have cells about; beyond it the laws would extrapolate. By each
    side's own law and, where `matched` tells the ratio of the losses of cells of the same size, by
    the reference's law and this ratio: more certain, if the ratio is the same at all sizes.
    """
    groups = [_group(f) for f in (reference, other)]
    at = _common_size(reference.cells, other.cells)
    own = [g.loss_laws.get("chinchilla") for g in groups]
    laws = [f if isinstance(f, LossFit) and f.ok else None for f in own]
    found: list[Contrast] = []
    if at is not None and laws[0] is not None and matched.ok and math.isfinite(matched.low):
        (draws,) = _draws([laws[0]], seed)
        law = _of_own_law(groups[0], laws[0], draws)
        factor = _factor(matched, len(draws), seed)
        pair = [law, lambda n, d: factor * law(n, d)]
        found += _by_size(groups, pair, len(draws), at, laws[0].n_cells, ONE_LAW)[1:]
    if at is not None and laws[0] is not None and laws[1] is not None:
        both = [laws[0], laws[1]]
        draws = _draws(both, seed)
        pair = [_of_own_law(*each) for each in zip(groups, both, draws, strict=True)]
        n = sum(f.n_cells for f in both)
        found += _by_size(groups, pair, len(draws[0]), at, n, OWN_LAWS)
    return found or _by_compute(groups, reference.cells, other.cells, seed)


def _group(fits: Fits) -> Group:
    return next(iter(fits.groups.values()))


def _factor(matched: Contrast, length: int, seed: int) -> np.ndarray:
    """Draws [length] of the ratio of losses, the estimate first; of its interval's width."""
    sd = (math.log(matched.high) - math.log(matched.low)) / (2 * 1.96)
    drawn = np.random.default_rng(seed).standard_normal(length) * sd
    drawn[0] = 0.0
    return matched.ratio * np.exp(drawn)


def _of_own_law(group: Group, fit: LossFit, draws: np.ndarray) -> Loss:
    count = _trend(_known(group.cells), LossData.from_cells(group.cells).inputs(fit.law)[1])
    return lambda n, d: fit.law.predict_each(draws, {"params": count(n), "tokens": d})


def _by_size(
    groups: list[Group],
    losses: list[Loss],
    length: int,
    at: tuple[float, float],
    n: int,
    how: str,
) -> list[Contrast]:
    """Contrasts of two losses in active N and D, `length` draws of each, at one size."""
    params, tokens = (value * np.ones(length) for value in at)
    cost = [_trend(_known(g.cells), C, per_token=True) for g in groups]
    target = losses[0](params, tokens)
    needed = amount_for(lambda d: losses[1](params, d), target, at[1])
    # Along equal tokens a parameter: both grow with the root of N D.
    growth = amount_for(lambda s: losses[1](params * np.sqrt(s), tokens * np.sqrt(s)), target, 1.0)
    reached = np.clip(growth, 1 / FARTHEST, FARTHEST)
    # cost is of a token, which grows with N; tokens and N each grow with the root
    flops = np.sqrt(growth) * cost[1](params * np.sqrt(reached)) / cost[0](params)
    where = {"params": at[0], "tokens": at[1]}
    return [
        _contrast("loss", "N and D", losses[1](params, tokens) / target, n, how, where),
        _contrast("tokens", "loss and N", needed / tokens, n, how, where),
        _contrast("flops", "loss and tokens a parameter", flops, n, how, where),
    ]


def _by_compute(
    groups: list[Group], reference: pd.DataFrame, other: pd.DataFrame, seed: int
) -> list[Contrast]:
    """Contrasts by laws in compute alone, each along its own cells' mix of N and D."""
    own = [g.loss_laws.get("kaplan") for g in groups]
    laws = [f for f in own if isinstance(f, LossFit) and f.ok]
    flops = _common_flops(reference, other)
    if flops is None:
        return [
            no_contrast(
                "flops", "loss", OF_COMPUTE, "no overlap", "the sides share no range of compute"
            )
        ]
    if len(laws) < len(groups):
        why = [f"{f.name}: {f.message or f.status}" for f in own if f is not None and not f.ok]
        said = "; ".join(dict.fromkeys(why)) or "no law of the loss"
        return [no_contrast("flops", "loss", OF_COMPUTE, "no law", said)]
    draws = _draws(laws, seed)
    budget = np.full(len(draws[0]), flops)

    def loss(side: int, c: np.ndarray) -> np.ndarray:
        return laws[side].law.predict_each(draws[side], {"flops": c})

    target = loss(0, budget)
    needed = amount_for(lambda c: loss(1, c), target, flops)
    n = sum(f.n_cells for f in laws)
    where = {"flops": flops}
    return [
        _contrast("loss", "FLOPs", loss(1, budget) / target, n, OF_COMPUTE, where),
        _contrast("flops", "loss", needed / flops, n, OF_COMPUTE, where),
    ]


def _draws(laws: list[LossFit], seed: int) -> list[np.ndarray]:
    """Each law's coefficients [b, p]: the estimate in row 0, then resamples.

    The resamples of two ladders of one shape fall on the same cells; they are shuffled, or errors
    that have nothing to do with each other would cancel in a ratio."""
    rng = np.random.default_rng(seed)
    samples = [f.samples if f.samples is not None else f.values[None][:0] for f in laws]
    length = min(len(s) for s in samples)
    return [
        np.vstack([f.values, rng.permutation(s)[:length]])
        for f, s in zip(laws, samples, strict=True)
    ]


def _contrast(
    quantity: str, equal: str, ratios: np.ndarray, n: int, how: str, at: Mapping[str, float]
) -> Contrast:
    """The estimate [0] and its resamples [1:] as a contrast; infinite is beyond any number."""
    ratio, low, high = float(ratios[0]), math.nan, math.nan
    message = ""
    if math.isfinite(ratio) and len(ratios) > 2:
        logs = np.log(np.minimum(ratios, FARTHEST))
        ends = interval_ends(logs[1:, None], logs[:1], 0.95)
        low, high = (math.exp(float(e[0])) for e in ends)
        high = math.inf if high >= 0.99 * FARTHEST else high
    if math.isinf(ratio):
        message = f"whatever its {quantity}, it does not reach the reference's loss"
    return Contrast(quantity, equal, ratio, low, high, n, how, dict(at), CONVERGED, message)


def _known(cells: pd.DataFrame) -> pd.DataFrame:
    return cells[cells["loss"].notna()]


def _common_size(a: pd.DataFrame, b: pd.DataFrame) -> tuple[float, float] | None:
    """(N, D) of the largest cell of either side that lies within the range of both."""
    known = [_known(cells) for cells in (a, b)]
    if not all(len(cells) for cells in known):
        return None
    both = pd.concat(known)
    inside = np.ones(len(both), dtype=bool)
    for column in (N, D, C):
        low = max(cells[column].min() for cells in known) * (1 - SAME_SIZE)
        high = min(cells[column].max() for cells in known) * (1 + SAME_SIZE)
        inside &= both[column].between(low, high).to_numpy()
    within = both[inside]
    if not len(within):
        return None
    largest = within.iloc[int(within[C].to_numpy(float).argmax())]
    return float(largest[N]), float(largest[D])


def _common_flops(a: pd.DataFrame, b: pd.DataFrame) -> float | None:
    """The largest compute that both sides reach, if their ranges meet."""
    known = [_known(cells)[C] for cells in (a, b)]
    if not all(len(c) for c in known):
        return None
    low, high = max(c.min() for c in known), min(c.max() for c in known)
    return float(high) if low <= high else None


def _trend(
    cells: pd.DataFrame, column: str, per_token: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """A column as a power of active non-embedding parameters, as the cells have it; in proportion
    where they are of one size."""
    values = cells[column].to_numpy(float) / (cells[D].to_numpy(float) if per_token else 1.0)
    x, y = np.log(cells[N].to_numpy(float)), np.log(values)
    if np.ptp(x) < 1e-9:
        slope, level = 1.0, float(y.mean() - x.mean())
    else:
        slope, level = (float(v) for v in np.polyfit(x, y, 1))
    return lambda params: np.exp(level + slope * np.log(params))
