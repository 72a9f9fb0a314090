"""What trials are worth to the targets, and how a budget of FLOPs is best spent on them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from raysweep.scaling.optima.arrow import invert
from raysweep.scaling.optima.model import predict_rows
from raysweep.scaling.optima.surface import Surface
from raysweep.study import Study
from raysweep.study.shape import RunSize

_GAIN = 0.25
"""The share of the expected regret that a plan must save to be preferred to spreading."""
_REACH = 10.0
"""Without targets: a run this much larger than the largest cell, in parameters and in tokens."""


def targets_of(study: Study) -> tuple[RunSize, ...]:
    """The runs that a study is to recommend for, as the surface model sees them.

    Those that the file names; without any, each architecture's largest cell times ten in parameters
    and tokens. A MoE target is as sparse as the study's largest cell of its architecture.
    """
    largest = {cell.architecture: cell.size for cell in study.cells}
    named = [(t.architecture, t.params, t.tokens) for t in study.space.targets]
    if not named:
        named = [
            (a, c.params_active_non_embedding * _REACH, c.tokens * _REACH)
            for a, c in largest.items()
        ]
    found = []
    for i, (architecture, params, tokens) in enumerate(named):
        like = largest[architecture]
        found.append(
            RunSize(
                params_active_non_embedding=params,
                tokens=tokens,
                experts=like.experts,
                top_k=like.top_k,
                params_total_non_embedding=params * math.exp(like.log_sparsity),
                name=f"target-{i}",
            )
        )
    return tuple(found)


class Outlook:
    """What trials not yet run would do to the targets' expected regret (relative loss).

    A trial near its cell's optimum adds to the posterior's precision what the model's derivatives
    there say (Laplace's approximation), so the covariance after any trials in any cells is known
    before they run. A target's regret is half the trace of its valley's curvature times the
    covariance of its optimum, departures from the law included. A cell's own scatter bounds what
    its trials tell of the law: each is worth less than the one before.

    Args:
        surface: fitted to the trials so far, `cells` among its own.
        cells: where trials may be run.
        targets: the runs to recommend for.
    """

    def __init__(
        self, surface: Surface, cells: Sequence[RunSize], targets: Sequence[RunSize]
    ) -> None:
        problem, mode = surface.problem, surface.mode
        point = problem.at(mode.shared, mode.own)
        variance = problem.variance(mode.widths, problem.noise_gap(point))
        (head, cross, tail), _ = problem.normal_equations(point, mode.widths, variance)
        index = {cell.name: i for i, cell in enumerate(surface.cells)}
        self._index = [index[cell.name] for cell in cells]
        self._head, self._cross, self._tail = head, cross, tail
        self._added = [
            _information(surface, cell, i) for cell, i in zip(cells, self._index, strict=True)
        ]
        self._precision = np.linalg.inv(invert(head, cross, tail).shared)
        x, layout = surface.design.matrix(targets), problem.layout
        rows = []
        self._floor = 0.0  # the targets' own scatter, which no trial elsewhere takes away
        for target, at in zip(targets, x, strict=True):
            half = 0.5 * surface.optimum(target).curvature / len(targets)
            root = np.linalg.cholesky(half).T
            row = np.zeros((2, layout.size))
            row[0, layout.law[0]], row[1, layout.law[1]] = at, at
            rows.append(root @ row)
            self._floor += float(half.diagonal() @ mode.widths.own[1:] ** 2)
        self._rows = np.concatenate(rows)

    def regret(self, counts: Sequence[int]) -> float:
        """Mean over the targets after `counts` more trials in each cell."""
        return self._floor + self._trace(self._after(counts))

    def plan(
        self, flops: Sequence[float], budget: float, most: Sequence[int], least: Sequence[int]
    ) -> tuple[list[int], float]:
        """Trials of each cell that spend a budget best, and the regret then. A cell gets its
        `least`, whatever it costs, and at most `most`.

        Trials are added one by one where a FLOP takes away most, what the others tell included.
        """
        counts, budget = list(least), budget - float(np.dot(least, flops))
        precision = self._after(counts)
        now = self._trace(precision)
        worth = [(-math.inf, i) for i in range(len(flops))]
        fresh = [False] * len(flops)
        while worth:
            _, i = heapq.heappop(worth)
            if flops[i] > budget or counts[i] >= most[i]:
                continue
            if not fresh[i]:  # its worth is of an earlier state: it can only have fallen
                tried = precision + self._gain(i, counts[i], counts[i] + 1)
                heapq.heappush(worth, ((self._trace(tried) - now) / flops[i], i))
                fresh[i] = True
                continue
            precision = precision + self._gain(i, counts[i], counts[i] + 1)
            now = self._trace(precision)
            counts[i] += 1
            budget -= flops[i]
            fresh = [False] * len(flops)
            heapq.heappush(worth, (-math.inf, i))
        return counts, self._floor + now

    def _after(self, counts: Sequence[int]) -> np.ndarray:
        """[S, S], the precision of the shared parameters after so many more trials."""
        gains = (self._gain(i, 0, count) for i, count in enumerate(counts) if count)
        return sum(gains, self._precision)

    def _trace(self, precision: np.ndarray) -> float:
        return float((self._rows * np.linalg.solve(precision, self._rows.T).T).sum())

    def _gain(self, i: int, before: int, after: int) -> np.ndarray:
        """[S, S], what a cell's trials from `before` to `after` add to the precision of the shared
        parameters, its own effects integrated out."""
        return self._marginal(i, after) - self._marginal(i, before)

    def _marginal(self, i: int, count: int) -> np.ndarray:
        head, cross, tail = self._added[i]
        cell = self._index[i]
        joint = self._cross[cell] + count * cross
        return count * head - joint @ np.linalg.solve(self._tail[cell] + count * tail, joint.T)


def _information(
    surface: Surface, cell: RunSize, index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shared [S, S], cross [S, 3], own [3, 3]) of the precision that one trial of a cell adds.

    The mean over five places: the expected optimum, and two along each axis of the valley where
    the gap stands best above the noise.
    """
    mode, settings = surface.mode, surface.settings
    optimum = surface.optimum(cell)
    telling = float(np.clip(mode.widths.noise / mode.widths.growth, 1e-3, settings.far / 4))
    size, axes = np.linalg.eigh(optimum.curvature)
    arms = axes * np.sqrt(2 * telling / np.maximum(size, 1e-6))
    offsets = np.concatenate([np.zeros((1, 2)), arms.T, -arms.T])
    x = np.repeat(surface.design.matrix([cell]), len(offsets), 0)
    own = np.repeat(mode.own[index : index + 1], len(offsets), 0)
    _, gap, by_shared, by_own = predict_rows(
        mode.shared, own, x, optimum.mean + offsets, surface.problem.layout
    )
    weight = 1 / surface.noise_variance(gap) / len(offsets)
    weighted = by_own * weight[:, None]
    return (
        (by_shared * weight[:, None]).T @ by_shared,
        by_shared.T @ weighted,
        by_own.T @ weighted,
    )


def next_cell(
    surface: Surface,
    cells: Sequence[RunSize],
    had: Sequence[int],
    flops: Sequence[float],
    most: Sequence[int],
    least: Sequence[int],
    budget: float,
    targets: Sequence[RunSize],
) -> int | None:
    """The cell that gets a trial next, so that a budget lowers the targets' regret most.

    The whole budget is allotted anew from what is known now, by the best plan (`Outlook.plan`). But
    near it the regret is flat, and trials tell less than the model expects: no cell gets more than
    twice what all would get alike, and unless the plan is expected to do better by a quarter, the
    budget is spread over the cells (`spread`). Either way the first cells get all of theirs first,
    so that the dear ones are placed by all that they told.

    Args:
        surface: fitted to the trials so far.
        cells: where trials may be run, cheap ones first.
        had: trials that each has had.
        flops: of one trial of each.
        most: how many more trials each may have.
        least: how many more each gets in any case.
        budget: FLOPs left.
        targets: the runs to recommend for.

    Returns:
        A position in `cells`, or None where no trial is affordable.
    """
    if least[0]:
        return 0
    outlook = Outlook(surface, cells, targets)
    chosen = alike = spread(had, flops, budget, most, least)
    level = max((h + more for h, more in zip(had, alike, strict=True) if more), default=0)
    within = [max(0, min(m, 2 * level - h)) for m, h in zip(most, had, strict=True)]
    planned, regret = outlook.plan(flops, budget, within, least)
    if regret < outlook.regret(alike) * (1 - _GAIN):
        chosen = planned
    return next((i for i, more in enumerate(chosen) if more), None)


def spread(
    had: Sequence[int],
    flops: Sequence[float],
    budget: float,
    most: Sequence[int],
    least: Sequence[int],
) -> list[int]:
    """How many more trials each cell gets when those of fewest go first, small ones before large:
    its `least` whatever it costs, at most `most`."""
    more, budget = list(least), budget - float(np.dot(least, flops))
    while True:
        able = [i for i in range(len(flops)) if more[i] < most[i] and flops[i] <= budget]
        if not able:
            return more
        chosen = min(able, key=lambda i: (had[i] + more[i], flops[i]))
        more[chosen] += 1
        budget -= flops[chosen]
