"""Two arms of one comparison: architectures, groups, studies or folders; other things equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysweep.scaling.estimate import Estimate
from raysweep.scaling.evidence import DRAWS, PAIRED, Evidence
from raysweep.scaling.optima.noise_scale import fit_noise_scale
from raysweep.scaling.runs import AXES, describe_run
from raysweep.study.shape import RunSize

QUANTITIES = ("learning_rate", "batch_tokens", "loss")

EQUALS = ("N and D", "FLOPs", "loss")
"""What is held equal: the size itself; or, growing N and D together, the FLOPs or the loss."""

_STEPS = np.linspace(-4.0, 4.0, 33)
"""ln N D of the other arm's runs over the reference's: where an equal loss is looked for."""

_FARTHEST = 0.98 * _STEPS[-1]

MAX_RUNS = 12
"""Sizes at which two arms are compared, at most: the largest."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One side of a comparison: the cells of one architecture and group in one set of data."""

    name: str
    evidence: Evidence
    architecture: str
    group: str = ""
    noise: pd.DataFrame | None = None
    """Measured noise scales, by cell."""

    @property
    def cells(self) -> pd.DataFrame:
        """Its cells, smallest compute first."""
        cells = self.evidence.cells
        own = cells[cells["architecture"] == self.architecture]
        return own[own["group"] == self.group] if self.group else own

    def run(self, params: float, tokens: float) -> RunSize:
        """A run of its architecture and group: a measured cell where it is of a cell's size."""
        first = self.cells.iloc[0]
        return describe_run(
            self.cells,
            params,
            tokens,
            experts=int(first["experts"]),
            top_k=int(first["top_k"]),
            group=self.group,
        )


@dataclass(frozen=True)
class Ratio:
    """The other arm over the reference in one quantity, other things equal.

    `ratio` has the status `ok`, or says why there is none. It is the mean (of logs) over `n` sizes,
    of which `paired` were measured in both arms.
    """

    quantity: str
    at_equal: str
    ratio: Estimate
    n: int
    paired: int

    @property
    def ok(self) -> bool:
        return self.ratio.known

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.ok and (self.ratio.low > 1 or self.ratio.high < 1)


def compare_arms(reference: Arm, other: Arm, seed: int = 0) -> list[Ratio]:
    """Ratios of the other arm over the reference at equal N and D, FLOPs and loss.

    They are read at sizes that both arms measured; without such, at the measured sizes of either
    that lie within the range of both. At each, the other arm's runs are followed along equal tokens
    a parameter to where the FLOPs, or the loss, are the reference's. Everything comes from joint
    draws of the fitted model: what two arms of one set of data share cancels in their ratio.
    """
    sizes, paired = _sizes(reference.cells, other.cells)
    if not sizes:
        why = Estimate.missing("the arms share no range of N and D", "no overlap")
        return [Ratio(q, equal, why, 0, 0) for equal in EQUALS for q in _of(equal)]
    logs: dict[tuple[str, str], list[np.ndarray]] = {}
    for k, (params, tokens) in enumerate(sizes):
        for key, value in _at(reference, other, params, tokens, seed + k).items():
            logs.setdefault(key, []).append(value)
    n = len(sizes)
    found = [
        Ratio(quantity, equal, _ratio(np.mean(logs[equal, quantity], axis=0)), n, paired)
        for equal in EQUALS
        for quantity in _of(equal)
    ]
    noise = _noise(reference, other)
    return found + ([noise] if noise is not None else [])


def needed(ratios: Sequence[Ratio], quantity: str, at_equal: str) -> Estimate:
    """One of the ratios; missing where it was not made."""
    for ratio in ratios:
        if (ratio.quantity, ratio.at_equal) == (quantity, at_equal):
            return ratio.ratio
    return Estimate.missing("not compared")


def _of(equal: str) -> tuple[str, ...]:
    if equal == "loss":
        return ("learning_rate", "batch_tokens", "flops", "tokens")
    return QUANTITIES


def _sizes(a: pd.DataFrame, b: pd.DataFrame) -> tuple[list[tuple[float, float]], int]:
    """(N, D) to compare at, the largest last, and how many of them both arms measured."""
    columns = [AXES["N"], AXES["D"]]
    one, two = (np.log(cells[columns].to_numpy(float)).reshape(-1, 2) for cells in (a, b))
    if not len(one) or not len(two):
        return [], 0
    off = np.abs(one[:, None] - two).max(-1)
    both = one[off.min(1) < PAIRED]
    paired = len(both)
    if not paired:
        low, high = np.maximum(one.min(0), two.min(0)), np.minimum(one.max(0), two.max(0))
        every = np.concatenate([one, two])
        both = every[((every >= low - PAIRED) & (every <= high + PAIRED)).all(1)]
    order = np.argsort(both.sum(1), kind="stable")[-MAX_RUNS:]
    return [(float(n), float(d)) for n, d in np.exp(both[order])], min(paired, MAX_RUNS)


