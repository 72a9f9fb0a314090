"""Two arms of one comparison: architectures, groups, studies or folders; other things equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

MAX_SIZES = 12
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
        """A run of its architecture and group, as the laws see it, be it a cell or not."""
        first = self.cells.iloc[0]
        run = describe_run(
            self.cells,
            params,
            tokens,
            experts=int(first["experts"]),
            top_k=int(first["top_k"]),
            group=self.group,
        )
        return replace(run, name="run")


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
    sizes = _sizes(reference.cells, other.cells)
    if not sizes:
        why = Estimate.missing("the arms share no range of N and D", "no overlap")
        return [Ratio(q, equal, why, 0, 0) for equal in EQUALS for q in _of(equal)]
    logs: dict[tuple[str, str], list[np.ndarray]] = {}
    for k, size in enumerate(sizes):
        for key, value in _at(reference, other, size, seed + k).items():
            logs.setdefault(key, []).append(value)
    paired = sum(size.paired for size in sizes)
    found = [
        Ratio(quantity, equal, _ratio(np.mean(logs[equal, quantity], axis=0)), len(sizes), paired)
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


@dataclass(frozen=True)
class _Size:
    """N and D to compare at, with the arms' cells of that size where both measured it."""

    params: float
    tokens: float
    cells: tuple[str, str] | None = None

    @property
    def paired(self) -> bool:
        return self.cells is not None


def _sizes(a: pd.DataFrame, b: pd.DataFrame) -> list[_Size]:
    """Sizes to compare at, the largest last: those that both arms measured, if any."""
    columns = [AXES["N"], AXES["D"]]
    one, two = (np.log(cells[columns].to_numpy(float)).reshape(-1, 2) for cells in (a, b))
    if not len(one) or not len(two):
        return []
    off = np.abs(one[:, None] - two).max(-1)
    nearest = off.argmin(1)
    found = [
        _Size(*np.exp(one[i]).tolist(), cells=(str(a.index[i]), str(b.index[j])))
        for i, j in enumerate(nearest)
        if off[i, j] < PAIRED
    ]
    if not found:
        low, high = np.maximum(one.min(0), two.min(0)), np.minimum(one.max(0), two.max(0))
        every = np.concatenate([one, two])
        both = every[((every >= low - PAIRED) & (every <= high + PAIRED)).all(1)]
        found = [_Size(*np.exp(p).tolist()) for p in both]
    return sorted(found, key=lambda s: s.params * s.tokens)[-MAX_SIZES:]


def _at(reference: Arm, other: Arm, size: _Size, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Draws of ln ratios at one size, by (what is equal, quantity).

    At equal N and D, measured cells speak for themselves. To where FLOPs or losses are equal, the
    laws lead: each from its own loss of the measured cell, where there is one."""
    params, tokens = size.params, size.tokens
    mine = [reference.run(params, tokens)]
    path = [other.run(params * math.exp(s / 2), tokens * math.exp(s / 2)) for s in _STEPS]
    theirs = [*path, *(other.run(params, tokens * math.exp(s)) for s in _STEPS)]
    if size.cells is not None:
        mine.append(reference.evidence.sizes[size.cells[0]])
        theirs.append(other.evidence.sizes[size.cells[1]])
    optima, losses = _draws(reference, other, mine, theirs, seed)
    n, steps = len(mine), len(_STEPS)
    own, own_loss = optima[:, :n], losses[:, :n]
    rates, batches = optima[:, n : n + steps, 0], optima[:, n : n + steps, 1]
    along, by_tokens = losses[:, n : n + steps], losses[:, n + steps : n + 2 * steps]
    at = steps // 2
    assert _STEPS[at] == 0
    found = {
        ("N and D", "learning_rate"): rates[:, at] - own[:, 0, 0],
        ("N and D", "batch_tokens"): batches[:, at] - own[:, 0, 1],
        ("N and D", "loss"): along[:, at] - own_loss[:, 0],
    }
    target = own_loss[:, 0]
    if size.cells is not None:
        found["N and D", "learning_rate"] = optima[:, -1, 0] - own[:, 1, 0]
        found["N and D", "batch_tokens"] = optima[:, -1, 1] - own[:, 1, 1]
        found["N and D", "loss"] = losses[:, -1] - own_loss[:, 1]
        target = own_loss[:, 1]
        measured = (losses[:, -1] - along[:, at])[:, None]
        along, by_tokens = along + measured, by_tokens + measured
    flops = np.log([r.compute for r in path])
    start = math.log(mine[0].compute)
    same_loss = _where_equal(along, target)
    for equal, where in (
        ("FLOPs", np.full(len(target), np.interp(start, flops, _STEPS))),
        ("loss", same_loss),
    ):
        found[equal, "learning_rate"] = _read(rates, where) - own[:, 0, 0]
        found[equal, "batch_tokens"] = _read(batches, where) - own[:, 0, 1]
        if equal == "FLOPs":
            found[equal, "loss"] = _read(along, where) - target
    needed_flops = np.interp(np.nan_to_num(same_loss), _STEPS, flops) - start
    found["loss", "flops"] = np.where(np.isnan(same_loss), np.nan, needed_flops)
    found["loss", "tokens"] = _where_equal(by_tokens, target)
    return found


def _draws(
    reference: Arm, other: Arm, mine: list[RunSize], theirs: list[RunSize], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of optima and losses of both arms' runs; joint where they share data and law."""
    a, b = reference.evidence, other.evidence
    if a is b:
        optima, losses = a.sample(reference.architecture, [*mine, *theirs], seed)
        if a.loss_model(reference.architecture) is not a.loss_model(other.architecture):
            losses[:, len(mine) :] = a.sample(other.architecture, theirs, seed + 1)[1]
        return optima, losses
    first = a.sample(reference.architecture, mine, seed)
    second = b.sample(other.architecture, theirs, seed + 1)
    optima, losses = (np.concatenate(p, axis=1) for p in zip(first, second, strict=True))
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
    tables = [
        noise.loc[own.index]
        for noise, own in zip((reference.noise, other.noise), cells, strict=True)
    ]
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
