"""What Wang et al. 2024 (arXiv 2410.05661) say of mixtures of experts, held against a study.

Each claim is a number with its interval and one word: seen, not seen, or not determined. Dense and
MoE are compared at equal loss unless a claim says otherwise; `compare.py` says how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from raysweep.scaling.compare import Ratio, needed
from raysweep.scaling.estimate import Estimate
from raysweep.scaling.evidence import DRAWS, Evidence
from raysweep.study.shape import RunSize

NEAR_OPTIMAL = 0.0025
"""Learning rates and batches within this share of the best loss count as near-optimal."""

TOKENS_SAVED = 0.1637
"""The source's figure. Its convention is not known to us; see `tokens_saved`."""

REACH, STEPS = 4.0, 81
"""How far from the optimum, in logs, near-optimal settings are looked for."""

RIDGE = math.log(2.0)
"""The best rate is read at batches this far to either side of the optimum."""

SLOPE_ERROR = 0.05
"""A valley of one form for all cells tells the slope of its ridge no better than this."""

Verdict = Literal["seen", "not seen", "not determined"]


@dataclass(frozen=True)
class Claim:
    """One claim, the number that a study gives for it, and whether it is seen there."""

    claim: str
    quantity: str
    value: Estimate
    source: str
    """What the source gives."""
    verdict: Verdict
    note: str = ""


def claims(
    evidence: Evidence,
    dense: str,
    moe: str,
    ratios: Sequence[Ratio],
    noise: pd.DataFrame,
) -> list[Claim]:
    """The claims on a MoE architecture against the dense one of the same data.

    `ratios` are those of `compare.compare_arms`, `noise` the measured noise scales by cell."""
    batch, rate, scale, tokens = (
        needed(ratios, q, "loss")
        for q in ("batch_tokens", "learning_rate", "noise_scale_tokens", "tokens")
    )
    found = [
        _ratio("MoE wants a smaller batch", "batch, MoE over dense", batch, below=True),
        _ratio("MoE wants a larger learning rate", "learning rate, MoE over dense", rate,
               below=False),
        _ratio("MoE has a lower gradient noise scale", "noise scale, MoE over dense", scale,
               below=True),
        _saved(tokens),
    ]  # fmt: skip
    found += [_overlap(evidence, dense, moe, ratios, q) for q in ("batch_tokens", "learning_rate")]
    found += [ridge_claim(evidence, name, noise) for name in (dense, moe)]
    return found


def _ratio(claim: str, quantity: str, ratio: Estimate, *, below: bool) -> Claim:
    return Claim(
        f"{claim} at equal loss",
        quantity,
        ratio,
        "below 1" if below else "above 1",
        _verdict(ratio, 1.0, below=below),
    )


def _verdict(value: Estimate, border: float, *, below: bool) -> Verdict:
    """Seen, or seen to be otherwise, where the interval leaves the border out."""
    if not value.known or not value.has_interval:
        return "not determined"
    inside = value.high < border if below else value.low > border
    outside = value.low > border if below else value.high < border
    return "seen" if inside else "not seen" if outside else "not determined"


def tokens_saved(ratio: Estimate) -> Estimate:
    """1 - D_moe / D_dense at equal loss and equal FLOPs a token, from the ratio of tokens."""
    if not ratio.known:
        return ratio
    return Estimate(1 - ratio.value, 1 - ratio.high, 1 - ratio.low, ratio.status)


def _saved(ratio: Estimate) -> Claim:
    saved = tokens_saved(ratio)
    note = "tokens that the same MoE trains on less, as a share of the dense model's"
    if saved.known:
        note += f"; counted the other way dense takes {1 / ratio.value - 1:.1%} more"
    return Claim(
        "MoE uses data more efficiently at equal FLOPs a token",
        "share of tokens saved at equal loss",
        saved,
        f"{TOKENS_SAVED:.2%}, by a convention not known to us",
        _verdict(saved, 0.0, below=False),
        note,
    )


# ---------------------------------------------------------------------- near-optimal ranges


def near_optimal(
    evidence: Evidence, run: RunSize, within: float = NEAR_OPTIMAL
) -> dict[str, tuple[float, float]]:
    """The learning rates, and the batches, that can reach within a share of a run's best loss, each
    with the other at its best; empty without a surface."""
    optimum = evidence.optimum(run)
    if optimum is None:
        return {}
    off = np.linspace(-REACH, REACH, STEPS)
    u, v = (a.ravel() for a in np.meshgrid(off, off, indexing="ij"))
    point = optimum.mean + np.stack([u, v], axis=1)
    assert evidence.surface is not None
    loss, _ = evidence.surface.predict(run, *np.exp(point).T)
    gap = np.log(loss / loss.min()).reshape(STEPS, STEPS)
    found = {}
    for axis, name in ((1, "learning_rate"), (0, "batch_tokens")):
        near = off[gap.min(axis=axis) <= math.log1p(within)]
        middle = optimum.mean[1 - axis]
        found[name] = (math.exp(middle + near.min()), math.exp(middle + near.max()))
    return found


