"""Two arms of one comparison: architectures, groups, studies or folders; other things equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from raysweep.scaling.estimate import Estimate
from raysweep.scaling.evidence import DRAWS, PAIRED, Evidence
from raysweep.scaling.optima.noise_scale import fit_noise_scale
from raysweep.scaling.quantities import ANSWERS, QUANTITIES, TARGETS
from raysweep.scaling.recommend import Recommendation, answer
from raysweep.scaling.runs import AXES, describe_run, size_of
from raysweep.study.shape import RunSize
from raysweep.text import estimated, written

EQUALS = ("N and D", "FLOPs", "loss")
"""What is held equal: the size itself; or, growing N and D together, the FLOPs or the loss."""

_STEPS = np.linspace(-4.0, 4.0, 17)
"""ln N D of the other arm's runs over the reference's: where an equal loss is looked for."""

_HERE = len(_STEPS) // 2

MAX_RUNS = 12
"""Sizes at which two arms are compared, at most: the largest."""

OTHER_DATA = "other data"
"""Status of what is not compared because losses on other data lie on another scale."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One side of a comparison: the cells of one architecture and group in one set of data."""

    name: str
    evidence: Evidence
    architecture: str
    group: str = ""
    noise: pd.DataFrame | None = None
    """Measured noise scales, by cell."""
    data: str | None = None
    """Whose losses it can be compared with: arms of one name share their data. None: with those of
    its own evidence only."""

    @cached_property
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

    @property
    def batch_as_run(self) -> bool:
        """Whether none of its cells varied its batch, which then has no optimum to compare."""
        surface = self.evidence.surface
        return surface is not None and surface.batch_rule is not None

    def near(self, params: float, tokens: float) -> RunSize:
        """Its measured cell of nearly this size, as pairs of arms are; else a run of the size."""
        sizes = np.log(self.cells[[AXES["N"], AXES["D"]]].to_numpy(float))
        off = np.abs(sizes - np.log([params, tokens])).max(1)
        k = int(off.argmin())
        if off[k] < PAIRED:
            return size_of(self.cells.index[k], self.cells.iloc[k])
        return self.run(params, tokens)

    def answer(self, params: float, tokens: float) -> Recommendation:
        """The recommendation for a run of this size."""
        return answer(self.evidence, self.architecture, self.near(params, tokens))

    def shares_losses(self, other: Arm) -> bool:
        """Whether losses of the two lie on one scale: they are of one set of data."""
        if self.evidence is other.evidence:
            return True
        return self.data is not None and self.data == other.data


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
    def name(self) -> str:
        """`learning rate at equal FLOPs`."""
        return f"{QUANTITIES[self.quantity].name} at equal {self.at_equal}"

    @property
    def said(self) -> str:
        """The ratio with its interval."""
        return estimated(self.ratio, style=QUANTITIES[self.quantity].ratio_style)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.ok and (self.ratio.low > 1 or self.ratio.high < 1)


AS_RUN = Estimate.missing("no cell varied its batch")


@dataclass(frozen=True)
class Shift:
    """How an arm's optimum moves from its smallest to its largest model, at equal tokens.

    `learning_rate` and `batch_tokens` are the largest model's over the smallest's, `cost` is what
    the smallest's settings cost the largest, as a share of its loss: means (of logs) over the
    horizons `tokens` that both have.
    """

    params: tuple[float, float]
    tokens: tuple[float, ...]
    learning_rate: Estimate
    batch_tokens: Estimate
    cost: Estimate

    @property
    def cost_said(self) -> str:
        """The cost with its interval; the valley tells nothing of losses that are doubled."""
        value, low, high = (
            "over 100\N{NO-BREAK SPACE}%" if v > 1 else written(v, "percent")
            for v in (self.cost.value, self.cost.low, self.cost.high)
        )
        return f"{value} ({low} to {high})"


def size_shift(arm: Arm, seed: int = 0) -> Shift | None:
    """None where the smallest and the largest model share no horizon, or nothing was searched."""
    cells, evidence = arm.cells, arm.evidence
    if evidence.surface is None or not len(cells):
        return None
    n, d = (np.log(cells[AXES[axis]].to_numpy(float)) for axis in ("N", "D"))
    ends = [np.flatnonzero(abs(n - end) < PAIRED) for end in (n.min(), n.max())]
    pairs = [(a, b) for a in ends[0] for b in ends[1] if abs(d[a] - d[b]) < PAIRED]
    if not pairs or n.max() - n.min() < PAIRED:
        return None
    names = list(map(str, cells.index))
    runs = [evidence.sizes[names[k]] for pair in pairs for k in pair]
    optima = [evidence.surface.optimum(run) for run in runs]
    exact = np.mean([b.mean - a.mean for a, b in zip(optima[::2], optima[1::2], strict=True)], 0)
    drawn = evidence.surface.sample_optima(runs, DRAWS, np.random.default_rng(seed))
    moved = (drawn[:, 1::2] - drawn[:, ::2]).mean(axis=1)
    moved += exact - np.median(moved, axis=0)
    gaps = [
        evidence.gap(run, *np.exp(small.mean)[:, None])
        for run, small in zip(runs[1::2], optima[::2], strict=True)
    ]
    return Shift(
        (math.exp(n.min()), math.exp(n.max())),
        tuple(runs[2 * k].tokens for k in range(len(pairs))),
        _ratio(moved[:, 0]),
        AS_RUN if arm.batch_as_run else _ratio(moved[:, 1]),
        Estimate(*np.expm1(np.mean(gaps, axis=0)).ravel().tolist()),
    )