def _at(
    reference: Arm, other: Arm, params: float, tokens: float, seed: int
) -> dict[tuple[str, str], np.ndarray]:
    """Draws of ln ratios at one size, by (what is equal, quantity)."""
    path = [other.run(params * math.exp(s / 2), tokens * math.exp(s / 2)) for s in _STEPS]
    longer = [other.run(params, tokens * math.exp(s)) for s in _STEPS]
    start = reference.run(params, tokens)
    middle = len(_STEPS) // 2
    if reference.evidence is other.evidence:
        optima, own = _joint(reference, other, [start], [*path, *longer], seed)
        mine, losses = optima[:, 0], own[:, 0]
        theirs, reached = optima[:, 1:], own[:, 1:]
    else:
        optima, own = reference.evidence.sample(reference.architecture, [start], seed)
        mine, losses = optima[:, 0], own[:, 0]
        theirs, reached = other.evidence.sample(
            other.architecture, [*path, *longer], seed + 100_003
        )
    count = len(_STEPS)
    along, by_tokens = reached[:, :count], reached[:, count:]
    rates, batches = theirs[:, :count, 0], theirs[:, :count, 1]
    flops = np.log([r.compute for r in path])
    same_flops = np.interp(math.log(start.compute), flops, _STEPS)
    same_loss = _where_equal(along, losses)
    more_tokens = _where_equal(by_tokens, losses)
    found = {}
    for equal, at in (
        ("N and D", np.zeros(len(losses))),
        ("FLOPs", np.full(len(losses), same_flops)),
        ("loss", same_loss),
    ):
        found[equal, "learning_rate"] = _read(rates, at) - mine[:, 0]
        found[equal, "batch_tokens"] = _read(batches, at) - mine[:, 1]
        if equal != "loss":
            found[equal, "loss"] = _read(along, at) - losses
    found["loss", "flops"] = np.interp(same_loss, _STEPS, flops) - math.log(start.compute)
    found["loss", "flops"][np.isnan(same_loss)] = np.nan
    found["loss", "tokens"] = more_tokens
    assert np.allclose(_STEPS[middle], 0)
    return found


def _joint(
    reference: Arm, other: Arm, mine: list[RunSize], theirs: list[RunSize], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Joint draws of runs of two architectures of one set of data."""
    evidence = reference.evidence
    if evidence.loss_model(reference.architecture) is evidence.loss_model(other.architecture):
        return evidence.sample(reference.architecture, [*mine, *theirs], seed)
    optima, losses = evidence.sample(reference.architecture, [*mine, *theirs], seed)
    losses[:, len(mine) :] = evidence.sample(other.architecture, theirs, seed + 1)[1]
    return optima, losses


def _where_equal(along: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The step [draws] at which losses [draws, steps], which fall with it, reach a target; NaN
    where they do not within the steps."""
    found = np.full(len(target), np.nan)
    falling = np.minimum.accumulate(along, axis=1)
    for i, (row, wanted) in enumerate(zip(falling, target, strict=True)):
        if np.isfinite(row).all() and row[-1] <= wanted <= row[0]:
            found[i] = np.interp(-wanted, -row, _STEPS)
    return found


def _read(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Draws [draws, steps] read at each draw's own step."""
    out = np.full(len(at), np.nan)
    for i, (row, s) in enumerate(zip(values, at, strict=True)):
        if math.isfinite(s):
            out[i] = np.interp(s, _STEPS, row)
    return out


def _ratio(logs: np.ndarray) -> Estimate:
    """From draws of a ln ratio; missing where a share of them has none."""
    known = logs[np.isfinite(logs)]
    if len(known) < 0.8 * DRAWS:
        return Estimate.missing("the arms do not reach equal losses, or lack what it needs")
    low, middle, high = np.exp(np.quantile(known, [0.025, 0.5, 0.975])).tolist()
    return Estimate(middle, low, high)


def _noise(reference: Arm, other: Arm) -> Ratio | None:
    """The ratio of measured noise scales at equal loss; None where it was not measured."""
    if reference.noise is None or other.noise is None:
        return None
    cells = [arm.cells.dropna(subset=["loss"]) for arm in (reference, other)]
    tables = [arm.noise.loc[own.index] for arm, own in zip((reference, other), cells, strict=True)]
    if not all(t["noise_scale_tokens"].notna().any() for t in tables):
        return None
    second = np.repeat([0, 1], [len(c) for c in cells])
    law = fit_noise_scale(pd.concat(cells), pd.concat(tables), ("loss",), second)
    n = sum(int(t["noise_scale_tokens"].notna().sum()) for t in tables)
    if law is None:
        ratio = Estimate.missing("too few cells measured the noise scale", "too few cells")
    else:
        ends = law.exponents["factor"]
        ratio = Estimate(math.exp(ends.value), math.exp(ends.low), math.exp(min(ends.high, 700)))
    return Ratio("noise_scale_tokens", "loss", ratio, n, 0)