def _overlap(
    evidence: Evidence, dense: str, moe: str, ratios: Sequence[Ratio], quantity: str
) -> Claim:
    """How much of dense's near-optimal range is near-optimal for MoE of equal loss.

    The range is that of dense's largest cell; MoE's is the one of its own largest, moved to where
    MoE's optimum lies at equal loss."""
    word = {"batch_tokens": "batches", "learning_rate": "learning rates"}[quantity]
    claim = f"Near-optimal {word} of the two overlap at equal loss"
    ratio = needed(ratios, quantity, "loss")
    ranges = []
    for name in (dense, moe):
        cells = evidence.cells[evidence.cells["architecture"] == name]
        run = evidence.sizes[str(cells.index[-1])]
        found = near_optimal(evidence, run)
        optimum = evidence.optimum(run)
        if not found or optimum is None or not ratio.known:
            why = Estimate.missing(ratio.why or "no trial tells both learning rate and batch")
            return Claim(claim, "share of dense's range", why, "they overlap", "not determined")
        centre = optimum.batch_tokens if quantity == "batch_tokens" else optimum.learning_rate
        ranges.append(np.log(np.array(found[quantity]) / centre))
    own, other = ranges

    def share(shift: float) -> float:
        moved = other + shift
        common = min(own[1], moved[1]) - max(own[0], moved[0])
        return max(common, 0.0) / (own[1] - own[0])

    ends = [share(math.log(v)) for v in (ratio.value, ratio.low, ratio.high)]
    value = Estimate(ends[0], min(ends), max(ends))
    lengths = [math.exp(r[1] - r[0]) for r in ranges]
    note = (
        f"within {NEAR_OPTIMAL:.2%} of the best loss dense's {word} span a factor of "
        f"{lengths[0]:.2g}, MoE's {lengths[1]:.2g}"
    )
    verdict: Verdict = "seen" if value.low > 0 else "not seen" if value.high <= 0 else (
        "not determined")  # fmt: skip
    return Claim(claim, "share of dense's range", value, "they overlap", verdict, note)


# ---------------------------------------------------------------------- rate and noise scale


def ridge_slopes(evidence: Evidence, run: RunSize, seed: int = 0) -> np.ndarray:
    """Draws [draws] of d ln(best learning rate) / d ln batch about a run's optimum."""
    optimum, surface = evidence.optimum(run), evidence.surface
    assert optimum is not None
    assert surface is not None
    off = np.linspace(-REACH / 2, REACH / 2, 81)
    batches = np.array([-RIDGE, RIDGE])
    point = np.stack(
        [np.tile(optimum.mean[0] + off, 2), np.repeat(optimum.mean[1] + batches, len(off))], axis=1
    )
    rng = np.random.default_rng(seed)
    gaps = surface.sample_cell(run, point, DRAWS, rng).gaps.reshape(2 * DRAWS, len(off))
    at = np.clip(gaps.argmin(axis=1), 1, len(off) - 2)
    rows = np.arange(len(gaps))
    left, middle, right = (gaps[rows, at + k] for k in (-1, 0, 1))
    bend = np.maximum(left - 2 * middle + right, 1e-300)
    shift = np.clip(0.5 * (left - right) / bend, -1.0, 1.0)
    best = (off[at] + shift * (off[1] - off[0])).reshape(DRAWS, 2)
    return (best[:, 1] - best[:, 0]) / (2 * RIDGE)


def ridge_claim(evidence: Evidence, architecture: str, noise: pd.DataFrame) -> Claim:
    """lr = lr_max / (1 + B_noise / B): along the surface's ridge the best rate must rise with the
    batch as d ln lr / d ln B = 1 / (1 + B / B_noise), at the noise scale that trials measured.

    The value is the measured slope less the predicted one, the mean over cells."""
    cells = evidence.cells
    own = cells[cells["architecture"] == architecture]
    claim = f"lr = lr_max / (1 + B_noise/B), {architecture}"
    quantity = "slope of the best rate in the batch, measured less predicted"
    measured = noise.reindex(own.index)["noise_scale_tokens"].astype(float)
    known = [str(n) for n in own.index if measured[n] > 0]
    surface = evidence.surface
    why = ""
    if surface is None or surface.batch_rule is not None:
        why = "no cell varied both learning rate and batch"
    elif len(known) < 2:
        why = "fewer than two cells measured their noise scale"
    if why:
        return Claim(claim, quantity, Estimate.missing(why), "0", "not determined")
    slopes, predicted = [], []
    for name in known:
        run = evidence.sizes[name]
        optimum = evidence.optimum(run)
        assert optimum is not None
        slopes.append(ridge_slopes(evidence, run))
        predicted.append(1 / (1 + optimum.batch_tokens / float(measured[name])))
    draws = np.mean(slopes, axis=0)
    seen, said = float(np.median(draws)), float(np.mean(predicted))
    low, high = np.quantile(draws, [0.025, 0.975]) - said
    scatter = float(np.std(predicted, ddof=1)) / math.sqrt(len(predicted))
    half = math.hypot(float(stdtrit(len(predicted) - 1, 0.975)) * scatter, SLOPE_ERROR)
    middle = seen - said
    value = Estimate(
        middle,
        middle - math.hypot(middle - float(low), half),
        middle + math.hypot(float(high) - middle, half),
    )
    verdict: Verdict = "seen" if value.low <= 0 <= value.high else "not seen"
    if value.high - value.low > 1:
        verdict = "not determined"
    return Claim(claim, quantity, value, "0", verdict, f"measured {seen:.2f}, predicted {said:.2f}")


def claims_text(found: Mapping[str, Sequence[Claim]]) -> list[str]:
    """The claims as lines for a terminal."""
    lines: list[str] = []
    for name, own in found.items():
        lines += ["", f"Wang et al. on {name} against dense"]
        for c in own:
            value = "-"
            if c.value.known:
                value = f"{c.value.value:.3g} ({c.value.low:.3g} to {c.value.high:.3g})"
            why = f"; {c.value.why}" if not c.value.known and c.value.why else ""
            note = f"; {c.note}" if c.note else ""
            lines.append(f"  {c.verdict}: {c.claim}")
            lines.append(f"    {c.quantity} {value}; the source: {c.source}{note}{why}")
    return lines