def compare_arms(reference: Arm, other: Arm, seed: int = 0) -> list[Ratio]:
    """Ratios of the other arm over the reference at equal N and D, FLOPs and loss.

    They are read at sizes that both arms measured (N and D of the cells agree within 5 %); without
    such, at the measured sizes of either that lie within the range of both. At each, the other
    arm's runs are followed along equal tokens a parameter, by its law of the loss through its own
    level there, to where the FLOPs, or the loss, are the reference's. At equal N and D a ratio is
    that of the two recommendations; its interval, and what is held equal otherwise, come from joint
    draws of the fitted model: what two arms of one set of data share cancels in their ratio.
    """
    sizes, paired = shared_sizes(reference, other)
    if not sizes:
        why = Estimate.missing("the arms share no range of N and D", "no overlap")
        return [Ratio(q, equal, why, 0, 0) for equal in EQUALS for q in _of(equal)]
    logs: dict[tuple[str, str], list[np.ndarray]] = {}
    for k, (params, tokens) in enumerate(sizes):
        for key, value in _at(reference, other, params, tokens, seed + k).items():
            logs.setdefault(key, []).append(value)
    n = len(sizes)
    apart = not reference.shares_losses(other)
    found = []
    mean = {key: np.mean(draws, axis=0) for key, draws in logs.items()}
    exact = np.mean([_exact(reference, other, *size) for size in sizes], axis=0)
    # By how much draws miss, in the middle, the ratio of the two answers.
    missed = {
        quantity: np.median(mean["N and D", quantity]) - exact[k]
        for k, quantity in enumerate(ANSWERS)
    }
    for equal in EQUALS:
        for quantity in _of(equal):
            draws = mean[equal, quantity] - missed.get(quantity, 0.0)
            ratio = _ratio(draws)
            if apart and "loss" in (equal, quantity):
                ratio = Estimate.missing("losses on other data are not comparable", OTHER_DATA)
            elif quantity == "batch_tokens" and (reference.batch_as_run or other.batch_as_run):
                ratio = AS_RUN
            found.append(Ratio(quantity, equal, ratio, n, paired))
    noise = None if apart else _noise(reference, other)
    return found + ([noise] if noise is not None else [])


def needed(ratios: Sequence[Ratio], quantity: str, at_equal: str) -> Estimate:
    """One of the ratios; missing where it was not made."""
    for ratio in ratios:
        if (ratio.quantity, ratio.at_equal) == (quantity, at_equal):
            return ratio.ratio
    return Estimate.missing("not compared")


def _of(equal: str) -> tuple[str, ...]:
    if equal == "loss":
        return (*TARGETS, "flops", "tokens")
    return ANSWERS


def shared_sizes(a: Arm, b: Arm) -> tuple[list[tuple[float, float]], int]:
    """(N, D) to compare at, the largest last, and how many of them both arms measured."""
    columns = [AXES["N"], AXES["D"]]
    one, two = (np.log(arm.cells[columns].to_numpy(float)).reshape(-1, 2) for arm in (a, b))
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
    start, there = reference.near(params, tokens), other.near(params, tokens)
    grown = [_grown(other, there, s) for s in _STEPS]
    longer = [_longer(there, s) for s in _STEPS]
    (mine, level), (theirs, own_level) = _draws(reference, other, start, there, seed)
    law = other.evidence.loss_model(other.architecture).sample([*grown, *longer], DRAWS, seed)
    # The law tells how the loss changes from the arm's own level at this size.
    law = own_level[:, None] + law - law[:, _HERE : _HERE + 1]
    along, by_tokens = law[:, : len(_STEPS)], law[:, len(_STEPS) :]
    slope = _slopes(other, seed)
    flops = np.log([r.compute for r in grown])
    same_flops = np.full(DRAWS, np.interp(math.log(start.compute), flops, _STEPS))
    same_loss = _where_equal(along, level)
    found = {}
    for equal, at in (("N and D", np.zeros(DRAWS)), ("FLOPs", same_flops), ("loss", same_loss)):
        found[equal, "learning_rate"] = theirs[:, 0] + at * slope[:, 0] - mine[:, 0]
        found[equal, "batch_tokens"] = theirs[:, 1] + at * slope[:, 1] - mine[:, 1]
    found["N and D", "loss"] = own_level - level
    found["FLOPs", "loss"] = _read(along, same_flops) - level
    found["loss", "flops"] = np.interp(same_loss, _STEPS, flops) - math.log(start.compute)
    found["loss", "tokens"] = _where_equal(by_tokens, level)
    return found


def _exact(reference: Arm, other: Arm, params: float, tokens: float) -> np.ndarray:
    """ln ratios [3] of `ANSWERS` between what the two arms recommend at one size."""
    found = []
    for arm in (reference, other):
        run = arm.near(params, tokens)
        optimum = arm.evidence.optimum(run)
        loss = arm.evidence.loss(arm.architecture, run).loss
        found.append([*(np.full(2, np.nan) if optimum is None else optimum.mean), loss.value])
    logs = np.array(found)
    logs[:, 2] = np.log(logs[:, 2])
    return logs[1] - logs[0]


def _grown(arm: Arm, run: RunSize, step: float) -> RunSize:
    """A run `step` larger in ln N D at equal tokens a parameter, never taken for a cell."""
    half = math.exp(step / 2)
    grown = run
    if step:
        grown = arm.run(run.params_active_non_embedding * half, run.tokens * half)
    return replace(grown, name="")


def _longer(run: RunSize, step: float) -> RunSize:
    """The same model on e^step times as many tokens."""
    more = math.exp(step)
    return replace(run, tokens=run.tokens * more, flops=run.compute * more, name="")


def _slopes(arm: Arm, seed: int) -> np.ndarray:
    """Draws [draws, 2] of d ln rate and d ln batch per ln N D, at equal tokens a parameter."""
    surface = arm.evidence.surface
    if surface is None:
        return np.full((DRAWS, 2), np.nan)
    laws = surface.laws
    size = laws.coefficients.shape[1]
    rows = np.zeros((2, 2 * size))
    for axis in range(2):
        rows[axis, axis * size + 1 : axis * size + 3] = 0.5
    rng = np.random.default_rng(seed)
    mean, spread = rows @ laws.coefficients.ravel(), rows @ laws.covariance @ rows.T
    return rng.multivariate_normal(mean, spread, DRAWS, method="eigh")


Draws = tuple[np.ndarray, np.ndarray]


def _draws(
    reference: Arm, other: Arm, start: RunSize, there: RunSize, seed: int
) -> tuple[Draws, Draws]:
    """Of each arm's run, draws of (ln rate, ln batch) [draws, 2] and of ln loss [draws]."""
    one, two = reference.evidence, other.evidence
    if one is two:
        optima, losses = one.sample(reference.architecture, [start, there], seed)
        if one.loss_model(reference.architecture) is not two.loss_model(other.architecture):
            losses[:, 1] = two.sample(other.architecture, [there], seed + 1)[1][:, 0]
    else:
        each = [
            arm.evidence.sample(arm.architecture, [run], seed + k)
            for k, (arm, run) in enumerate([(reference, start), (other, there)])
        ]
        optima = np.concatenate([o for o, _ in each], axis=1)
        losses = np.concatenate([level for _, level in each], axis=1)
    rng = np.random.default_rng(seed + 2)
    return tuple(
        _centred(arm, run, optima[:, k], losses[:, k], rng)
        for k, (arm, run) in enumerate([(reference, start), (other, there)])
    )  # type: ignore[return-value]


def _centred(
    arm: Arm, run: RunSize, optima: np.ndarray, level: np.ndarray, rng: np.random.Generator
) -> Draws:
    """Draws moved so that their medians are what the fitted object answers."""
    evidence = arm.evidence
    optimum, loss = evidence.optimum(run), evidence.loss(arm.architecture, run).loss
    if optimum is not None:
        optima = optima - np.median(optima, axis=0) + optimum.mean
    noise = rng.standard_normal(len(level))
    if loss.has_interval and not np.isfinite(level).all():  # another architecture's law told it
        level = math.log(loss.high / loss.low) / 3.92 * noise
    return optima, level - np.median(level) + math.log(loss.value)


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
    measured = reference.noise, other.noise
    tables = [noise.loc[own.index] for noise, own in zip(measured, cells, strict=True)]
    if not all(t["noise_scale_tokens"].notna().any() for t in tables):
        return None
    second = np.repeat([0, 1], [len(c) for c in cells])
    law = fit_noise_scale(pd.concat(cells), pd.concat(tables), ("loss",), second)
    n = sum(int(t["noise_scale_tokens"].notna().sum()) for t in tables)
    ends = Estimate.missing("") if law is None else law.exponents["factor"]
    if not ends.known:
        ratio = Estimate.missing("too few cells measured the noise scale", "too few cells")
    else:
        ratio = Estimate(math.exp(ends.value), math.exp(ends.low), math.exp(min(ends.high, 700)))
    return Ratio("noise_scale_tokens", "loss", ratio, n, 0)
